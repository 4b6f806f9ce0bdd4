"""TRL's trainers give a model a forward of their own; this gives that forward the model's losses.

`import chorus_moe` registers it, and the generative model asks for it when TRL installs its forward.
"""

from collections.abc import Callable
from functools import wraps
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from chorus_moe.modeling.configuration_services import SERVICES
from chorus_moe.modeling.modeling_heads import LOSS_WEIGHTS


def with_own_losses(fused_forward: Callable[..., Any]) -> Callable[..., Any]:
    """TRL's forward (`trl.trainer.utils.add_fused_lm_head`), with our auxiliary losses in the place of Mixtral's.

    TRL adds `router_aux_loss_coef * aux_loss` to a loss of its own. So `aux_loss` is all that training adds to ours,
    divided by that coefficient; in evaluation, where we add nothing, it is 0.

    Raises:
        ValueError: in training, a trainer that adds no `aux_loss` where there are other losses than the balance loss.
    """

    @wraps(fused_forward)
    def forward(self: Any, fused_lm_head: bool = False, output_router_logits: bool | None = None, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return fused_forward(self, output_router_logits=output_router_logits, **kwargs)
        # False: TRL would compute Mixtral's balance loss, which cannot read the routing of banks.
        kwargs |= {"fused_lm_head": True, "output_router_logits": False}
        if not (self.training and torch.is_grad_enabled()):
            outputs = fused_forward(self, **kwargs)
            outputs.aux_loss = outputs.log_probs.new_zeros(()) if output_router_logits else None
            return outputs
        text = self.config.text_config
        terms: dict[str, Tensor | None] = {}

        def run(output_router_logits: bool, mm_token_type_ids: Tensor | None = None, **inputs: Any) -> Any:
            if text.exit_loss_coef > 0:
                inputs["output_hidden_states"] = True
            outputs, found = self._run(bool(asked), mm_token_type_ids, **inputs)
            terms.update(found)
            if text.exit_loss_coef > 0:
                counted = (labels[..., 1:] != -100).sum().clamp(min=1)
                terms["exit_loss"] = self._exit_loss(outputs.hidden_states, labels, counted)
            return outputs

        asked, labels = output_router_logits, kwargs["labels"]
        # What TRL's forward reads of a model, with our run in the place of the model without a head.
        stand_in = SimpleNamespace(base_model=run, get_output_embeddings=self.get_output_embeddings)
        outputs = fused_forward(stand_in, **kwargs)
        if asked and text.router_aux_loss_coef > 0:
            total = outputs.log_probs.new_zeros(()) + self._weighted_sum(terms, 1.0)
            # TRL multiplies by this coefficient again.
            outputs.aux_loss = total / text.router_aux_loss_coef
            return outputs
        outputs.aux_loss = terms["aux_loss"] if asked else None
        weights = {LOSS_WEIGHTS[name]: getattr(text, LOSS_WEIGHTS[name]) for name in terms if terms[name] is not None}
        for name, weight in weights.items():
            if weight > 0 and name != LOSS_WEIGHTS["aux_loss"]:
                raise ValueError(
                    f"{name}={weight} would have no effect: TRL adds losses of the model only where "
                    "router_aux_loss_coef of its text_config is above 0. Set that, or this one to 0"
                )
        return outputs

    return forward


SERVICES["with_own_losses"] = with_own_losses
