"""The generative head: text, images and sound in, text out."""

from collections.abc import Collection, Mapping
from copy import copy
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, logging

from .attention_masks import build_masks
from .configuration_chorus import ChorusConfig
from .depth_exits import EarlyExitDrafts, check_drafts
from .losses import share_of_batch
from .modeling_heads import ChorusHead
from .modeling_outputs import ChorusLossOutput

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
            # A generated placeholder would stand for an image or a clip that nobody gave.
            self.generation_config.suppress_tokens = media

    def train(self, mode: bool = True) -> "ChorusForConditionalGeneration":
        """Training mode; warns once about trained experts that labels on text alone cannot reach."""
        super().train(mode)
        layer, names = self.unreached_banks() if mode else (0, [])
        if names:
            logger.warning_once(
                f"expert banks {names} of layer {layer}: no later layer reads image and audio positions, so the labels "
                "of an answer give these experts no gradient and training them is time spent for nothing. Give the "
                f"banks `layers` without {layer} in the configuration, or keep their experts in it frozen"
            )
        return self

    def unreached_banks(self) -> tuple[int, list[str]]:
        """The last layer, and its banks that have trained experts (or a LoRA on them) but take no text."""
        layer = self.config.text_config.num_hidden_layers - 1
        banks = getattr(self.model.language_model.layers[layer].mlp, "banks", {})
        return layer, [
            name
            for name, bank in banks.items()
            if "text" not in bank.modalities and any(p.requires_grad for p in bank.experts.parameters())
        ]

    def get_image_features(self, pixel_values: torch.FloatTensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        return self.model.get_image_features(pixel_values, **kwargs)

    def get_audio_features(
        self, input_features: torch.FloatTensor, input_features_mask: Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        return self.model.get_audio_features(input_features, input_features_mask, **kwargs)

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
        complexity_scores: Tensor | None = None,
        expert_budget: Mapping[str, int] | None = None,
        sample_experts: Collection[str] | None = None,
        closed_banks: Collection[str] | None = None,
        skip_threshold: float | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ChorusLossOutput:
        """Inputs as in [`ChorusModel`].

        Args:
            labels: `(B, S)`, token ids, -100 where nothing is to be learned. A batch without any label has loss 0.
            output_router_logits: also return the routing of every layer, and the balance loss and z-loss.
            logits_to_keep: compute logits for the last so many positions only; 0 for all.
            complexity_scores, expert_budget, sample_experts, closed_banks: options of the routers and banks, see
                [`ChorusTextModel`]. In `generate`, `complexity_scores` are those of the prompt; generated tokens use
                the router's entropy.
            skip_threshold: see [`ChorusTextModel`]; `generate` also reads it from `generation_config`.

        Returns:
            [`ChorusLossOutput`]; in training `loss` holds the weighted auxiliary terms, in evaluation it never does.
        """
        num_items = kwargs.pop("num_items_in_batch", None)
        train_exits = self.training and labels is not None and self.config.text_config.exit_loss_coef > 0
        keep_hidden_states = kwargs.get("output_hidden_states", self.config.text_config.output_hidden_states)
        if train_exits:
            kwargs["output_hidden_states"] = True
        outputs, terms = self._run(
            output_router_logits,
            mm_token_type_ids,
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
            complexity_scores=complexity_scores,
            expert_budget=expert_budget,
            sample_experts=sample_experts,
            closed_banks=closed_banks,
            skip_threshold=skip_threshold,
            **kwargs,
        )
        self._refuse_lost_losses(labels, num_items, terms)
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            # At least 1: a batch without any label has loss 0, not 0 / 0.
            counted = torch.as_tensor((labels[..., 1:] != -100).sum() if num_items is None else num_items).clamp(min=1)
            loss = self._language_loss(logits, labels, counted, **kwargs)
            loss = loss + self._weighted_sum(terms, share_of_batch(labels, num_items))
            if train_exits:
                terms["exit_loss"] = self._exit_loss(outputs.hidden_states, labels, counted, **kwargs)
                loss = loss + self.config.text_config.exit_loss_coef * terms["exit_loss"]
        return ChorusLossOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states if keep_hidden_states else None,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            image_hidden_states=outputs.image_hidden_states,
            audio_hidden_states=outputs.audio_hidden_states,
            compute=outputs.compute,
            **terms,  # type: ignore[arg-type]
        )

    def _language_loss(self, logits: Tensor, labels: Tensor, counted: Tensor, **kwargs: Any) -> Tensor:
        vocab_size = self.config.text_config.vocab_size
        return self.loss_function(logits, labels, vocab_size=vocab_size, num_items_in_batch=counted, **kwargs)

    def _exit_loss(self, hidden_states: tuple[Tensor, ...], labels: Tensor, counted: Tensor, **kwargs: Any) -> Tensor:
        """Mean of the language losses at the exits, through the final norm and the head (LayerSkip, arXiv
        2404.16710)."""
        states = [hidden_states[layers] for layers in self.config.text_config.exit_layers]
        norm = self.model.language_model.norm
        losses = [self._language_loss(self.lm_head(norm(state)), labels, counted, **kwargs) for state in states]
        return torch.stack(losses).mean()

    def create_masks_for_generate(self, config: Any, attention_mask: Tensor | None, **inputs: Any) -> Any:
        """For caches that can be compiled: what the decoder would make of the mask. A prefill is never compiled, and
        the decoder, which finds padding in the mask, makes its own."""
        if inputs["inputs_embeds"].shape[1] > 1:
            return attention_mask
        names = ("inputs_embeds", "past_key_values", "position_ids")
        text = config.get_text_config()
        return build_masks(text, attention_mask=attention_mask, **{name: inputs.get(name) for name in names})

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
        it."""
        if generation_config.assistant_early_exit is not None:
            return EarlyExitDrafts(self, generation_config, logits_processor)
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
        check_drafts(generation_config, self.config.text_config.num_hidden_layers)
        skip_threshold = getattr(generation_config, "skip_threshold", None)
        if skip_threshold is not None:
            model_kwargs["skip_threshold"] = skip_threshold
        return generation_config, model_kwargs

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, next_sequence_length: int | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Complexity scores of the tokens that this step feeds: the prompt's own, and NaN for what was generated.
        Drafts are text, also where the prompt before them ends with an image."""
        scores = kwargs.pop("complexity_scores", None)
        modality_BS = kwargs.get("mm_token_type_ids")
        if modality_BS is not None and modality_BS.shape[1] < input_ids.shape[1]:
            kwargs["mm_token_type_ids"] = F.pad(modality_BS, (0, input_ids.shape[1] - modality_BS.shape[1]))
        inputs = super().prepare_inputs_for_generation(input_ids, next_sequence_length, **kwargs)
        if scores is not None:
            cache, fed = inputs.get("past_key_values"), inputs.get("inputs_embeds")
            start = int(cache.get_seq_length()) if cache is not None else 0
            stop = start + (inputs["input_ids"] if fed is None else fed).shape[1]
            scores = F.pad(scores.float(), (0, max(0, stop - scores.shape[1])), value=torch.nan)
            inputs["complexity_scores"] = scores[:, start:stop]
        return inputs

    def _maybe_prepare_encoder_kwargs_for_generation(
        self, inputs_tensor: Tensor, model_kwargs: dict[str, Any], model_input_name: str | None, generation_config: Any
    ) -> dict[str, Any]:
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
        if audio is None or input_ids is None or input_ids.numel() == 0:
            return mm_encoder_output
        pieces = list(audio.pooler_output)
        ends = list(accumulate(len(piece) for piece in pieces))
        wanted = accumulate((input_ids == self.config.audio_token_id).sum(dim=-1).tolist())
        stops = [ends.index(total) + 1 if total else 0 for total in wanted]
        starts = [0, *stops[:-1]]
        audio.pooler_output = [p for a, b in zip(starts, stops, strict=True) for p in pieces[a:b] * expand_size]
        return mm_encoder_output
