"""Who sees the same rows, and sums over those who do not, with exchanges of our own."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from chorus_moe.modeling.configuration_services import SERVICES
from chorus_moe.training.scale import ranks
from chorus_moe.training.scale.ranks import (
    data_group,
    hold_same_rows,
    num_copies,
    num_data_ranks,
    num_slices,
    sum_over_batch,
)

GROUP: Any = "the first group"


@pytest.fixture
def exchanges(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Four ranks, of which this is the first; the others of its group have twice its numbers."""
    seen: list[Any] = []

    def new_groups(members: list[list[int]]) -> tuple[Any, list[Any]]:
        seen.append(members)
        return GROUP, [GROUP, "others"]

    def all_reduce(tensor: Tensor, group: object) -> None:
        seen.append(group)
        tensor.mul_(3)

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    monkeypatch.setattr(dist, "new_subgroups_by_enumeration", new_groups)
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    yield seen
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    hold_same_rows(1)


@pytest.mark.parametrize(
    ("copies", "context", "members"),
    [(1, 1, [[0, 1, 2, 3]]), (2, 1, [[0, 2], [1, 3]]), (2, 2, [[0, 2], [1, 3]])],
)
def test_neighbours_see_the_same_rows(
    exchanges: list[Any], copies: int, context: int, members: list[list[int]]
) -> None:
    hold_same_rows(copies, context)
    assert exchanges == [members]
    assert (num_copies(), num_slices(), data_group()) == (copies, context, GROUP)
    assert SERVICES["sum_over_batch"] is sum_over_batch


def test_one_group_of_all_needs_no_exchange(exchanges: list[Any]) -> None:
    hold_same_rows(2)
    hold_same_rows(4, 2)
    assert exchanges == [[[0, 2], [1, 3]]] and data_group() is None and "sum_over_batch" not in SERVICES
    assert (num_copies(), num_slices()) == (4, 2)
    sums = torch.ones(2, requires_grad=True)
    assert sum_over_batch(sums) is sums


def test_a_process_alone_needs_no_exchange() -> None:
    hold_same_rows(1)
    assert data_group() is None and "sum_over_batch" not in SERVICES
    assert (num_copies(), num_slices()) == (1, 1)


@pytest.mark.parametrize(("processes", "copies", "expected"), [(8, 2, 4), (8, 1, 8), (8, 8, 1), (1, 2, 1)])
def test_parts_of_a_batch(monkeypatch: pytest.MonkeyPatch, processes: int, copies: int, expected: int) -> None:
    monkeypatch.setattr(ranks, "_copies", copies)
    arguments: Any = SimpleNamespace(world_size=processes)
    assert num_data_ranks(arguments) == expected


def test_sums_and_their_gradients_are_those_of_all_ranks(exchanges: list[Any]) -> None:
    hold_same_rows(2)
    given = torch.tensor([1.0, 2.0], requires_grad=True)
    found = sum_over_batch(given)
    assert found.tolist() == [3, 6] and given.tolist() == [1, 2]
    (found * torch.tensor([1.0, 10.0])).sum().backward()
    assert given.grad is not None and given.grad.tolist() == [3, 30]
    assert exchanges[1:] == [GROUP, GROUP]
    with torch.no_grad():
        assert sum_over_batch(given) is given
    assert len(exchanges) == 3
