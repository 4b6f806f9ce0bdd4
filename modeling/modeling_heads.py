"""What all heads share (the inner model and its auxiliary losses), the classifier and the contrastive model.

Shape suffixes: B batch, S sequence, D hidden size.
"""

import math
from collections.abc import Sequence
from dataclasses import fields
from itertools import combinations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.processing_utils import Unpack
from transformers.utils import can_return_tuple, logging

from .configuration_chorus import ChorusConfig
from .configuration_modalities import MODALITY_IDS
from .depth_exits import ExitRun, Exits, check_early_exit, pool_tokens
from .losses import (
    CONTRASTIVE_LOSSES,
    alignment_loss,
    balance_loss,
    expert_budget_loss,
    mean_over_banks,
    rows_of_all_ranks,
    skip_budget_loss,
    with_sums,
    z_loss,
)
from .modeling_base import ChorusPreTrainedModel
from .modeling_chorus import ChorusModel, with_virtual_tokens
from .modeling_outputs import BankRouting, ChorusContrastiveOutput, ChorusLossOutput, ChorusModelOutput
from .moe_plan import DecoderKwargs

logger = logging.get_logger(__name__)
LOSS_OUTPUTS = tuple(field.name for field in fields(ChorusLossOutput))


def two_dimensional(attention_mask: object) -> Tensor | None:
    """The mask if it is `(B, S)`; masks of another form do not say which tokens are padding."""
    return attention_mask if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2 else None


# Term of the loss -> its weight in the configuration of the decoder.
LOSS_WEIGHTS = {
    "aux_loss": "router_aux_loss_coef",
    "z_loss": "router_z_loss_coef",
    "alignment_loss": "alignment_loss_coef",
    "skip_loss": "skip_loss_coef",
    "expert_budget_loss": "expert_budget_loss_coef",
    "exit_loss": "exit_loss_coef",
}


class ChorusHead(ChorusPreTrainedModel):
    """What all heads share: the inner model and its auxiliary losses."""

    accepts_loss_kwargs = True

    def __init__(self, config: ChorusConfig):
        super().__init__(config)
        self.model = ChorusModel(config)

    def _run(
        self, output_router_logits: bool | None, mm_token_type_ids: Tensor | None, **inputs: Any
    ) -> tuple[ChorusModelOutput, dict[str, Tensor | None]]:
        """The inner model's outputs and the unweighted auxiliary losses that were asked for."""
        text = self.config.text_config
        if output_router_logits is None:
            output_router_logits = text.output_router_logits
        train_router = self._trains_router()
        # Sampling is done for the log-probabilities, which are in the routing.
        keep_routing = bool(output_router_logits or inputs.get("sample_experts") or self._counts_choices())
        align = self.training and text.alignment_loss_coef > 0
        budget = text.skip_budget if self.training and text.skip_loss_coef > 0 else None
        outputs = self.model(
            mm_token_type_ids=mm_token_type_ids,
            output_router_logits=keep_routing or train_router,
            output_cross_modal_states=align,
            **({"output_skip_logits": True} if budget is not None else {}),
            **inputs,
        )
        terms: dict[str, Tensor | None] = dict.fromkeys(n for n in LOSS_WEIGHTS if n != "exit_loss")
        if output_router_logits or train_router:
            terms |= self._router_terms(outputs.routing)
        if inputs.get("sample_experts"):
            banks_of_layers = [bank for layer in outputs.routing for bank in layer.values()]
            drawn = [bank.log_probs for bank in banks_of_layers if bank.log_probs is not None]
            self._check_graph("policy-gradient", drawn, (".router.",))
        if align:
            embeds, states = inputs.get("inputs_embeds"), outputs.cross_modal_states or ()
            if mm_token_type_ids is None:
                mm_token_type_ids = self.model.modality_ids(inputs.get("input_ids"), embeds)
            modality_BS = with_virtual_tokens(mm_token_type_ids, embeds)
            terms["alignment_loss"] = self._alignment(states, modality_BS, inputs.get("attention_mask"))
        if budget is not None and outputs.skip_logits is not None:
            self._check_graph("skip budget", outputs.skip_logits, (".skip_gate.",))
            real_BS = two_dimensional(inputs.get("attention_mask"))
            terms["skip_loss"] = skip_budget_loss(outputs.skip_logits, real_BS, budget)
        # Recorded for the losses alone.
        if not keep_routing:
            outputs.routing = None
        return outputs, terms

    def _trains_router(self) -> bool:
        """Whether a term of the loss needs the routing."""
        text, banks = self.config.text_config, self.model.language_model.banks.values()
        return self.training and (
            text.router_z_loss_coef > 0
            or (text.router_aux_loss_coef > 0 and any(bank.has_balance_loss for bank in banks))
            or (text.expert_budget_loss_coef > 0 and any(bank.mean_experts is not None for bank in banks))
        )

    def _router_terms(self, routing: Sequence[dict[str, BankRouting]]) -> dict[str, Tensor | None]:
        banks = self.model.language_model.banks
        # With reentrant checkpointing routers would stop balancing in silence.
        if self._trains_router():
            logits = [bank.router_logits for layer in routing for bank in layer.values()]
            self._check_graph("balance", logits, (".router.",))
        routing = with_sums(routing, banks)
        return {
            "aux_loss": balance_loss(routing, banks),
            "z_loss": mean_over_banks(routing, z_loss),
            "expert_budget_loss": expert_budget_loss(routing, banks),
        }

    def _counts_choices(self) -> bool:
        """Whether the routing is needed to move a balance bias, whatever was asked for."""
        names = [name for name, bank in self.model.language_model.banks.items() if bank.balance == "bias"]
        if not (self.training and names):
            return False
        # Without gradients nothing is trained, so nothing has to be counted.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling() and self._lacks_observer():
            logger.warning_once(
                f"expert banks {names} are balanced by a bias that moves only if code that counts their choices "
                "calls `update_balance_bias` once per optimizer step. `RoutingCallback` of chorus_moe.training.routing "
                "does it for a Trainer (`chorus-moe train` adds it); nothing seems to do it here"
            )
        return True

    def _lacks_observer(self) -> bool:
        """Whether routers learn while no observer is attached to the decoder."""
        decoder = self.model.language_model
        # Observers hook the decoder, which runs once where checkpointed layers run twice.
        return not decoder._forward_hooks and any(
            parameter.requires_grad for name, parameter in decoder.named_parameters() if ".router." in name
        )

    def _alignment(
        self, states: Sequence[tuple[Tensor, Tensor]], modality_BS: Tensor, attention_mask: Tensor | None
    ) -> Tensor:
        """Mean over the cross-modal layers, given their rotated queries and keys."""
        text = self.config.text_config
        scaling, is_causal, kind = text.head_dim**-0.5, text.is_causal, text.alignment
        real_BS = two_dimensional(attention_mask)
        projections = tuple(
            f"layers.{i}.self_attn.{name}" for i in self.config.text_config.cross_modal_layers for name in ("q_", "k_")
        )
        self._check_graph("alignment", [query for query, _ in states], projections)
        if kind != "maps":
            # A window sees some of the pairs alone, and what no layer computes is not to be compared.
            cross_modal = sorted(set(text.cross_modal_layers))
            is_full = [text.layer_types[layer] == "full_attention" for layer in cross_modal]
            states = [state for state, full in zip(states, is_full, strict=True) if full]
        if not states:
            raise ValueError(
                f"alignment_loss_coef={text.alignment_loss_coef}: {kind!r} needs a cross-modal layer with full "
                f"attention; cross_modal_layers={text.cross_modal_layers}, layer_types={text.layer_types}"
            )
        layers = [alignment_loss(query, key, modality_BS, real_BS, scaling, is_causal, kind) for query, key in states]
        # Of a rank that holds some of the heads: its part of their mean, since gradients of ranks are summed.
        share = states[0][0].shape[1] / text.num_attention_heads
        loss = torch.stack([layer.to(layers[0].device) for layer in layers]).mean()
        return loss if share == 1 else loss * share

    def _check_graph(self, term: str, sources: list[Tensor], trained: tuple[str, ...]) -> None:
        """Refuse a loss term whose sources have no graph although parameters with these names are trained."""
        if not (self.training and torch.is_grad_enabled()) or any(source.requires_grad for source in sources):
            return
        named = list(self.model.named_parameters())
        own = [name for name, _ in named if any(part in name for part in trained)]
        if not own:  # a model of dense layers alone has no router
            return
        # A source is computed from its own part and from all that lies before the last layer which has one: towers,
        # embeddings and layers, in this order.
        last = own[-1][: own[-1].index(".", own[-1].index(".layers.") + len(".layers.")) + 1]
        before = [name for name, _ in named[: next(i for i, (name, _) in enumerate(named) if name.startswith(last))]]
        if any(parameter.requires_grad and name in {*own, *before} for name, parameter in named):
            raise RuntimeError(
                f"the {term} loss would have no gradient: activation checkpointing runs with use_reentrant=True, which "
                "hides what it is computed from; use activation_checkpointing_kwargs={'use_reentrant': False}"
            )

    def _refuse_lost_losses(self, labels: Tensor | None, num_items: Any, terms: dict[str, Tensor | None]) -> None:
        """Refuse a training step of a trainer that keeps the labels for a loss of its own and drops all of ours."""
        if not self.training or labels is not None or num_items is None:
            return
        text = self.config.text_config
        lost = [name for name, value in terms.items() if value is not None and getattr(text, LOSS_WEIGHTS[name]) > 0]
        lost += ["exit_loss"] if text.exit_loss_coef > 0 else []
        if lost:
            raise ValueError(
                f"the trainer keeps the labels for itself (label_smoothing_factor, or compute_loss_func), so {lost} "
                "would not be learned. For smoothing call `smooth_labels(trainer)` of "
                "chorus_moe.training.label_smoothing; with a loss of your own set their coefficients to 0, or add them "
                "to it and set `model.accepts_loss_kwargs = False` before you build the trainer"
            )

    @staticmethod
    def _loss_output(outputs: ChorusModelOutput, terms: dict[str, Tensor | None], **own: Any) -> ChorusLossOutput:
        """What the inner model returned, the terms of the loss and what is the head's `own`, which wins."""
        shared = {name: getattr(outputs, name, None) for name in LOSS_OUTPUTS}
        return ChorusLossOutput(**shared | terms | own)

    def _weighted_sum(self, terms: dict[str, Tensor | None], share: Tensor | float) -> Tensor | float:
        """What training adds to the loss of the head; nothing in evaluation."""
        # transformers adds its balance loss whenever router logits are asked for, also in evaluation.
        if not self.training:
            return 0.0
        weights = {name: getattr(self.config.text_config, LOSS_WEIGHTS[name]) for name in terms}
        added = [weights[name] * term for name, term in terms.items() if term is not None and weights[name] > 0]
        return share * sum(added) if added else 0.0


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
        inputs_embeds: torch.FloatTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        output_router_logits: bool | None = None,
        output_exit_logits: bool = False,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Unpack[DecoderKwargs],
    ) -> ChorusLossOutput:
        """Inputs as in [`ChorusModel`]; `labels` are `(B,)` classes, or `(B, num_labels)` floats. Logits are
        `(B, num_labels)`, those of the exit where a sample left.

        Args:
            output_exit_logits: return the logits of every exit too; no sample leaves.

        Raises:
            ValueError: something was asked for that makes no sense while samples leave, see [`check_early_exit`].
        """
        kwargs |= {"inputs_embeds": inputs_embeds, "position_ids": position_ids}
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
        self._refuse_lost_losses(labels, num_items_in_batch, terms)
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
                # The Trainer sums micro-batches, so each counts by its samples.
                share = len(labels) / num_items_in_batch
                loss = loss * share
            loss = loss + self._weighted_sum(terms, share)
            if self.training and exit_loss is not None:
                loss = loss + share * self.config.text_config.exit_loss_coef * exit_loss
        return self._loss_output(
            outputs,
            terms,
            loss=loss,
            logits=logits,
            exit_loss=exit_loss,
            exit_logits=exit_logits if output_exit_logits else None,
            left_after=exits.left_after.to(logits.device) if exits is not None and leaves else None,
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
        # In training every exit answers every sample, so that all are trained on all.
        thresholds = None if self.training or output_exit_logits else self.config.exit_thresholds
        if not self.exits or (thresholds is None and not (self.training or output_exit_logits)):
            return None
        if thresholds is not None:
            asked = kwargs | {"output_router_logits": output_router_logits}
            check_early_exit(self.config, attention_mask, asked)
            # Later layers would cache nothing of the samples that left.
            kwargs["use_cache"] = False
        tokens = kwargs["inputs_embeds"] if input_ids is None else input_ids
        return ExitRun(self.exits, thresholds, attention_mask, len(tokens), self.config.text_config)

    def _losses(
        self, logits: Tensor, exit_logits: tuple[Tensor, ...] | None, labels: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The loss of the head, and the mean loss of the exits where all of them answered."""
        loss = self.loss_function(pooled_logits=logits, labels=labels, config=self.config)
        if exit_logits is None:
            return loss, None
        of_exits = [self.loss_function(pooled_logits=part, labels=labels, config=self.config) for part in exit_logits]
        return loss, torch.stack([part.to(loss.device) for part in of_exits]).mean()


Routing = tuple[dict[str, BankRouting], ...]


class ChorusForContrastive(ChorusHead):
    """One unit vector a modality, trained with `config.contrastive_loss` over all pairs of modalities.

    Each modality runs through the decoder alone, so a vector can be computed and indexed without its partners. In
    training the rows of all ranks are each other's negatives, and routers learn from each run as from a batch.
    """

    def __init__(self, config: ChorusConfig):
        super().__init__(config)
        hidden_size = config.text_config.hidden_size
        self.projections = nn.ModuleDict(
            {name: nn.Linear(hidden_size, config.projection_dim, bias=False) for name in config.modalities}
        )
        self.logit_scale = nn.Parameter(torch.tensor(0.0))
        if config.contrastive_loss == "sigmoid":
            self.logit_bias = nn.Parameter(torch.tensor(0.0))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self and self.config.contrastive_loss == "sigmoid":
            # Where SigLIP starts: most pairs do not belong together. CLIP starts at a temperature of 0.07.
            init.constant_(self.logit_scale, math.log(10))
            init.constant_(self.logit_bias, -10.0)
        elif module is self:
            init.constant_(self.logit_scale, 2.6592)

    def _embed(self, name: str, hidden_BSD: Tensor, mask_BS: Tensor | None) -> Tensor:
        pooled = pool_tokens(hidden_BSD, mask_BS, self.config.text_config.is_causal)
        return F.normalize(self.projections[name](pooled), dim=-1)

    def _decode(self, name: str, mask_BS: Tensor | None, **inputs: Any) -> tuple[Tensor, Routing]:
        """Unit vectors, and the routing if it was asked for."""
        decoded = self.model.language_model(attention_mask=mask_BS, **inputs)
        return self._embed(name, decoded.last_hidden_state, mask_BS), decoded.routing or ()

    def _decode_tokens(self, name: str, tokens_BSD: Tensor, mask_BS: Tensor, **kwargs: Any) -> tuple[Tensor, Routing]:
        # Features stand without placeholders, so there are no token ids to tell the modality from.
        modality_BS = torch.full(tokens_BSD.shape[:2], MODALITY_IDS[name], device=tokens_BSD.device)
        return self._decode(name, mask_BS, inputs_embeds=tokens_BSD, mm_token_type_ids=modality_BS, **kwargs)

    def _decode_images(self, pixel_values: Tensor, **kwargs: Any) -> tuple[Tensor, Routing]:
        tokens = self.model.get_image_features(pixel_values).pooler_output
        mask = torch.ones_like(tokens[..., 0], dtype=torch.long)
        return self._decode_tokens("image", tokens, mask, **kwargs)

    def _decode_audio(
        self, input_features: Tensor, input_features_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Routing]:
        pieces = self.model.get_audio_features(input_features, input_features_mask).pooler_output
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(p[:, 0], dtype=torch.long) for p in pieces], True)
        return self._decode_tokens("audio", nn.utils.rnn.pad_sequence(pieces, True), mask, **kwargs)

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Unit vectors `(B, projection_dim)` of texts without placeholders."""
        return self._decode("text", attention_mask, input_ids=input_ids, **kwargs)[0]

    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> Tensor:
        """Unit vectors `(images, projection_dim)`."""
        return self._decode_images(pixel_values, **kwargs)[0]

    def get_audio_features(
        self, input_features: Tensor, input_features_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """Unit vectors `(windows, projection_dim)`."""
        return self._decode_audio(input_features, input_features_mask, **kwargs)[0]

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        input_features: torch.FloatTensor | None = None,
        input_features_mask: Tensor | None = None,
        mm_token_type_ids: torch.LongTensor | None = None,
        return_loss: bool = True,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Unpack[DecoderKwargs],
    ) -> ChorusContrastiveOutput:
        """Embed what is given; row i of every modality belongs together.

        Args:
            input_ids, attention_mask: `(B, S)`, texts without placeholders.
            pixel_values: `(B, C, H, W)`, one image a sample.
            input_features, input_features_mask: `(B, frames, mel bins)` and `(B, frames)`, one clip a sample.
            mm_token_type_ids: `(B, S)`, as the processor makes them: all 0.

        Raises:
            ValueError: the modalities given have different numbers of rows, or a text has a placeholder.
        """
        if kwargs.pop("output_compute", False):
            raise ValueError("output_compute=True is for models that run once a forward; this one runs once a modality")
        if self._counts_choices() or self._trains_router():
            kwargs["output_router_logits"] = True
        decoded: dict[str, tuple[Tensor, Routing]] = {}
        if input_ids is not None:
            modality_BS = self.model.modality_ids(input_ids) if mm_token_type_ids is None else mm_token_type_ids
            if not torch.compiler.is_compiling() and modality_BS.any():
                sample = int(modality_BS.any(dim=1).int().argmax())
                raise ValueError(
                    f"sample {sample}: {int(modality_BS[sample].count_nonzero())} tokens of its text stand for an "
                    "image or a clip; here each modality is embedded alone, so the text goes without placeholders"
                )
            decoded["text"] = self._decode("text", attention_mask, input_ids=input_ids, **kwargs)
        if pixel_values is not None:
            decoded["image"] = self._decode_images(pixel_values, **kwargs)
        if input_features is not None:
            decoded["audio"] = self._decode_audio(input_features, input_features_mask, **kwargs)
        embeds = {name: vectors for name, (vectors, _) in decoded.items()}
        routing = tuple(layer for _, layers in decoded.values() for layer in layers)
        sizes = {name: len(vectors) for name, vectors in embeds.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"contrastive batches need one row of each modality a sample, got {sizes}")

        # Evaluation may run on some of the ranks alone.
        rows = {n: rows_of_all_ranks(v, self.tp_size or 1) for n, v in embeds.items()} if self.training else embeds
        # CLIP clips the temperature at 100, which keeps training stable.
        scale, bias = self.logit_scale.exp().clamp(max=100.0), getattr(self, "logit_bias", 0.0)
        logits = {f"{a}-{b}": rows[a] @ rows[b].T * scale + bias for a, b in combinations(rows, 2)}
        loss = None
        if logits and return_loss:
            pair_loss = CONTRASTIVE_LOSSES[self.config.contrastive_loss]
            loss = torch.stack([pair_loss(scores) for scores in logits.values()]).mean()
            if self._trains_router():
                loss = loss + self._weighted_sum(self._router_terms(routing), 1.0)
        return ChorusContrastiveOutput(
            loss=loss,
            text_embeds=embeds.get("text"),
            image_embeds=embeds.get("image"),
            audio_embeds=embeds.get("audio"),
            logits_per_pair=logits,
            routing=routing or None,
        )
