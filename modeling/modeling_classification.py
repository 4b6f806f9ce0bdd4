"""Sequence classification: one label for a text with its images and clips."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from .configuration_chorus import ChorusConfig
from .modeling_head import ChorusHead
from .modeling_outputs import ChorusLossOutput


def pool_tokens(hidden_BSD: Tensor, attention_mask: Tensor | None, is_causal: bool) -> Tensor:
    """One vector a sample `(B, D)`: the last real token of a causal model, the mean of a bidirectional one."""
    if attention_mask is None:
        attention_mask = hidden_BSD.new_ones(hidden_BSD.shape[:2])
    mask_BS = attention_mask.to(hidden_BSD.device).bool()
    if is_causal:
        positions = torch.arange(mask_BS.shape[1], device=mask_BS.device)
        last_B = (positions * mask_BS).argmax(dim=-1)
        return hidden_BSD[torch.arange(len(hidden_BSD), device=hidden_BSD.device), last_B]
    weights = mask_BS.to(hidden_BSD.dtype)
    return (hidden_BSD * weights[..., None]).sum(dim=1) / weights.sum(dim=1, keepdim=True).clamp(min=1)


class ChorusForSequenceClassification(ChorusHead):
    """A linear classifier (or regressor, see `problem_type`) on the pooled sequence."""

    def __init__(self, config: ChorusConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.score = nn.Linear(config.text_config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        mm_token_type_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        input_features: torch.FloatTensor | None = None,
        input_features_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_router_logits: bool | None = None,
        num_items_in_batch: Any = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ChorusLossOutput:
        """Inputs as in [`ChorusModel`]; `labels` are `(B,)` classes, or `(B, num_labels)` floats. Logits are
        `(B, num_labels)`."""
        outputs, terms = self._run(
            output_router_logits,
            mm_token_type_ids,
            input_ids=input_ids,
            attention_mask=attention_mask,
            pixel_values=pixel_values,
            input_features=input_features,
            input_features_mask=input_features_mask,
            **kwargs,
        )
        is_causal = self.config.text_config.is_causal
        logits = self.score(pool_tokens(outputs.last_hidden_state, attention_mask, is_causal))
        loss = None
        if labels is not None:
            loss = self.loss_function(pooled_logits=logits, labels=labels, config=self.config)
            share: Tensor | float = 1.0
            if num_items_in_batch is not None:
                share = len(labels) / num_items_in_batch
                loss = loss * share
            loss = loss + self._weighted_sum(terms, share)
        return ChorusLossOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            image_hidden_states=outputs.image_hidden_states,
            audio_hidden_states=outputs.audio_hidden_states,
            **terms,
        )
