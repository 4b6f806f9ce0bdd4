"""The generative head: text, images and sound in, text out."""

from collections.abc import Mapping
from copy import copy
from inspect import signature
from itertools import accumulate
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.processing_utils import Unpack
from transformers.utils import can_return_tuple, logging

from .attention_masks import Masks, build_masks
from .configuration_chorus import ChorusConfig
from .configuration_modalities import MODALITY_IDS
from .configuration_services import SERVICES, service
from .depth_exits import TokenExits, check_token_exits
from .losses import share_of_batch
from .modeling_heads import ChorusHead
from .modeling_outputs import CACHE, ChorusLossOutput, takes_cache
from .moe_plan import DecoderKwargs

logger = logging.get_logger(__name__)
# By this table the Trainer's label smoother decides whether labels are shifted: without it a model learns to repeat.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault(ChorusConfig.model_type, "ChorusForConditionalGeneration")


class ChorusForConditionalGeneration(ChorusHead, GenerationMixin):
    """Text, images and sound in; text out."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: ChorusConfig):
        super().__init__(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()
        # Of a configuration marked as derived, transformers drops entries of our own (`skip_threshold`) on loading.
        self.generation_config._from_model_config = False
        media = [i for i in (config.image_token_id, config.audio_token_id) if i is not None]
        if media and self.generation_config.suppress_tokens is None:
            # A generated placeholder would stand for an image or a clip that does not exist.
            self.generation_config.suppress_tokens = media

    def __setattr__(self, name: str, value: Any) -> None:
        """The trainers of TRL put a forward of their own into the model, which is given our losses."""
        if name == "forward" and "fused_lm_head" in getattr(getattr(value, "__code__", None), "co_varnames", ()):
            value = MethodType(service("with_own_losses", "a forward of TRL")(value.__func__), self)
        super().__setattr__(name, value)

    def get_image_features(self, pixel_values: torch.FloatTensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        return self.model.get_image_features(pixel_values, **kwargs)

    def get_audio_features(
        self, input_features: torch.FloatTensor, input_features_mask: Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        return self.model.get_audio_features(input_features, input_features_mask, **kwargs)

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        mm_token_type_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        input_features: torch.FloatTensor | None = None,
        input_features_mask: Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        exit_confidence: float | None = None,
        **kwargs: Unpack[DecoderKwargs],
    ) -> ChorusLossOutput:
        """Inputs as in [`ChorusModel`].

        Args:
            labels: `(B, S)`, token ids, -100 where nothing is to be learned. A batch without any label has loss 0.
            output_router_logits: also return the routing of every layer, and the balance loss and z-loss.
            logits_to_keep: compute logits for the last positions only, this many; 0 for all.
            exit_confidence: with a cache, a single new token leaves at the first of the `exit_layers` whose answer is
                more probable than this, see [`TokenExits`]. `generate` also reads it from `generation_config`.
            kwargs: what this call asks of routers, banks and skip gates, see [`DecoderKwargs`].

        Returns:
            [`ChorusLossOutput`]; in training `loss` holds the weighted auxiliary terms, in evaluation it never does.
        """
        num_items = kwargs.pop("num_items_in_batch", None)
        train_exits = self.training and labels is not None and self.config.text_config.exit_loss_coef > 0
        keep_hidden_states = kwargs.get("output_hidden_states", self.config.text_config.output_hidden_states)
        if train_exits:
            # Exits read the states between layers; the caller gets them only if asked for.
            kwargs["output_hidden_states"] = True
        token_exits = None
        if exit_confidence is not None:
            asked = kwargs | {"output_router_logits": output_router_logits}
            token_exits = self._token_exits(
                exit_confidence, input_ids if inputs_embeds is None else inputs_embeds, past_key_values, asked
            )
        outputs, terms = self._run(
            output_router_logits,
            mm_token_type_ids,
            **({} if token_exits is None else {"token_exits": token_exits}),
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            input_features=input_features,
            input_features_mask=input_features_mask,
            mm_encoder_outputs=mm_encoder_outputs,
            use_cache=use_cache,
            **kwargs,
        )
        self._refuse_lost_losses(labels, num_items, terms)
        # A look at the first batches, which a model without the package trains without.
        watch = SERVICES.get("watch_labels") if self.training and labels is not None else None
        if watch is not None and not torch.compiler.is_compiling():
            watch(self, input_ids, inputs_embeds, mm_token_type_ids, labels)
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            # At least 1: a batch without any label has loss 0, not 0 / 0.
            counted = torch.as_tensor((labels[..., 1:] != -100).sum() if num_items is None else num_items).clamp(min=1)
            loss = self._language_loss(logits, labels, counted, **kwargs)
            loss = loss + self._weighted_sum(terms, share_of_batch(labels, num_items))
            if train_exits and outputs.hidden_states is not None:
                terms["exit_loss"] = exit_loss = self._exit_loss(outputs.hidden_states, labels, counted, **kwargs)
                loss = loss + self.config.text_config.exit_loss_coef * exit_loss
        if not keep_hidden_states:
            outputs.hidden_states = None
        left_after = None if token_exits is None else token_exits.left_after
        return self._loss_output(outputs, terms, loss=loss, logits=logits, left_after=left_after)

    def _token_exits(
        self, threshold: float, tokens: Any, cache: Cache | None, asked: Mapping[str, Any]
    ) -> TokenExits | None:
        """Of a decoding step; None for a prompt, all of whose tokens run through all layers."""
        text, norm = self.config.text_config, self.model.language_model.norm
        check_token_exits(text, threshold, self.training, asked)
        if tokens.shape[1] > 1 or cache is None or cache.get_seq_length() == 0:
            return None
        return TokenExits(text, lambda hidden_BD: self.lm_head(norm(hidden_BD)), threshold, len(tokens))

    def _language_loss(self, logits: Tensor, labels: Tensor, counted: Tensor, **kwargs: Any) -> Tensor:
        vocab_size = self.config.text_config.vocab_size
        return self.loss_function(logits, labels, vocab_size=vocab_size, num_items_in_batch=counted, **kwargs)

    def _exit_loss(self, hidden_states: tuple[Tensor, ...], labels: Tensor, counted: Tensor, **kwargs: Any) -> Tensor:
        """Mean of the language losses at the exits, by the final norm and head (LayerSkip, arXiv 2404.16710)."""
        states = [hidden_states[layers] for layers in self.config.text_config.exit_layers or ()]
        # The shared norm and head, as at the end: drafts are made by them, too.
        norm = self.model.language_model.norm
        losses = [self._language_loss(self.lm_head(norm(state)), labels, counted, **kwargs) for state in states]
        return torch.stack(losses).mean()

    def create_masks_for_generate(
        self, config: PreTrainedConfig, attention_mask: Tensor | None, **inputs: Any
    ) -> Masks:
        """For caches that can be compiled: what the decoder would make of the mask. A prefill is never compiled, and
        the decoder, which finds padding in the mask, makes its own."""
        if inputs["inputs_embeds"].shape[1] > 1:
            return attention_mask
        text, embeds, positions = config.get_text_config(), inputs["inputs_embeds"], inputs.get("position_ids")
        return build_masks(text, embeds, attention_mask, inputs.get(CACHE), positions)

    def _get_candidate_generator(
        self,
        generation_config: Any,
        input_ids: Tensor,
        inputs_tensor: Tensor,
        logits_processor: Any,
        model_kwargs: dict[str, Any],
        **kwargs: Any,
    ) -> Any:
        """transformers' early exit writes the number of layers into the composite configuration, where nothing reads
        it. An assistant of another kind is given words alone; one of ours takes the media as this model encoded them.

        Raises:
            ValueError: an assistant of another width, with media; memory tokens, whose sums take no draft back.
        """
        if self.config.text_config.num_memory_tokens:
            raise ValueError(
                f"num_memory_tokens={self.config.text_config.num_memory_tokens}: a draft that is refused cannot be "
                "taken out of the memory again; generate without drafts"
            )
        if generation_config.assistant_early_exit is not None:
            draft = service("draft_with_first_layers", "assistant_early_exit")
            return draft(self, generation_config, logits_processor)
        assistant = kwargs.get("assistant_model")
        if assistant is not None and "mm_encoder_outputs" not in signature(assistant.forward).parameters:
            kept = model_kwargs.keys() - {"mm_token_type_ids", "mm_encoder_outputs"}
            model_kwargs = {name: model_kwargs[name] for name in kept}
        elif assistant is not None and model_kwargs.get("mm_encoder_outputs"):
            theirs, ours = (model.config.get_text_config().hidden_size for model in (assistant, self))
            if theirs != ours:
                raise ValueError(
                    f"assistant_model has hidden_size={theirs} and this model {ours}: images and sound are encoded "
                    "once for both. Choose one of the same width, or draft with assistant_early_exit"
                )
        return super()._get_candidate_generator(
            generation_config, input_ids, inputs_tensor, logits_processor, model_kwargs, **kwargs
        )

    def _prepare_generation_config(self, generation_config: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        if kwargs.get("labels") is not None:
            raise ValueError(
                "generate was given labels: the prompt holds the answer, so any score of it would be perfect. Prompts "
                "come from ChorusDataCollator(prompt_only=True); `evaluate_rows` scores answers"
            )
        generation_config, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        # transformers keeps unknown settings in the file but passes none of them to the model.
        for name in ("skip_threshold", "exit_confidence"):
            if (value := getattr(generation_config, name, None)) is not None:
                model_kwargs[name] = value
        threshold = model_kwargs.get("exit_confidence")
        if threshold is not None and not generation_config.use_cache:
            raise ValueError(f"exit_confidence={threshold} saves what a cache keeps; use_cache=False computes all anew")
        if generation_config.assistant_early_exit is not None:
            check = service("check_drafts", "assistant_early_exit")
            check(generation_config, self.config.text_config.num_hidden_layers, threshold)
        return generation_config, model_kwargs

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        """transformers knows the names in a signature; ours are in the type of its keywords."""
        known = DecoderKwargs.__optional_keys__
        super()._validate_model_kwargs({name: value for name, value in model_kwargs.items() if name not in known})

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Complexity scores of the tokens that this step feeds: the prompt's own, and NaN for what was generated.
        Drafts are text, also where the prompt before them ends with an image."""
        kwargs["inputs_embeds"] = inputs_embeds
        # An assistant's prefill is no first iteration to transformers, which would leave its media out.
        if next_sequence_length != 1 and kwargs.get("mm_encoder_outputs") and kwargs.get(CACHE) is not None:
            kwargs["is_first_iteration"] = kwargs.get("is_first_iteration") or kwargs[CACHE].get_seq_length() == 0
        scores = kwargs.pop("complexity_scores", None)
        modality_BS = kwargs.get("mm_token_type_ids")
        if modality_BS is not None and modality_BS.shape[1] < input_ids.shape[1]:
            kwargs["mm_token_type_ids"] = F.pad(modality_BS, (0, input_ids.shape[1] - modality_BS.shape[1]))
        inputs = super().prepare_inputs_for_generation(input_ids, next_sequence_length, **kwargs)
        if next_sequence_length and (types_BS := inputs.get("mm_token_type_ids")) is not None:
            inputs["mm_token_type_ids"] = types_BS[:, -next_sequence_length:]  # transformers 5.22 leaves them whole
        if scores is not None:
            cache, fed = inputs.get(CACHE), inputs.get("inputs_embeds")
            start = int(cache.get_seq_length()) if cache is not None else 0
            stop = start + (inputs["input_ids"] if fed is None else fed).shape[1]
            scores = F.pad(scores.float(), (0, max(0, stop - scores.shape[1])), value=torch.nan)
            inputs["complexity_scores"] = scores[:, start:stop]
        return inputs

    def _maybe_prepare_encoder_kwargs_for_generation(
        self, inputs_tensor: Tensor, model_kwargs: dict[str, Any], model_input_name: str | None, generation_config: Any
    ) -> dict[str, Any]:
        mask_BS = model_kwargs.get("attention_mask")
        if mask_BS is not None and mask_BS.ndim == 2 and not mask_BS[:, -1].all():
            raise ValueError(
                f"row {int(mask_BS[:, -1].argmin())} ends with padding, after which generation would go on; pad on the "
                'left (processor_kwargs={"padding_side": "left"})'
            )
        # Known from the start, so that generated tokens are text whatever they are.
        if model_kwargs.get("mm_token_type_ids") is None and not inputs_tensor.is_floating_point():
            model_kwargs["mm_token_type_ids"] = self.model.modality_ids(inputs_tensor)
        return super()._maybe_prepare_encoder_kwargs_for_generation(
            inputs_tensor, model_kwargs, model_input_name, generation_config
        )

    def _prepare_multimodal_encoder_kwargs_for_generation(self, model_kwargs: dict[str, Any]) -> dict[str, Any]:
        """transformers encodes images before prefill; sound is encoded here, so each input is encoded once.

        Beams repeat the outputs in place: the caller's own are copied first, without their tensors.
        """
        given = model_kwargs.get("mm_encoder_outputs") or {}
        model_kwargs["mm_encoder_outputs"] = {name: copy(output) for name, output in given.items()}
        model_kwargs = super()._prepare_multimodal_encoder_kwargs_for_generation(model_kwargs)
        input_features = model_kwargs.pop("input_features", None)
        input_features_mask = model_kwargs.pop("input_features_mask", None)
        if input_features is not None and len(input_features):
            if model_kwargs["mm_encoder_outputs"].get("audio") is not None:
                raise ValueError("got raw audio inputs and mm_encoder_outputs for audio; give one of them")
            model_kwargs["mm_encoder_outputs"]["audio"] = self.get_audio_features(input_features, input_features_mask)
        return model_kwargs

    def _expand_multimodal_outputs(
        self, input_ids: Tensor, mm_encoder_output: dict[str, Any], expand_size: int = 1, **kwargs: Any
    ) -> dict[str, Any]:
        """Repeat each sample's clips for its beams: the clips of a sample stay together, `[a, b]` -> `[a, b, a, b]`."""
        mm_encoder_output = super()._expand_multimodal_outputs(input_ids, mm_encoder_output, expand_size, **kwargs)
        audio = mm_encoder_output.get("audio")
        if audio is None:
            return mm_encoder_output
        pieces = list(audio.pooler_output)
        # The only record of whose clips are whose: placeholders of a sample and lengths of clips, summed in order.
        ends = list(accumulate(len(piece) for piece in pieces))
        ids = input_ids if input_ids is not None and input_ids.numel() else None
        is_placeholder: Any = self.model.modality_ids(ids, kwargs.get("inputs_embeds")) == MODALITY_IDS["audio"]
        wanted = accumulate(is_placeholder.sum(dim=-1).tolist())
        stops = [ends.index(total) + 1 if total else 0 for total in wanted]
        starts = [0, *stops[:-1]]
        audio.pooler_output = [p for a, b in zip(starts, stops, strict=True) for p in pieces[a:b] * expand_size]
        return mm_encoder_output
