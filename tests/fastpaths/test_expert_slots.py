"""When experts run by plain sorting, and when in units."""

import pytest
import torch

from chorus_moe.fastpaths import expert_slots
from chorus_moe.fastpaths.expert_slots import (
    ALIKE_ROWS,
    ALIKE_TRAINING_ROWS,
    FEW_ROWS,
    PADDED_ROWS,
    SlotPlan,
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


@pytest.mark.usefixtures("one_thread")
def test_several_threads_keep_the_old_limit(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert few_rows(weights(256), is_training=False) == FEW_ROWS
    assert few_rows(weights(256), is_training=True) == expert_slots.FEW_TRAINING_ROWS
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert few_rows(weights(256), is_training=False) == 32
    assert few_rows(weights(256, torch.bfloat16), is_training=False) == FEW_ROWS


def rows_of(plan: SlotPlan) -> list[tuple[int, int]]:
    """(expert, slot) of every slot of the units, in their order."""
    return [
        (expert, unit.start + (expert - unit.first) * unit.rows + row)
        for unit in plan.units
        for expert in range(unit.first, unit.last)
        for row in range(unit.rows)
    ]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize(
    ("tokens", "experts", "sentinels", "few"),
    [(1, 4, 0, 0), (7, 3, 0, 0), (40, 6, 5, 0), (200, 12, 30, 0), (600, 2, 1, 0), (900, 3, 0, 0), (9, 4, 3, 99),
     (5, 4, 5, 0)],
)  # fmt: skip
def test_every_choice_stands_in_a_slot_of_its_expert(
    tokens: int, experts: int, sentinels: int, few: float, alike: bool, threads: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(expert_slots, "treats_operands_alike", lambda: alike)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    generator = torch.Generator().manual_seed(tokens)
    index = torch.stack([torch.randperm(experts, generator=generator)[:2] for _ in range(tokens)])
    index[:sentinels, 1] = experts + 1
    plan = make_slot_plan(index, experts, few)
    assert plan.counts == [int((index == expert).sum()) for expert in range(experts)]
    assert plan.is_sparse == (few > 0) and plan.by_row == alike
    assert (plan.sentinel_TK is None) == (sentinels == 0)
    chosen = [(t, k) for t in range(tokens) for k in range(2) if index[t, k] < experts]
    slots = [int(plan.slot_TK[t, k]) for t, k in chosen]
    assert len(set(slots)) == len(slots)
    assert [int(plan.token_P[slot]) for slot in slots] == [t for t, _ in chosen]
    if plan.is_sparse:
        assert plan.units == [] and sorted(slots) == list(range(len(slots)))
        by_slot = sorted(zip(slots, chosen, strict=True))
        assert [int(index[t, k]) for _, (t, k) in by_slot] == sorted(int(index[t, k]) for t, k in chosen)
    else:
        expert_of = {slot: expert for expert, slot in rows_of(plan)}
        # A padded row may stand behind the last expert's; all others lie within the units.
        assert set(slots) <= expert_of.keys() and max(slots, default=0) < len(plan.token_P)
        assert [expert_of[slot] for slot in slots] == [int(index[t, k]) for t, k in chosen]
        for unit in plan.units:
            assert unit.slots == slice(unit.start, unit.start + (unit.last - unit.first) * unit.rows)
        # One chunk of each expert writes the weights' gradient.
        opened = [expert for unit in plan.units if unit.opens for expert in range(unit.first, unit.last)]
        assert sorted(opened) == sorted(set(opened)) and set(opened) >= {int(index[t, k]) for t, k in chosen}
    values = torch.randn(index.shape, generator=generator)
    real = index < experts
    assert torch.equal(plan.from_slots(plan.to_slots(values)), values.where(real, 0.0))


@pytest.mark.parametrize(
    ("counts", "threads", "groups"),
    [
        # 16 rows take as long as 10 or 12: the three are one product. A fourth of 30 would pad them all to 32.
        ([10, 12, 16], 1, [(0, 3, 16)]),
        ([10, 12, 16, 30], 1, [(0, 3, 16), (3, 4, 30)]),
        ([0, 5, 0, 5], 1, [(1, 2, 5), (3, 4, 5)]),
        # 17 rows cost 32; three times 32 against 16 + 16 + 32 do not pay on one thread.
        ([16, 16, 17], 1, [(0, 2, 16), (2, 3, 17)]),
        # With several threads padding may cost a fifth.
        ([16, 17, 17, 17, 17], 1, [(0, 1, 16), (1, 5, 17)]),
        ([33, 17], 1, [(0, 1, 33), (1, 2, 17)]),
        ([33, 17], 2, [(0, 2, 33)]),
        ([1], 1, [(0, 1, 2)]),
    ],
)
def test_experts_of_like_rows_are_one_product(
    counts: list[int], threads: int, groups: list[tuple[int, int, int]], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    units, _, _ = expert_slots._make_units(counts, is_padded=True)
    assert [(unit.first, unit.last, unit.rows) for unit in units] == groups
    alone, shifts, slots = expert_slots._make_units(counts, is_padded=False)
    assert all(unit.last - unit.first == 1 for unit in alone) and slots == sum(counts) and not any(shifts)
    assert [expert_slots._tiled(rows) for rows in (0, 1, 16, 17)] == [0, 16, 16, 32]
