"""Experts drawn from a router's distribution, for training by reward: registered with the model for `sample_experts`.

Shape suffixes: T tokens, E experts, K experts per token.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from chorus_moe.modeling.configuration_services import SERVICES


def perturbed(log_weights_TE: Tensor) -> Tensor:
    """Log-weights plus Gumbel noise: the best K of them are a draw of K experts without replacement
    (Gumbel top-k, arXiv 1903.06059), one after the other with probability proportional to their weight."""
    # Minus the logarithm of an exponential variable is Gumbel noise, in two kernels.
    return log_weights_TE.detach() - torch.empty_like(log_weights_TE).exponential_().log_()


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


SERVICES["perturbed"] = perturbed
SERVICES["log_probability_of_draw"] = draw_log_probability
