"""Ranks with rows of their own, and what they sum up.

Ranks of one tensor or context group hold the same rows: what counts rows over all processes would count theirs more
than once.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import TrainingArguments

from chorus_moe.modeling.configuration_services import SERVICES

# Neighbouring ranks with the same rows; and the ranks that have one place in each such group, None for all ranks.
_copies: int = 1
# Of these, the ones that share their sequences; transformers knows of tensor groups alone.
_context: int = 1
_group: dist.ProcessGroup | None = None


def hold_same_rows(copies: int, context: int = 1) -> None:
    """Say that each `copies` neighbouring ranks of this run see the same rows, `context` of them slices of each. Every
    rank must call it."""
    global _copies, _context, _group
    _copies, _context, _group = copies, context, None
    if dist.is_available() and dist.is_initialized() and (world := dist.get_world_size()) > copies:
        # A group of its own also where it has all ranks: sums of a backward pass then cannot meet those of a wrapper.
        groups = [list(range(place, world, copies)) for place in range(copies)]
        _group = dist.new_subgroups_by_enumeration(groups)[0]  # type: ignore[assignment]
        SERVICES["sum_over_batch"] = sum_over_batch
    else:
        SERVICES.pop("sum_over_batch", None)


def num_data_ranks(arguments: TrainingArguments) -> int:
    """How many different parts a batch has."""
    return max(1, arguments.world_size // _copies)


def num_copies() -> int:
    return _copies


def num_slices() -> int:
    """Processes that share each sequence."""
    return _context


def data_group() -> dist.ProcessGroup | None:
    """The ranks that together hold a batch once; None where one rank holds all of it, or nobody has said."""
    return _group


class _Sum(torch.autograd.Function):
    """Every rank adds to the sum, and every rank's loss is made of it: so gradients are summed as well."""

    @staticmethod
    def forward(context: Any, sums: Tensor, group: dist.ProcessGroup) -> Tensor:
        context.group, total = group, sums.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].clone()
        dist.all_reduce(total, group=context.group)
        return total, None


def sum_over_batch(sums: Tensor) -> Tensor:
    """Sums over the rows of all ranks, also of gradients; as they are in evaluation, where a rank may run alone."""
    if _group is None or not torch.is_grad_enabled():
        return sums
    return _Sum.apply(sums, _group)
