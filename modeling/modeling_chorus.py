"""Chorus: text, image and audio tokens in one sequence through a decoder of expert banks."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, logging

from .configuration_chorus import ChorusConfig
from .configuration_modalities import ENCODED, MODALITY_IDS, EncodedModality
from .configuration_towers import ChorusAudioConfig, ChorusVisionConfig
from .modeling_base import ChorusPreTrainedModel
from .modeling_outputs import ChorusModelOutput, takes_cache
from .modeling_text import ChorusTextModel
from .moe_plan import DecoderKwargs
from .tower_audio import ChorusAudioModel
from .tower_connectors import AudioConnector, VisionConnector
from .tower_vision import ChorusVisionModel

logger = logging.get_logger(__name__)


def check_placeholders(found: list[int], sizes: list[int], modality: str) -> None:
    """Match the placeholders of every sample with whole images or clips, in order.

    Args:
        found: placeholder tokens in each sample.
        sizes: tokens of each image or clip of the batch.

    Raises:
        ValueError: naming the first sample that does not fit, with both numbers.
    """
    next_piece = 0
    for sample, count in enumerate(found):
        # Pieces belong to samples by order alone, so each sample takes whole ones until its placeholders are used up. A
        # count over the batch would let one sample's surplus hide what another lacks.
        expected = 0
        while expected < count and next_piece < len(sizes):
            expected += sizes[next_piece]
            next_piece += 1
        if expected != count:
            raise ValueError(
                f"sample {sample}: found {count} {modality} placeholders for {expected} {modality} tokens; the text "
                f"was truncated after the processor ran, the {modality} left out, or accelerate cut a streamed batch: "
                "accelerator_config={'dispatch_batches': False}, or a pipeline took one of several clips: batch_size=1"
            )
    if next_piece < len(sizes):
        raise ValueError(
            f"found {sum(found)} {modality} placeholders in the batch for {sum(sizes)} {modality} tokens: "
            f"{len(sizes) - next_piece} of {len(sizes)} {modality} inputs belong to no sample"
        )


# Model type of an encoder -> the encoder, and the connector that makes its output tokens of the decoder. Types, not
# configuration classes: code from the Hub may hold two copies of a class.
ENCODER_CLASSES: dict[str, tuple[Any, Any]] = {
    ChorusVisionConfig.model_type: (ChorusVisionModel, VisionConnector),
    ChorusAudioConfig.model_type: (ChorusAudioModel, AudioConnector),
}


class ChorusModel(ChorusPreTrainedModel):
    """Encoders, connectors and the decoder; no head."""

    accepts_loss_kwargs = False
    vision_tower: Any
    audio_tower: Any
    vision_connector: Any
    audio_connector: Any

    def __init__(self, config: ChorusConfig):
        super().__init__(config)
        text: Any = config.text_config
        encoders: list[tuple[EncodedModality, Any]] = [(row, getattr(config, row.config)) for row in ENCODED]
        # First all towers, then all connectors: optimizers keep their states in the order of parameters.
        for row, encoder in encoders:
            tower = None if encoder is None else ENCODER_CLASSES[encoder.model_type][0]._from_config(encoder)
            setattr(self, row.tower, tower)
        for row, encoder in encoders:
            connector = None if encoder is None else ENCODER_CLASSES[encoder.model_type][1](encoder, text.hidden_size)
            setattr(self, row.connector, connector)
        self.language_model = ChorusTextModel._from_config(text)
        self.post_init()

    @can_return_tuple
    def get_image_features(
        self, pixel_values: torch.FloatTensor, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPooling:
        """Encode images.

        Args:
            pixel_values: `(images, C, H, W)`.

        Returns:
            `last_hidden_state` of the tower and, as `pooler_output`, the image tokens `(images, tokens, D)`.
        """
        if self.vision_tower is None:
            raise ValueError(f"got {len(pixel_values)} images but this model has no vision tower")
        with no_graph_if_frozen(self.vision_tower, pixel_values), all_loaded(self.vision_tower):
            tokens = self.vision_tower(pixel_values=pixel_values.to(self.vision_tower.dtype)).last_hidden_state
        return BaseModelOutputWithPooling(last_hidden_state=tokens, pooler_output=self._connected("image", tokens))

    @can_return_tuple
    def get_audio_features(
        self,
        input_features: torch.FloatTensor,
        input_features_mask: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """Encode clips.

        Args:
            input_features: log-mel features `(windows, frames, mel bins)`.
            input_features_mask: `(windows, frames)`, 1 for real frames; all real if None.

        Returns:
            `last_hidden_state` of the tower and, as `pooler_output`, the audio tokens of each window: `[(tokens, D)]`.
        """
        if self.audio_tower is None:
            raise ValueError(f"got {len(input_features)} clips but this model has no audio tower")
        with no_graph_if_frozen(self.audio_tower, input_features), all_loaded(self.audio_tower):
            encoded = self.audio_tower(
                input_features=input_features.to(self.audio_tower.dtype), input_features_mask=input_features_mask
            )
        pieces = self._connected("audio", encoded.last_hidden_state, encoded.attention_mask)
        return BaseModelOutputWithPooling(last_hidden_state=encoded.last_hidden_state, pooler_output=pieces)

    def _connected(self, name: str, states: Tensor, mask: Tensor | None = None) -> Any:
        """Tokens of the decoder from the states of a tower, as `pooler_output` holds them."""
        if name == "image":
            return self.vision_connector(states)
        tokens, mask = self.audio_connector(states, mask)
        # Without any clip the empty tensor, which keeps the connector in the graph.
        return [row[keep] for row, keep in zip(tokens, mask.bool(), strict=True)] or tokens

    def _placeholders(self) -> dict[str, int | None]:
        return {row.name: getattr(self.config, row.token_id) for row in ENCODED}

    def modality_ids(self, input_ids: Tensor | None, inputs_embeds: Tensor | None = None) -> Tensor:
        """`mm_token_type_ids` `(B, S)` from the placeholder tokens, for callers that did not give them."""
        given = input_ids if inputs_embeds is None else inputs_embeds
        if given is None:
            raise ValueError("give input_ids or inputs_embeds")
        modality_BS = torch.zeros(given.shape[:2], dtype=torch.long, device=given.device)
        for name, token_id in self._placeholders().items():
            if token_id is None:
                continue
            if inputs_embeds is None:
                found = given == token_id
            else:
                # As transformers' multimodal models find placeholders in embeddings.
                found = (inputs_embeds == self.language_model.embed_tokens.weight[token_id]).all(dim=-1)
            modality_BS = modality_BS.masked_fill(found, MODALITY_IDS[name])
        return modality_BS

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        input_features: torch.FloatTensor | None = None,
        input_features_mask: Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[DecoderKwargs],
    ) -> ChorusModelOutput:
        """Encode, merge and decode.

        Args:
            mm_token_type_ids: `(B, S)`, 0 text, 1 image, 3 audio; derived from the placeholder tokens if None.
            pixel_values: images of the whole batch in the order of their placeholders, `(images, C, H, W)`.
            input_features, input_features_mask: clips of the whole batch in order, see `get_audio_features`.
            mm_encoder_outputs: outputs of `get_image_features` ("image") and `get_audio_features` ("audio") computed
                earlier, instead of the raw inputs. One without `pooler_output`, as towers return it, goes through the
                connector.

        Raises:
            ValueError: placeholders and features do not match, naming the sample and both numbers.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if mm_token_type_ids is None:
            if inputs_embeds is not None:
                logger.warning_once(
                    "inputs_embeds without mm_token_type_ids: image and audio tokens are found only where the "
                    "embedding equals that of a placeholder; pass mm_token_type_ids for merged embeddings"
                )
            mm_token_type_ids = self.modality_ids(input_ids, inputs_embeds)
        mm_token_type_ids = with_virtual_tokens(mm_token_type_ids, inputs_embeds)
        features, idle = self._encode(pixel_values, input_features, input_features_mask, mm_encoder_outputs or {})
        embeds: Tensor | None = inputs_embeds
        if embeds is None:
            embeds = self.get_input_embeddings()(self._text_ids(input_ids))
        embeds = self._merge(embeds, input_ids, mm_token_type_ids, features)
        for zero in idle:
            # Adds nothing but an edge of the graph from the loss to the idle encoder.
            embeds = embeds + zero.to(embeds)

        outputs = self.language_model(
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            mm_token_type_ids=mm_token_type_ids,
            use_cache=use_cache,
            **kwargs,
        )
        outputs.image_hidden_states = features.get("image")
        outputs.audio_hidden_states = features.get("audio")
        return outputs

    def _text_ids(self, input_ids: Any) -> Tensor:
        """Token ids with the placeholders, whose embeddings will be replaced, turned into token 0."""
        for token_id in (self.config.image_token_id, self.config.audio_token_id):
            if token_id is not None:
                input_ids = input_ids.masked_fill(input_ids == token_id, 0)
        return input_ids

    def _encode(
        self,
        pixel_values: Tensor | None,
        input_features: Tensor | None,
        input_features_mask: Tensor | None,
        encoded: dict[str, BaseModelOutputWithPooling],
    ) -> tuple[dict[str, Any], list[Tensor]]:
        """Image and audio tokens by modality, each a tensor or list whose entries are the tokens of one input, and
        zeros that connect the encoders which the batch did not use to the graph."""
        # In training every encoder runs exactly once, on the smallest input times zero where the batch has none of its
        # modality: a rank without pictures would send no gradients for their encoder, and the others wait for ever.
        # Images come first on every rank, idle or not: ranks that gather shards in different orders deadlock, too.
        for name, raw in (("image", pixel_values), ("audio", input_features)):
            if raw is not None and encoded.get(name) is not None:
                raise ValueError(f"got raw {name} inputs and mm_encoder_outputs for {name}; give one of them")
        features = {}
        for name, output in encoded.items():
            if output is not None:
                pooled, mask = (getattr(output, key, None) for key in ("pooler_output", "attention_mask"))
                features[name] = self._connected(name, output.last_hidden_state, mask) if pooled is None else pooled
        idle = []
        for name, tower, encode, inputs in (
            ("image", self.vision_tower, self.get_image_features, (pixel_values,)),
            ("audio", self.audio_tower, self.get_audio_features, (input_features, input_features_mask)),
        ):
            if inputs[0] is not None and len(inputs[0]):
                features[name] = encode(*inputs).pooler_output
            elif self.training and tower is not None and name not in features:
                with frozen_batch_norm(tower):
                    pieces = encode(tower.smallest_input()).pooler_output
                idle.append((torch.cat(list(pieces)) * 0.0).sum())
        return features, idle

    def _merge(self, embeds: Tensor, input_ids: Tensor | None, modality_BS: Tensor, features: dict[str, Any]) -> Tensor:
        """Put image and audio tokens in the place of their placeholders."""
        for name, token_id in self._placeholders().items():
            if token_id is None:
                continue
            mask_BS = modality_BS == MODALITY_IDS[name] if input_ids is None else input_ids == token_id
            pieces = features.get(name)
            if not torch.compiler.is_compiling() and (pieces is not None or input_ids is not None):
                sizes = [len(piece) for piece in pieces] if pieces is not None else []
                # Reading the counts waits for the device, and a graph cannot.
                check_placeholders(mask_BS.sum(dim=-1).tolist(), sizes, name)
            if pieces is not None:
                tokens = pieces.flatten(0, 1) if isinstance(pieces, Tensor) else torch.cat(list(pieces))
                tokens = tokens.to(embeds.device, embeds.dtype)
                # Fills the places in the order of samples, which is that of the pieces.
                embeds = embeds.masked_scatter(mask_BS.unsqueeze(-1).to(embeds.device), tokens)
                features[name] = pieces if isinstance(pieces, Tensor) else tokens
        return embeds


def with_virtual_tokens(modality_BS: Tensor, inputs_embeds: Tensor | None) -> Tensor:
    """`mm_token_type_ids` of embeddings with virtual tokens in front, as PEFT puts them there: they are text."""
    missing = 0 if inputs_embeds is None else inputs_embeds.shape[1] - modality_BS.shape[1]
    return nn.functional.pad(modality_BS, (missing, 0)) if missing > 0 else modality_BS


def no_graph_if_frozen(tower: nn.Module, inputs: Tensor) -> torch.set_grad_enabled:
    """A frozen encoder keeps no activations, also where checkpointing makes its first layer want gradients."""
    is_trained = inputs.requires_grad or any(parameter.requires_grad for parameter in tower.parameters())
    return torch.set_grad_enabled(torch.is_grad_enabled() and is_trained)


# These are classes, since a compiled graph cannot run through the generator of a context.
class all_loaded:
    """Holds all weights of a tower that accelerate has offloaded. Each module's are loaded when it is called, but timm
    and torch read some of a module that nobody calls, such as the output projection of attention."""

    def __init__(self, tower: nn.Module):
        hooks = ((module, getattr(module, "_hf_hook", None)) for module in tower.modules())
        self.hooks = [(module, hook) for module, hook in hooks if hook is not None]

    def __enter__(self) -> None:
        for module, hook in self.hooks:
            hook.pre_forward(module)

    def __exit__(self, *exception: object) -> None:
        for module, hook in self.hooks:
            hook.post_forward(module, None)


class frozen_batch_norm:
    """Keeps an idle encoder's input out of its running statistics."""

    def __init__(self, module: nn.Module):
        plain = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
        self.norms = [m for m in module.modules() if isinstance(m, plain) and m.training]

    def __enter__(self) -> None:
        for norm in self.norms:
            norm.training = False

    def __exit__(self, *exception: object) -> None:
        for norm in self.norms:
            norm.training = True
