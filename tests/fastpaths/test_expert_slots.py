"""When experts run by plain sorting, and when in units."""

import pytest
import torch

from chorus_moe.fastpaths import expert_slots
from chorus_moe.fastpaths.expert_slots import (
    ALIKE_ROWS,
    ALIKE_TRAINING_ROWS,
    FEW_ROWS,
    PADDED_ROWS,
    few_rows,
    make_slot_plan,
)


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch):
    """On a processor that packs the right operand anew."""
    monkeypatch.setattr(expert_slots, "treats_operands_alike", lambda: False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def weights(width: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(4, 2 * width, 512, dtype=dtype, device="meta")


@pytest.mark.usefixtures("one_thread")
def test_the_smaller_the_expert_the_more_rows_are_few():
    assert [few_rows(weights(width), is_training=False) for width in (1024, 512, 256)] == [8, 16, 32]
    assert few_rows(weights(8), is_training=False) == PADDED_ROWS
    assert few_rows(weights(8192), is_training=False) == FEW_ROWS


@pytest.mark.usefixtures("one_thread")
def test_bfloat16_is_trained_in_units_and_decoded_by_sorting():
    assert few_rows(weights(512, torch.bfloat16), is_training=True) == 0
    assert few_rows(weights(512, torch.bfloat16), is_training=False) == FEW_ROWS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("is_training", "limit"), [(False, ALIKE_ROWS), (True, ALIKE_TRAINING_ROWS)])
def test_where_both_operands_are_alike_units_are_for_many_rows_and_without_padding(
    dtype: torch.dtype, is_training: bool, limit: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(expert_slots, "treats_operands_alike", lambda: True)
    few = few_rows(weights(512, dtype), is_training)
    index = torch.tensor([0] * (limit - 1) + [2]).unsqueeze(1)
    assert make_slot_plan(index, num_experts=8, few_rows=few).is_sparse
    index = torch.tensor([0] * (2 * limit - 1) + [1]).unsqueeze(1)
    plan = make_slot_plan(index, num_experts=8, few_rows=few)
    assert not plan.is_sparse
    assert [(unit.first, unit.last, unit.rows) for unit in plan.units] == [(0, 1, 2 * limit - 1), (1, 2, 1)]


@pytest.mark.parametrize(("few", "is_sparse"), [(2.5, True), (2.0, False)])
def test_rows_are_counted_in_the_mean_of_the_experts_that_are_chosen(few: float, is_sparse: bool):
    index = torch.tensor([[0], [0], [0], [3]])
    plan = make_slot_plan(index, num_experts=8, few_rows=few)
    assert plan.is_sparse == is_sparse
    assert bool(plan.units) != is_sparse
