"""From scores to experts: pure functions that every router shares.

scores (+ correction bias) -> group limit -> best K -> adaptive K and budgets -> capacity (`expert_capacity`) -> weights

Unusual here:
- ties go to the expert with the lower index, whatever the number of tokens, the backend or the compiler;
- a slot that a token does not use holds the **sentinel**, the id E, and weight 0: it costs no compute;
- experts can be sampled without replacement, with the log-probability of the draw.

A router's *log-weights* are the logarithms of what it weighs its experts with, up to a constant for each token.

Shape suffixes: T tokens, E experts in the bank, K experts per token, G groups, M experts in a group.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

CLOSED = -torch.inf  # the score of an expert that a token may not choose
# Up to so many tokens, and from so many choices on, one sort is faster than a maximum a choice.
FEW_TOKENS, FEW_GPU_TOKENS, MANY_CHOICES = 64, 16384, 8


def router_probabilities(logits_TE: Tensor, router: str) -> Tensor:
    """The distribution over all experts behind a router's logits: their softmax, or their sigmoids divided by their sum
    (DeepSeek-V3, arXiv 2412.19437, equation 19)."""
    return (F.logsigmoid(logits_TE) if router == "sigmoid" else logits_TE).softmax(dim=-1)


def limit_groups(scores_TE: Tensor, num_groups: int, topk_groups: int) -> Tensor:
    """Close the experts outside a token's best groups; a group is worth the sum of its two best scores.

    DeepSeek-V3 (arXiv 2412.19437, section 2.1.2): a token then talks to at most `topk_groups` devices.
    """
    scores_TGM = scores_TE.view(-1, num_groups, scores_TE.shape[-1] // num_groups)
    value_TG = scores_TGM.topk(min(2, scores_TGM.shape[-1]), dim=-1).values.sum(dim=-1)
    closed_TGM = best_experts(value_TG, num_groups)[:, topk_groups:, None].expand(-1, -1, scores_TGM.shape[-1])
    return scores_TGM.scatter(1, closed_TGM, CLOSED).view_as(scores_TE)


def best_experts(scores_TE: Tensor, top_k: int) -> Tensor:
    """Indices `(T, K)` of the best, best first; of equals the lower index first, which `topk` leaves open.

    At least K scores of a token are finite. A stable sort and repeated maxima give the same, the faster one runs.
    """
    is_few = len(scores_TE) <= (FEW_GPU_TOKENS if scores_TE.is_cuda else FEW_TOKENS) and top_k > 1
    if torch.compiler.is_compiling() or is_few or top_k > MANY_CHOICES:
        return torch.sort(scores_TE, dim=-1, descending=True, stable=True)[1][:, :top_k]
    chosen = [scores_TE.argmax(dim=-1, keepdim=True)]
    left_TE = scores_TE.detach().clone() if top_k > 1 else scores_TE
    for _ in range(top_k - 1):
        left_TE.scatter_(1, chosen[-1], CLOSED)
        chosen.append(left_TE.argmax(dim=-1, keepdim=True))
    return torch.cat(chosen, dim=1) if top_k > 1 else chosen[0]


def normalised_entropy(log_weights_TE: Tensor, scale: int = 1) -> Tensor:
    """Entropy over log E, times `scale`: 0 for a router that is certain (as of a single expert), 1 for one that
    finds all experts alike."""
    entropy_T = torch.special.entr(log_weights_TE.softmax(dim=-1)).sum(dim=-1)
    return entropy_T / (math.log(max(2, log_weights_TE.shape[-1])) / scale)


def unused_slots(limit_T: Tensor, top_k: int) -> Tensor:
    """`(T, K)`: True in all slots but a token's first `ceil(limit)`; the first slot is always used.

    For a complexity between 0 and 1 the limit is `complexity * K`.
    """
    return torch.arange(top_k, device=limit_T.device) >= limit_T.clamp(min=1).unsqueeze(1)


def uses_all_slots(limit_T: Tensor, top_k: int) -> bool:
    """Whether `unused_slots` is False everywhere; also False where looking would wait for a device or break a graph."""
    is_readable = limit_T.device.type == "cpu" and not torch.compiler.is_compiling()
    return is_readable and max(1, min(limit_T.tolist(), default=0)) > top_k - 1


def perturbed(log_weights_TE: Tensor) -> Tensor:
    """Log-weights plus Gumbel noise: the best K of them are a draw of K experts without replacement
    (Gumbel top-k, arXiv 1903.06059), one after the other with probability proportional to their weight."""
    return log_weights_TE.detach() - torch.empty_like(log_weights_TE).exponential_().log_()


def draw_log_probability(log_weights_TE: Tensor, index_TK: Tensor, is_unused_TK: Tensor | None = None) -> Tensor:
    """Log-probability `(T,)` of drawing just these experts in this order (Plackett-Luce).

    Each draw is a softmax over the experts that are left; differentiable with respect to the log-weights. What is left
    is summed from the last draw to the first: what nobody drew, then one drawn expert more each time. Unused slots are
    no draws; they, and no others, hold the sentinel.
    """
    num_experts, low = log_weights_TE.shape[-1], torch.finfo(log_weights_TE.dtype).min
    if is_unused_TK is not None:  # the sentinel gets a column that weighs nothing
        num_experts, log_weights_TE = num_experts + 1, F.pad(log_weights_TE, (0, 1), value=low)
    last_first_TK = index_TK.flip(1)
    chosen_TK = log_weights_TE.gather(1, last_first_TK)
    left_TE = log_weights_TE.scatter(1, last_first_TK, low)
    drawn_TK = chosen_TK - torch.cat((left_TE, chosen_TK), dim=1).logcumsumexp(dim=1)[:, num_experts:]
    return (drawn_TK if is_unused_TK is None else drawn_TK.masked_fill(is_unused_TK.flip(1), 0.0)).sum(dim=1)


def choice_weights(
    log_weights_TE: Tensor, index_TK: Tensor, is_normalised: bool, is_unused_TK: Tensor | None = None
) -> Tensor:
    """Weights of the chosen experts, divided by their sum if normalised; zero, with zero gradient, in unused slots.

    An unused slot may hold any expert, but not the sentinel. At least one slot of a token is used.
    """
    chosen_TK = log_weights_TE.gather(1, index_TK)
    if is_unused_TK is not None:
        chosen_TK = chosen_TK.masked_fill(is_unused_TK, torch.finfo(chosen_TK.dtype).min)
    return chosen_TK.softmax(dim=-1) if is_normalised else chosen_TK.exp()
