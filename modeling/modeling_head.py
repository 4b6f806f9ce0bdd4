"""What all heads share: the inner model and its auxiliary losses.

Unusual here: the loss terms of the router and of cross-modal attention are added in training only, are scaled by the
micro-batch's share of the step, and are returned one by one.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from .configuration_chorus import ChorusConfig
from .losses import alignment_loss, balance_loss, mean_over_banks, skip_budget_loss, z_loss
from .modeling_base import ChorusPreTrainedModel
from .modeling_chorus import ChorusModel
from .modeling_outputs import ChorusModelOutput

logger = logging.get_logger(__name__)


def two_dimensional(attention_mask: Any) -> Tensor | None:
    """The mask if it is `(B, S)`; masks of another form do not say which tokens are padding."""
    return attention_mask if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2 else None


class ChorusHead(ChorusPreTrainedModel):
    """What all heads share: the inner model and its auxiliary losses."""

    accepts_loss_kwargs = True

    def __init__(self, config: ChorusConfig):
        super().__init__(config)
        self.model = ChorusModel(config)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def _run(
        self, output_router_logits: bool | None, mm_token_type_ids: Tensor | None, **inputs: Any
    ) -> tuple[ChorusModelOutput, dict[str, Tensor | None]]:
        """The inner model's outputs and the unweighted auxiliary losses that were asked for."""
        text = self.config.text_config
        if output_router_logits is None:
            output_router_logits = text.output_router_logits
        banks = self.model.language_model.banks
        train_router = self.training and (
            text.router_z_loss_coef > 0
            or (text.router_aux_loss_coef > 0 and any(bank.has_balance_loss for bank in banks.values()))
        )
        # Whoever samples wants the probabilities.
        keep_routing = bool(output_router_logits or inputs.get("sample_experts") or self._counts_choices())
        align = self.training and text.alignment_loss_coef > 0
        keep_budget = self.training and text.skip_loss_coef > 0 and text.skip_budget is not None
        if mm_token_type_ids is None and inputs.get("input_ids") is not None:
            mm_token_type_ids = self.model.modality_ids(inputs["input_ids"])
        outputs = self.model(
            mm_token_type_ids=mm_token_type_ids,
            output_router_logits=keep_routing or train_router,
            output_cross_modal_states=align,
            **({"output_skip_logits": True} if keep_budget else {}),
            **inputs,
        )
        terms: dict[str, Tensor | None] = dict.fromkeys(("aux_loss", "z_loss", "alignment_loss", "skip_loss"))
        if output_router_logits or train_router:
            if train_router:
                logits = [bank.router_logits for layer in outputs.router_logits for bank in layer.values()]
                self._check_graph("balance", logits, (".router.",))
            terms["aux_loss"] = balance_loss(outputs.router_logits, banks)
            terms["z_loss"] = mean_over_banks(outputs.router_logits, z_loss)
        if inputs.get("sample_experts"):
            banks_of_layers = [bank for layer in outputs.router_logits for bank in layer.values()]
            drawn = [bank.log_probs for bank in banks_of_layers if bank.log_probs is not None]
            self._check_graph("policy-gradient", drawn, (".router.",))
        if align:
            terms["alignment_loss"] = self._alignment(outputs, mm_token_type_ids, inputs.get("attention_mask"))
        if keep_budget:
            self._check_graph("skip budget", outputs.skip_logits, (".skip_gate.",))
            real_BS = two_dimensional(inputs.get("attention_mask"))
            terms["skip_loss"] = skip_budget_loss(outputs.skip_logits, real_BS, text.skip_budget)
        if not keep_routing:
            outputs.router_logits = None
        return outputs, terms

    def _counts_choices(self) -> bool:
        """Whether whoever moves a balance bias must see the choices of this forward, whatever was asked for."""
        names = [name for name, bank in self.model.language_model.banks.items() if bank.balance == "bias"]
        if not (self.training and names):
            return False
        if torch.is_grad_enabled() and not torch.compiler.is_compiling() and self._nobody_counts():
            logger.warning_once(
                f"expert banks {names} are balanced by a bias that moves only when somebody counts their choices and "
                "calls `update_balance_bias` once an optimizer step. `RoutingCallback` does it for a Trainer "
                "(`chorus-moe train` adds it); nothing seems to do it here"
            )
        return True

    def _nobody_counts(self) -> bool:
        """Whether routers learn while no observer is attached to the decoder."""
        decoder = self.model.language_model
        return not decoder._forward_hooks and any(
            parameter.requires_grad for name, parameter in decoder.named_parameters() if ".router." in name
        )

    def _alignment(self, outputs: ChorusModelOutput, modality_BS: Tensor, attention_mask: Tensor | None) -> Tensor:
        scaling = self.config.text_config.head_dim**-0.5
        is_causal = self.config.text_config.is_causal
        real_BS = two_dimensional(attention_mask)
        projections = tuple(
            f"layers.{i}.self_attn.{name}" for i in self.config.text_config.cross_modal_layers for name in ("q_", "k_")
        )
        self._check_graph("alignment", [query for query, _ in outputs.cross_modal_states], projections)
        layers = [
            alignment_loss(query, key, modality_BS, real_BS, scaling, is_causal)
            for query, key in outputs.cross_modal_states
        ]
        return torch.stack([layer.to(layers[0].device) for layer in layers]).mean()

    def _check_graph(self, term: str, sources: list[Tensor], trained: tuple[str, ...]) -> None:
        """Refuse a loss term whose sources have no graph although parameters with these names are trained."""
        if not (self.training and torch.is_grad_enabled()) or any(source.requires_grad for source in sources):
            return
        if any(p.requires_grad for n, p in self.model.named_parameters() if any(part in n for part in trained)):
            raise RuntimeError(
                f"the {term} loss would have no gradient: activation checkpointing runs with use_reentrant=True, which "
                "hides what it is computed from; use activation_checkpointing_kwargs={'use_reentrant': False}"
            )

    def _weighted_sum(self, terms: dict[str, Tensor | None], share: Tensor | float) -> Tensor | float:
        """What training adds to the loss of the head; nothing in evaluation."""
        if not self.training:
            return 0.0
        text = self.config.text_config
        coefficients = {
            "aux_loss": text.router_aux_loss_coef,
            "z_loss": text.router_z_loss_coef,
            "alignment_loss": text.alignment_loss_coef,
            "skip_loss": text.skip_loss_coef,
        }
        added = [
            coefficients[name] * term for name, term in terms.items() if term is not None and coefficients[name] > 0
        ]
        return share * sum(added) if added else 0.0
