"""From scores to experts: pure functions that every router shares.

scores (+ correction bias) -> group limit -> best K -> adaptive K and budgets -> capacity -> weights

A router's *log-weights* are the logarithms of what it weighs its experts with, up to a constant for each token. A slot
that a token does not use holds the **sentinel**, the id E, and weight 0.

Capacity: tokens of a sequence are served in the order of their positions, each with all its choices, before the next.
So what happens to a token depends on the tokens before it in its own sequence and on nothing else: not on later tokens,
batch mates or padding. An expert takes `expert_capacity` tokens of a sequence; with a factor (float), the n-th token
finds an expert full that holds `ceil(factor * n * K / E)` tokens.

- `drop`: a choice whose expert is full is lost, with its weight; the others keep theirs (GShard, arXiv 2006.16668);
- `reroute`: the token gets its best experts *with room*, as many as it wanted, with the weights of those it gets.

Shape suffixes: T tokens, E experts in the bank, K experts per token, G groups, M experts in a group; for capacity
R rows of the bank, B sequences, L longest sequence in the bank.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .modeling_outputs import BankRouting

CLOSED = -torch.inf  # the score of an expert that a token may not choose
# Up to FEW tokens, and from MANY choices on, one sort is faster than a maximum per choice (docs/log.md).
FEW_TOKENS, FEW_GPU_TOKENS, MANY_CHOICES = 64, 16384, 8


def limit_groups(scores_TE: Tensor, num_groups: int, topk_groups: int) -> Tensor:
    """Close the experts outside a token's best groups; a group is worth the sum of its two best scores.

    DeepSeek-V3 (arXiv 2412.19437, section 2.1.2): a token then talks to at most `topk_groups` devices.
    """
    scores_TGM = scores_TE.view(-1, num_groups, scores_TE.shape[-1] // num_groups)
    # The value alone counts here, so `topk`, which leaves the order of equals open, may find it.
    value_TG = scores_TGM.topk(min(2, scores_TGM.shape[-1]), dim=-1).values.sum(dim=-1)
    closed_TGM = best_experts(value_TG, num_groups)[:, topk_groups:, None].expand(-1, -1, scores_TGM.shape[-1])
    return scores_TGM.scatter(1, closed_TGM, CLOSED).view_as(scores_TE)


def best_experts(scores_TE: Tensor, top_k: int) -> Tensor:
    """Indices `(T, K)` of the best, best first; of equals the lower index first, which `topk` leaves open.

    At least K scores of a token are finite. A stable sort and repeated maxima give the same, the faster one runs.
    """
    if torch.compiler.is_compiling() and (top_k <= MANY_CHOICES or torch.compiler.is_exporting()):
        # A compiler fuses comparisons into the loops around them. Other runtimes may have no stable sort (ONNX).
        expert_E = torch.arange(scores_TE.shape[-1], device=scores_TE.device)
        chosen, left_TE = [scores_TE.argmax(dim=-1, keepdim=True)], scores_TE
        for _ in range(top_k - 1):
            left_TE = left_TE.masked_fill(expert_E == chosen[-1], CLOSED)
            chosen.append(left_TE.argmax(dim=-1, keepdim=True))
        return torch.cat(chosen, dim=1)
    is_few = len(scores_TE) <= (FEW_GPU_TOKENS if scores_TE.is_cuda else FEW_TOKENS) and top_k > 1
    # Not `topk`, which leaves ties open: experts copied from one parent tie for certain, and a token must choose alike
    # alone, in a batch and on every device.
    if is_few or top_k > MANY_CHOICES:
        return torch.sort(scores_TE, dim=-1, descending=True, stable=True)[1][:, :top_k]
    chosen = [scores_TE.argmax(dim=-1, keepdim=True)]
    left_TE = scores_TE.detach().clone() if top_k > 1 else scores_TE
    for _ in range(top_k - 1):
        left_TE.scatter_(1, chosen[-1], CLOSED)
        chosen.append(left_TE.argmax(dim=-1, keepdim=True))
    return torch.cat(chosen, dim=1) if top_k > 1 else chosen[0]


def normalised_entropy(log_weights_TE: Tensor, scale: int = 1) -> Tensor:
    """Entropy over log E, times `scale`: 0 for a router that is sure, 1 for one that finds all experts alike."""
    entropy_T = torch.special.entr(log_weights_TE.softmax(dim=-1)).sum(dim=-1)
    return entropy_T / (math.log(max(2, log_weights_TE.shape[-1])) / scale)


def used_parts(limit_T: Tensor, top_k: int) -> Tensor:
    """`(T, K)`, 0 to 1: how far a token uses each slot. The first is whole, the last that it uses may be a part: then
    weights are continuous in the limit, and have a gradient with respect to it. For a complexity between 0 and 1 the
    limit is `complexity * K`."""
    return (limit_T.clamp(min=1).unsqueeze(1) - torch.arange(top_k, device=limit_T.device)).clamp(0, 1)


def uses_all_slots(limit_T: Tensor, top_k: int) -> bool:
    """Whether `used_parts` are nowhere 0; also False where looking would wait for a device or break a graph."""
    # Reading limits of a CPU costs less than masking slots that are all used.
    is_readable = limit_T.device.type == "cpu" and not torch.compiler.is_compiling()
    return is_readable and max(1, min(limit_T.tolist(), default=0)) > top_k - 1


def choice_weights(
    log_weights_TE: Tensor,
    index_TK: Tensor,
    is_normalised: bool,
    is_unused_TK: Tensor | None = None,
    part_TK: Tensor | None = None,
) -> Tensor:
    """Weights of the chosen experts, times the part of each slot that is used, divided by their sum if normalised;
    zero, with zero gradient, in unused slots.

    An unused slot may hold any expert, but not the sentinel. At least one slot of a token is used.
    """
    chosen_TK = log_weights_TE.gather(1, index_TK)
    if part_TK is not None:
        chosen_TK = chosen_TK + part_TK.clamp(min=1e-6).log()
    if is_unused_TK is not None:
        # Finite, so that gradients of unused slots are zeros and not NaN.
        chosen_TK = chosen_TK.masked_fill(is_unused_TK, torch.finfo(chosen_TK.dtype).min)
    return chosen_TK.softmax(dim=-1) if is_normalised else chosen_TK.exp()


class Served(NamedTuple):
    """What became of the choices.

    Args:
        selected_experts: `(R, K)`, best first, sentinels where a choice was dropped.
        num_rerouted: slots that hold an expert which the token did not choose, an int64 scalar.
        num_dropped: slots without any expert that the token wanted one for, an int64 scalar.
    """

    selected_experts: Tensor
    num_rerouted: Tensor
    num_dropped: Tensor


class Places(NamedTuple):
    """Where each row stands in its sequence.

    Args:
        sequence_R: its sequence, numbered from 0.
        rank_R: how many rows of the sequence stand before it in the bank, padding left out.
        is_counted_R: False for padding.
        shape: number of sequences, length of the longest.
    """

    sequence_R: Tensor
    rank_R: Tensor
    is_counted_R: Tensor
    shape: tuple[int, int]

    @classmethod
    def find(cls, sequence_R: Tensor, is_counted_R: Tensor | None) -> "Places":
        """Places of rows in order, whose sequences have any ids, each sequence in one piece. Waits for the device."""
        if is_counted_R is None:
            is_counted_R = torch.ones_like(sequence_R, dtype=torch.bool)
        if len(sequence_R) == 0:
            return cls(sequence_R, sequence_R, is_counted_R, (0, 0))
        _, sequence_R = sequence_R.unique_consecutive(return_inverse=True)
        is_first_R = torch.ones_like(is_counted_R)
        is_first_R[1:] = sequence_R[1:] != sequence_R[:-1]
        before_R = is_counted_R.cumsum(0) - is_counted_R.long()
        rank_R = before_R - before_R[is_first_R][sequence_R]
        return cls(sequence_R, rank_R, is_counted_R, (int(sequence_R[-1]) + 1, int(rank_R.max()) + 1))

    def capacity(self, expert_capacity: int | float, top_k: int, num_experts: int) -> Tensor:
        """`(L,)`: tokens that an expert may hold once the row of that rank is served."""
        # The share so far: a share of the whole sequence would let a later token make room for an earlier one, and a
        # prefix would route differently from the whole.
        ranks_L = torch.arange(1, self.shape[1] + 1, device=self.rank_R.device)
        if isinstance(expert_capacity, int):
            return torch.full_like(ranks_L, expert_capacity)
        # In float64 and less a little: a share of just 7 must not round up to 8.
        return (ranks_L.double() * (expert_capacity * top_k / num_experts) - 1e-9).ceil().long().clamp(min=1)


def serve(scores_RE: Tensor, index_RK: Tensor, places: Places, capacity_L: Tensor, overflow: str) -> Served:
    """Serve the choices of all rows.

    Args:
        scores_RE: what ranks the experts of a row; minus infinity for experts that it may not have.
        index_RK: its choices, best first, sentinels in slots that it does not use.
        capacity_L: see [`Places.capacity`].
        overflow: `reroute` or `drop`.

    Raises:
        NotImplementedError: under `torch.compile`.
    """
    if torch.compiler.is_compiling():
        raise NotImplementedError(
            "expert_capacity cannot be compiled, since how often tokens ask again depends on the data; compile without "
            "capacity (it holds in training only, unless capacity_in_eval=True)"
        )
    num_experts, top_k = scores_RE.shape[-1], index_RK.shape[1]
    if not len(index_RK):
        return Served(index_RK, index_RK.sum(), index_RK.sum())
    # Padding takes no room.
    index_RK = index_RK.masked_fill(~places.is_counted_R[:, None], num_experts)
    wanted_R = (index_RK < num_experts).sum(dim=-1)
    chosen_RE = _expert_mask(index_RK, num_experts)
    asking_RE = chosen_RE.clone()
    refused_RE = asking_RE & ~_accepted(asking_RE, places, capacity_L)
    if overflow == "drop":
        lost_RK = refused_RE.gather(1, index_RK.clamp(max=num_experts - 1))
        num_dropped = refused_RE.sum()
        return Served(index_RK.masked_fill(lost_RK, num_experts), torch.zeros_like(num_dropped), num_dropped)
    # A loop over tokens would be slow. All ask at once, an expert serves the first that ask and turns the rest away,
    # who ask their next best, until none is turned away. As all experts rank tokens alike, this ends where the loop
    # ends.
    order_RE = scores_RE.detach().sort(dim=-1, descending=True, stable=True).indices
    closed_RE = scores_RE == CLOSED
    while True:
        rows = refused_RE.any(dim=-1).nonzero().squeeze(1)
        if not len(rows):
            break
        closed_RE |= refused_RE
        asking_RE[rows] = _ask(order_RE[rows], closed_RE[rows], wanted_R[rows])
        refused_RE = asking_RE & ~_accepted(asking_RE, places, capacity_L)
    num_dropped = wanted_R.sum() - asking_RE.sum()
    # Best first again: a stable sort of booleans in the order of scores keeps that order among those served.
    place_RK = asking_RE.gather(1, order_RE).sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    index_RK = order_RE.gather(1, place_RK)
    index_RK = index_RK.masked_fill(~asking_RE.gather(1, index_RK), num_experts)
    return Served(index_RK, (asking_RE & ~chosen_RE).sum(), num_dropped)


def _ask(order_RE: Tensor, closed_RE: Tensor, wanted_R: Tensor) -> Tensor:
    """`(R, E)`: True for the best `wanted_R` experts of each row that are not closed to it."""
    is_open_RE = ~closed_RE.gather(1, order_RE)
    is_asked_RE = is_open_RE & (is_open_RE.cumsum(dim=-1) <= wanted_R[:, None])
    return torch.zeros_like(is_asked_RE).scatter_(1, order_RE, is_asked_RE)


def _expert_mask(index_RK: Tensor, num_experts: int) -> Tensor:
    """`(R, E)`: True for the experts among a row's choices."""
    mask = torch.zeros(len(index_RK), num_experts + 1, dtype=torch.bool, device=index_RK.device)
    return mask.scatter_(1, index_RK, True)[:, :num_experts]


def _accepted(asking_RE: Tensor, places: Places, capacity_L: Tensor) -> Tensor:
    """`(R, E)`: True where an expert that is asked has room, if it serves those who ask in order.

    With n askers so far an expert holds `A(n) = min(A(n - 1) + 1, capacity(n))`, since capacity never falls; so
    `A(n) - n` is the running minimum of `capacity - n`, and an asker is accepted where that minimum does not fall.
    """
    num_sequences, length = places.shape
    place_R = places.sequence_R * length + places.rank_R
    asking_BLE = asking_RE.new_zeros(num_sequences * length, asking_RE.shape[1], dtype=torch.int32)
    # Padding shares the place of the next row and asks for nothing, hence a sum.
    asking_BLE = asking_BLE.index_add_(0, place_R, asking_RE.int()).unflatten(0, places.shape)
    # int32: counts of a sequence fit, and half the memory of the largest tensors here is saved.
    spare_BLE = capacity_L.int()[:, None] - asking_BLE.cumsum(dim=1, dtype=torch.int32)
    spare_BLE = spare_BLE.masked_fill(asking_BLE == 0, 0).clamp(max=0)
    lowest_BLE = spare_BLE.cummin(dim=1).values
    has_room_BLE = F.pad(lowest_BLE, (0, 0, 1, 0))[:, :-1] <= spare_BLE
    return has_room_BLE.flatten(0, 1)[place_R]


def count_choices(routing: BankRouting) -> Tensor:
    """`(E,)` int64: how often real tokens of the bank chose each expert."""
    chosen_TK, num_experts = routing.selected_experts, routing.router_logits.shape[-1]
    if routing.token_mask is not None:
        chosen_TK = chosen_TK.masked_fill(~routing.token_mask[:, None], num_experts)
    return torch.bincount(chosen_TK.reshape(-1), minlength=num_experts + 1)[:num_experts]
