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
FEW_TOKENS, MANY_CHOICES = 64, 8


def router_probabilities(logits_TE: Tensor, router: str) -> Tensor:
    """The distribution over all experts behind a router's logits: their softmax, or their sigmoids divided by their sum
    (DeepSeek-V3, arXiv 2412.19437, equation 19)."""
    return (F.logsigmoid(logits_TE) if router == "sigmoid" else logits_TE).softmax(dim=-1)


def limit_groups(scores_TE: Tensor, num_groups: int, topk_groups: int) -> Tensor:
    """Close the experts outside a token's best groups; a group is worth the sum of its two best scores.

    DeepSeek-V3 (arXiv 2412.19437, section 2.1.2): a token then talks to at most `topk_groups` devices.
    """
    scores_TGM = scores_TE.unflatten(-1, (num_groups, -1))
    value_TG = scores_TGM.topk(min(2, scores_TGM.shape[-1]), dim=-1).values.sum(dim=-1)
    _, groups = best_experts(value_TG, topk_groups)
    is_closed_TG = torch.ones_like(value_TG, dtype=torch.bool).scatter_(1, groups, False)
    return scores_TGM.masked_fill(is_closed_TG[..., None], CLOSED).flatten(1)


def best_experts(scores_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Scores and indices `(T, K)` of the best, best first; of equals the lower index first, which `topk` leaves open.

    At least K scores of a token are finite. A stable sort and repeated maxima give the same, the faster one runs.
    """
    if torch.compiler.is_compiling() or len(scores_TE) <= FEW_TOKENS or top_k > MANY_CHOICES:
        scores, index = torch.sort(scores_TE, dim=-1, descending=True, stable=True)
        return scores[:, :top_k], index[:, :top_k]
    left_TE = scores_TE.detach()
    chosen = [left_TE.max(dim=-1, keepdim=True).indices]
    if top_k > 1:
        left_TE = left_TE.clone()
    for _ in range(top_k - 1):
        left_TE.scatter_(1, chosen[-1], CLOSED)
        chosen.append(left_TE.max(dim=-1, keepdim=True).indices)
    index_TK = torch.cat(chosen, dim=1)
    return scores_TE.gather(1, index_TK), index_TK


def normalised_entropy(log_weights_TE: Tensor) -> Tensor:
    """Entropy over log E: 0 for a router that is certain (as of a single expert), 1 for one that finds all alike."""
    entropy_T = torch.special.entr(log_weights_TE.softmax(dim=-1)).sum(dim=-1)
    return entropy_T / math.log(max(2, log_weights_TE.shape[-1]))


def unused_slots(limit_T: Tensor, top_k: int) -> Tensor:
    """`(T, K)`: True in all slots but a token's first `ceil(limit)`; the first slot is always used.

    For a complexity between 0 and 1 the limit is `complexity * K`.
    """
    slots_K = torch.arange(top_k, device=limit_T.device)
    return slots_K >= limit_T.clamp(min=1)[:, None]


def perturbed(log_weights_TE: Tensor) -> Tensor:
    """Log-weights plus Gumbel noise: the best K of them are a draw of K experts without replacement
    (Gumbel top-k, arXiv 1903.06059), one after the other with probability proportional to their weight."""
    return log_weights_TE.detach() - torch.empty_like(log_weights_TE).exponential_().log()


def draw_log_probability(log_weights_TE: Tensor, index_TK: Tensor) -> Tensor:
    """Log-probability `(T,)` of drawing just these experts in this order (Plackett-Luce); sentinels are no draws.

    Each draw is a softmax over the experts that are left; differentiable with respect to the log-weights. What is left
    is summed from the last draw to the first: what nobody drew, then one drawn expert more each time.
    """
    num_experts, low = log_weights_TE.shape[-1], torch.finfo(log_weights_TE.dtype).min
    # The sentinel's column weighs nothing.
    weights_TE1 = F.pad(log_weights_TE, (0, 1), value=low)
    chosen_TK = weights_TE1.gather(1, index_TK)
    left_T = weights_TE1.scatter(1, index_TK, low).logsumexp(dim=-1)
    left = []
    for chosen_T in reversed(chosen_TK.unbind(dim=1)):
        left_T = torch.logaddexp(left_T, chosen_T)
        left.append(left_T)
    drawn_TK = chosen_TK - torch.stack(left[::-1], dim=1)
    return drawn_TK.masked_fill(index_TK >= num_experts, 0.0).sum(dim=1)


def choice_weights(
    log_weights_TE: Tensor, index_TK: Tensor, is_normalised: bool, is_unused_TK: Tensor | None = None
) -> Tensor:
    """Weights of the chosen experts, divided by their sum if normalised; zero, with zero gradient, in unused slots.

    An unused slot may hold any expert, but not the sentinel.
    """
    chosen_TK = log_weights_TE.gather(1, index_TK)
    if is_unused_TK is not None:
        chosen_TK = chosen_TK.masked_fill(is_unused_TK, torch.finfo(chosen_TK.dtype).min)
    weights_TK = chosen_TK.softmax(dim=-1) if is_normalised else chosen_TK.exp()
    return weights_TK if is_unused_TK is None else weights_TK.masked_fill(is_unused_TK, 0.0)
