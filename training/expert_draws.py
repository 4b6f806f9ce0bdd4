"""Experts drawn from a router's distribution, for training by reward: registered with the model for `sample_experts`.

Shape suffixes: T tokens, E experts, K experts per token.
"""

from collections.abc import Collection, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from chorus_moe.modeling.configuration_banks import ExpertBankConfig
from chorus_moe.modeling.configuration_services import SERVICES
from chorus_moe.modeling.moe_plan import check_banks
from chorus_moe.modeling.moe_routers import Router
from chorus_moe.modeling.moe_selection import CLOSED


def perturbed(log_weights_TE: Tensor) -> Tensor:
    """Log-weights plus Gumbel noise: the best K of them are a draw of K experts without replacement
    (Gumbel top-k, arXiv 1903.06059), one after the other with probability proportional to their weight."""
    # Minus the logarithm of an exponential variable is Gumbel noise, in two kernels.
    return log_weights_TE.detach() - torch.empty_like(log_weights_TE).exponential_().log_()


def open_log_weights(router: Router, logits_TE: Tensor) -> Tensor:
    """The log-weights that experts are drawn by: those outside a token's best groups are never drawn."""
    log_weights_TE = router.log_weights(logits_TE)
    if not router.limits_groups:
        return log_weights_TE
    return log_weights_TE.masked_fill(router.rank(logits_TE) == CLOSED, torch.finfo(torch.float32).min)


def draw(router: Router, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
    """The log-weights of a draw, and scores whose best K are drawn."""
    # Drawn from the weights and not from biased scores: the log-probability must be that of the draw.
    log_weights_TE = open_log_weights(router, logits_TE)
    return log_weights_TE, perturbed(log_weights_TE)


def draw_log_probability(log_weights_TE: Tensor, index_TK: Tensor, is_unused_TK: Tensor | None = None) -> Tensor:
    """Log-probability `(T,)` of drawing just these experts in this order (Plackett-Luce).

    Each draw is a softmax over the experts that are left; differentiable with respect to the log-weights. What is left
    is summed from the last draw to the first: what was never drawn, then one drawn expert more each time. Unused slots
    are no draws; they, and no others, hold the sentinel.
    """
    num_experts, low = log_weights_TE.shape[-1], torch.finfo(log_weights_TE.dtype).min
    if is_unused_TK is not None:  # the sentinel gets a column that weighs nothing
        num_experts, log_weights_TE = num_experts + 1, F.pad(log_weights_TE, (0, 1), value=low)
    last_first_TK = index_TK.flip(1)
    chosen_TK = log_weights_TE.gather(1, last_first_TK)
    left_TE = log_weights_TE.scatter(1, last_first_TK, low)
    # Sums grow from small to large: taking the drawn away from the whole would cancel where one expert has nearly all.
    drawn_TK = chosen_TK - torch.cat((left_TE, chosen_TK), dim=1).logcumsumexp(dim=1)[:, num_experts:]
    return (drawn_TK if is_unused_TK is None else drawn_TK.masked_fill(is_unused_TK.flip(1), 0.0)).sum(dim=1)


def read_sampled(
    banks: Mapping[str, ExpertBankConfig],
    limited: Collection[str],
    closed: Collection[str],
    sample_experts: Collection[str],
) -> frozenset[str]:
    """The names of the banks that are to draw.

    Raises:
        ValueError: an unknown bank, or one whose choices are no plain draw.
    """
    check_banks("sample_experts", banks, sample_experts)
    for name in sample_experts:
        if name in closed:
            raise ValueError(f"sample_experts names {name!r}, which is closed and draws nothing")
        if name in limited:
            raise ValueError(
                f"sample_experts names {name!r}, which limits the capacity of its experts: what a full expert turns "
                "away is no longer a draw, so its probability is not known"
            )
        if banks[name].balance == "bias":
            raise ValueError(
                f"sample_experts names {name!r}, which has balance='bias': the correction bias is no part of the "
                "distribution that is sampled; give the bank another balance"
            )
    return frozenset(sample_experts)


SERVICES["draw"] = draw
SERVICES["log_probability_of_draw"] = draw_log_probability
SERVICES["read_sampled"] = read_sampled
