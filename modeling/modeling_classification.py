"""Sequence classification: one label for a text with its images and clips, also from a layer in the middle."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from .configuration_chorus import ChorusConfig
from .early_exit import ExitRun, Exits, check_early_exit, pool_tokens
from .modeling_head import ChorusHead
from .modeling_outputs import ChorusLossOutput


class ChorusForSequenceClassification(ChorusHead):
    """A linear classifier (or regressor, see `problem_type`) on the pooled sequence, and one after each of
    `text_config.exit_layers`. With `config.exit_thresholds`, in evaluation, samples leave at the exits."""

    def __init__(self, config: ChorusConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.score = nn.Linear(config.text_config.hidden_size, config.num_labels, bias=False)
        self.exits = Exits(config.text_config, config.num_labels)
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
        output_exit_logits: bool = False,
        num_items_in_batch: Any = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ChorusLossOutput:
        """Inputs as in [`ChorusModel`]; `labels` are `(B,)` classes, or `(B, num_labels)` floats. Logits are
        `(B, num_labels)`, those of the exit where a sample left.

        Args:
            output_exit_logits: return the logits of every exit too; no sample leaves.

        Raises:
            ValueError: something was asked for that makes no sense while samples leave, see [`check_early_exit`].
        """
        exits = self._exit_run(input_ids, attention_mask, output_exit_logits, output_router_logits, kwargs)
        outputs, terms = self._run(
            output_router_logits,
            mm_token_type_ids,
            input_ids=input_ids,
            attention_mask=attention_mask,
            pixel_values=pixel_values,
            input_features=input_features,
            input_features_mask=input_features_mask,
            exits=exits,
            **kwargs,
        )
        leaves = exits is not None and exits.thresholds is not None
        if exits is not None and leaves:
            logits = exits.gather(self.score(exits.pooled(outputs.last_hidden_state)))
        else:
            is_causal = self.config.text_config.is_causal
            logits = self.score(pool_tokens(outputs.last_hidden_state, attention_mask, is_causal))
        exit_logits = None if exits is None or leaves else tuple(exits.logits.values())
        loss = exit_loss = None
        if labels is not None:
            loss, exit_loss = self._losses(logits, exit_logits, labels)
            share: Tensor | float = 1.0
            if num_items_in_batch is not None:
                share = len(labels) / num_items_in_batch
                loss = loss * share
            loss = loss + self._weighted_sum(terms, share)
            if self.training and exit_loss is not None:
                loss = loss + share * self.config.text_config.exit_loss_coef * exit_loss
        return ChorusLossOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            image_hidden_states=outputs.image_hidden_states,
            audio_hidden_states=outputs.audio_hidden_states,
            exit_loss=exit_loss,
            exit_logits=exit_logits if output_exit_logits else None,
            left_after=exits.left_after.to(logits.device) if exits is not None and leaves else None,
            compute=outputs.compute,
            **terms,
        )

    def _exit_run(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        output_exit_logits: bool,
        output_router_logits: bool | None,
        kwargs: dict[str, Any],
    ) -> ExitRun | None:
        """What this forward does at the exits; None if nothing."""
        if output_exit_logits and not self.exits:
            raise ValueError("output_exit_logits=True, but the model has no exits: add_exits adds them")
        thresholds = None if self.training or output_exit_logits else self.config.exit_thresholds
        if not self.exits or (thresholds is None and not (self.training or output_exit_logits)):
            return None
        if thresholds is not None:
            asked = kwargs | {"output_router_logits": output_router_logits}
            check_early_exit(self.config, attention_mask, asked)
            kwargs["use_cache"] = False
        tokens = kwargs["inputs_embeds"] if input_ids is None else input_ids
        text = self.config.text_config
        return ExitRun(
            self.exits, thresholds, attention_mask, len(tokens), text.num_hidden_layers, is_causal=text.is_causal
        )

    def _losses(
        self, logits: Tensor, exit_logits: tuple[Tensor, ...] | None, labels: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The loss of the head, and the mean loss of the exits where all of them answered."""
        loss = self.loss_function(pooled_logits=logits, labels=labels, config=self.config)
        if exit_logits is None:
            return loss, None
        of_exits = [self.loss_function(pooled_logits=part, labels=labels, config=self.config) for part in exit_logits]
        return loss, torch.stack([part.to(loss.device) for part in of_exits]).mean()
