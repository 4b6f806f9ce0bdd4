"""Slots: where the rows of each expert stand, and which experts share a product.

Rows are sorted by expert once. An expert with many rows gets chunks that stay in cache; adjacent experts with few rows
are padded to a common number of rows and become one batched product. Nothing is ever dropped.

Shape suffixes: T tokens, K experts per token, E experts, P slots.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK_ROWS = 512  # rows of one product: its activations stay in cache
PADDED_ROWS = 100  # experts with more rows than this are not padded
PADDED_EXPERTS = 4
FEW_ROWS = 5  # mean rows per chosen expert below which weights on the right are faster
FEW_TRAINING_ROWS = 100  # the same in float32 training, where writing the weight gradients takes most of the time
ALIKE_ROWS, ALIKE_TRAINING_ROWS = 128, 256  # the same where products treat both operands alike
SMALL_EXPERT = 2**23  # on one thread, rows times weights of `gate_up` below which they are faster too
TILE_ROWS = 16  # a product takes as long as one with rows rounded up to this


class Unit(NamedTuple):
    """One batched product: experts `first` to `last - 1`, `rows` slots each, from slot `start` on."""

    first: int
    last: int
    start: int
    rows: int
    opens: bool  # the first chunk of its expert: weight gradients are written, later chunks add

    @property
    def slots(self) -> slice:
        return slice(self.start, self.start + (self.last - self.first) * self.rows)


class SlotPlan(NamedTuple):
    """Where every (token, choice) pair stands."""

    units: list[Unit]
    counts: list[int]  # rows of each expert
    token_P: Tensor  # the token in each slot; padding repeats token 0
    slot_TK: Tensor  # the slot of each pair; 0 for sentinels
    sentinel_TK: Tensor | None  # the pairs to skip, if there are any
    is_sparse: bool  # few rows per expert: plain sorting, no units
    by_row: bool  # how activations within a unit lie in memory: a row after the other, or a feature after the other

    def to_slots(self, value_TK: Tensor) -> Tensor:
        """Values of the pairs in slot order; padding slots hold zero."""
        value_P = value_TK.new_zeros(self.token_P.shape[0])
        if self.sentinel_TK is None:
            value_P[self.slot_TK.view(-1)] = value_TK.reshape(-1)
        else:
            value_P[self.slot_TK[~self.sentinel_TK]] = value_TK[~self.sentinel_TK]
        return value_P

    def from_slots(self, value_P: Tensor) -> Tensor:
        """Values of the slots in pair order; sentinels hold zero."""
        if not self.token_P.shape[0]:
            return value_P.new_zeros(self.slot_TK.shape)
        value_TK = value_P[self.slot_TK]
        return value_TK if self.sentinel_TK is None else value_TK.masked_fill(self.sentinel_TK, 0.0)


@cache
def treats_operands_alike() -> bool:
    """Whether products take equally long with the weight on either side, as on AMD's processors."""
    # By name and not by a measurement at start: the same input must give the same bits in the next process.
    return "AMD" in str(torch.cpu.get_capabilities().get("cpu_name", ""))


def few_rows(gate_up_EHD: Tensor, is_training: bool) -> float:
    """Mean rows per chosen expert below which weights stand on the right, by plain sorting, without units.

    Such a product packs its weight anew; the smaller the expert, the more rows it takes until that shows. Where it does
    not show, units pay once their activations, in buffers that stay in cache, are many.
    """
    if treats_operands_alike():
        return ALIKE_TRAINING_ROWS if is_training else ALIKE_ROWS
    # Thresholds from docs/log.md; bfloat16 and several threads keep the old limit, for want of a measure.
    is_wide = gate_up_EHD.dtype == torch.float32
    if is_training:
        return FEW_TRAINING_ROWS if is_wide else 0
    if not is_wide or torch.get_num_threads() > 1:
        return FEW_ROWS
    return min(max(FEW_ROWS, SMALL_EXPERT / gate_up_EHD[0].numel()), PADDED_ROWS)


def make_slot_plan(top_k_index: Tensor, num_experts: int, few_rows: float) -> SlotPlan:
    """Lay the `(T, K)` choices out in slots, by expert; below `few_rows` rows in the mean, without units."""
    choices = top_k_index.reshape(-1)
    counts = torch.bincount(choices, minlength=num_experts).tolist()[:num_experts]
    num_pairs = sum(counts)
    # Stable, so that an expert's rows stand in the order of tokens. Sentinels sort to the end and are cut off.
    order = choices.argsort(stable=True)[:num_pairs]
    slot = torch.arange(num_pairs)
    is_sparse = num_pairs < few_rows * sum(count > 0 for count in counts)
    # Where a library packs the right operand, features lie together so that the weight can stand on the left.
    by_row = treats_operands_alike()
    units, shifts, num_slots = ([], [], num_pairs) if is_sparse else _make_units(counts, is_padded=not by_row)
    token_P = order // top_k_index.shape[1]
    if num_slots > num_pairs:
        slot += torch.tensor(shifts).repeat_interleave(torch.tensor(counts))
        token_P = token_P.new_zeros(num_slots).index_copy_(0, slot, token_P)
    slot_TK = torch.zeros_like(choices).index_copy_(0, order, slot).view(top_k_index.shape)
    sentinel_TK = top_k_index >= num_experts if num_pairs < choices.numel() else None
    return SlotPlan(units, counts, token_P, slot_TK, sentinel_TK, is_sparse, by_row)


def _make_units(counts: list[int], is_padded: bool) -> tuple[list[Unit], list[int], int]:
    """The units, how many slots each expert's rows move against plain sorting, and the number of slots."""
    units: list[Unit] = []
    shifts = [0] * len(counts)
    first, start, sorted_start = 0, 0, 0
    # With several threads, one product less is worth some padding.
    slack = 1.2 if torch.get_num_threads() > 1 else 1.0
    while first < len(counts):
        last, rows, total = first + 1, counts[first], _tiled(counts[first])
        while is_padded and last < len(counts) and last - first < PADDED_EXPERTS and rows and counts[last]:
            widest, cost = max(rows, counts[last]), total + _tiled(counts[last])
            # The next expert joins only if rows padded to the widest cost no more than products of their own.
            if widest > PADDED_ROWS or _tiled(widest) * (last + 1 - first) > slack * cost:
                break
            last, rows, total = last + 1, widest, cost
        for expert in range(first, last):
            shifts[expert] = start + (expert - first) * rows - sorted_start
            sorted_start += counts[expert]
        if last - first == 1 and (rows != 1 or not is_padded):
            chunks = max(1, round(rows / CHUNK_ROWS)) if rows else 0
            for chunk in range(chunks):
                begin, end = rows * chunk // chunks, rows * (chunk + 1) // chunks
                units.append(Unit(first, last, start + begin, end - begin, chunk == 0))
        else:
            # One column alone would be a matrix-vector product, whose sums have another order: then the last bits of an
            # expert's output would depend on whether it stands next to others.
            rows = max(rows, 2) if last - first == 1 else rows
            units.append(Unit(first, last, start, rows, True))
        start += (last - first) * rows
        first = last
    return units, shifts, start


def _tiled(rows: int) -> int:
    return -(-rows // TILE_ROWS) * TILE_ROWS
