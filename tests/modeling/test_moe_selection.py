"""From scores to experts: ties, groups, adaptive K and weights."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from chorus_moe.modeling.modeling_outputs import BankRouting
from chorus_moe.modeling.moe_selection import (
    FEW_TOKENS,
    MANY_CHOICES,
    Places,
    best_experts,
    choice_weights,
    count_choices,
    limit_groups,
    normalised_entropy,
    used_parts,
    uses_all_slots,
)

SIZES = [1, FEW_TOKENS, FEW_TOKENS + 1, 300]


def slow_best(scores: Tensor, top_k: int) -> list[list[int]]:
    return [sorted(range(len(row)), key=lambda e: -row[e])[:top_k] for row in scores.tolist()]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("top_k", [1, 3, MANY_CHOICES + 1])
def test_of_equals_the_lower_index_comes_first_at_any_number_of_tokens(size: int, top_k: int):
    scores = torch.randint(0, 3, (size, 12), generator=torch.Generator().manual_seed(0)).float() * -0.0
    scores = scores + torch.randint(-1, 2, scores.shape, generator=torch.Generator().manual_seed(1))
    assert best_experts(scores, top_k).tolist() == slow_best(scores, top_k)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("top_k", [1, 4])
def test_compiled_ties_are_as_in_eager(size: int, top_k: int):
    torch.compiler.reset()
    scores = torch.randint(0, 2, (size, 16), generator=torch.Generator().manual_seed(0)).float()
    compiled = torch.compile(best_experts, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(scores, top_k), best_experts(scores, top_k))


def test_a_group_is_worth_its_two_best():
    # Sums of the two best: 1.5, 1.6, 0.5, 1.5; the tie of the first and the last goes to the first.
    scores = torch.tensor([[0.9, 0.6, 0.1, 0.8, 0.8, 0.0, 0.3, 0.2, 0.0, 0.75, 0.75, 0.7]])
    limited = limit_groups(scores, num_groups=4, topk_groups=2)
    assert torch.equal(limited[0, :6], scores[0, :6])
    assert limited[0, 6:].tolist() == [-torch.inf] * 6


def test_groups_of_one_expert_are_worth_that_expert():
    limited = limit_groups(torch.tensor([[0.25, 0.5, 0.75]]), num_groups=3, topk_groups=2)
    assert limited[0].tolist() == [-torch.inf, 0.5, 0.75]


def test_entropy_is_one_when_all_experts_are_alike_and_zero_when_one_is_certain():
    entropy = normalised_entropy(torch.tensor([[0.0, 0.0, 0.0], [500.0, 0.0, 0.0]]))
    # One float32 rounding of log 3.
    torch.testing.assert_close(entropy, torch.tensor([1.0, 0.0]), rtol=0, atol=1e-6)


@given(st.floats(0, 1, width=32), st.integers(1, 16))
def test_the_number_of_experts_is_the_rounded_up_share_of_k(complexity: float, top_k: int):
    found = (used_parts(torch.tensor([complexity]) * top_k, top_k) > 0).sum().item()
    assert found == min(max(1, int(torch.tensor(complexity).mul(top_k).ceil())), top_k)


@given(st.lists(st.floats(0, 9, width=32), min_size=1, max_size=5), st.integers(1, 6))
def test_all_slots_are_used_just_where_none_is_unused(limits: list[float], top_k: int):
    limit = torch.tensor(limits)
    assert uses_all_slots(limit, top_k) == (used_parts(limit, top_k).all().item())


def test_slots_beyond_the_number_kept_are_unused_and_the_first_never_is():
    unused = [[False, True, True], [False, False, False], [False, True, True]]
    assert (used_parts(torch.tensor([1, 5, 0]), 3) == 0).tolist() == unused


@pytest.mark.parametrize("is_normalised", [True, False])
def test_unused_slots_have_no_weight_and_no_gradient(is_normalised: bool):
    log_weights = torch.randn(3, 5).log_softmax(dim=-1).requires_grad_()
    index = torch.tensor([[1, 0, 4], [2, 4, 3], [0, 2, 1]])
    is_unused = torch.tensor([[False, False, True], [False, True, True], [False, False, False]])
    weights = choice_weights(log_weights, index, is_normalised, is_unused)
    weights.square().sum().backward()
    assert torch.equal(weights > 0, ~is_unused)
    assert log_weights.grad.isfinite().all()
    assert not log_weights.grad[1, [4, 3]].any()
    if is_normalised:
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(3))


@pytest.mark.parametrize(
    ("size", "top_k", "sorts"),
    [(64, 1, 0), (64, 2, 1), (65, 2, 0), (65, 8, 0), (65, 9, 1), (1, 1, 0), (1, 2, 1)],
)
def test_few_tokens_or_many_choices_are_sorted_and_others_are_maxima(
    size: int, top_k: int, sorts: int, monkeypatch: pytest.MonkeyPatch
):
    """Either is the faster where it runs; neither changes what it was given."""
    calls, sort = [], torch.sort
    monkeypatch.setattr(torch, "sort", lambda *given, **options: calls.append(1) or sort(*given, **options))
    scores = torch.randn(size, 12)
    before = scores.clone()
    assert best_experts(scores, top_k).tolist() == slow_best(scores, top_k)
    assert len(calls) == sorts and torch.equal(scores, before)


@pytest.mark.parametrize("top_k", [1, 3, 4])
def test_parts_of_slots_are_what_a_limit_leaves_of_them(top_k: int):
    limits = [0.0, 0.5, 1.0, 1.25, 2.0, 2.75, 4.0, 9.0]
    expected = [[min(max(max(limit, 1.0) - slot, 0.0), 1.0) for slot in range(top_k)] for limit in limits]
    assert used_parts(torch.tensor(limits), top_k).tolist() == expected


@pytest.mark.parametrize("scale", [1, 4])
@pytest.mark.parametrize("experts", [1, 2, 5])
def test_entropy_is_a_share_of_the_largest_times_a_scale(experts: int, scale: int):
    logits = torch.randn(6, experts, generator=torch.Generator().manual_seed(0))
    found = normalised_entropy(logits, scale)
    for row, value in zip(logits.double().softmax(-1).tolist(), found.tolist(), strict=True):
        expected = -sum(p * math.log(p) for p in row) / math.log(max(experts, 2)) * scale
        assert value == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("mask", [None, [True, False, True]])
def test_choices_are_counted_on_real_rows_and_unused_slots_are_none(mask: list[bool] | None):
    chosen = torch.tensor([[0, 4], [0, 5], [4, 5]])
    routing = BankRouting(torch.zeros(3, 5), torch.zeros(3, 2), chosen, None if mask is None else torch.tensor(mask))
    assert count_choices(routing).tolist() == ([2, 0, 0, 0, 2] if mask is None else [1, 0, 0, 0, 2])


def test_a_part_of_a_slot_is_that_part_of_its_weight():
    log_weights, index = torch.randn(2, 5), torch.tensor([[1, 0, 4], [2, 4, 3]])
    part = torch.tensor([[1.0, 0.5, 0.0], [1.0, 1.0, 0.25]])
    raw = log_weights.exp().gather(1, index) * part
    torch.testing.assert_close(choice_weights(log_weights, index, False, None, part), raw, rtol=1e-4, atol=1e-5)
    normed = choice_weights(log_weights, index, True, part == 0, part)
    torch.testing.assert_close(normed, raw / raw.sum(1, keepdim=True), rtol=1e-5, atol=1e-6)


def test_places_number_sequences_and_the_rows_that_count_in_them():
    found = Places.find(torch.tensor([7, 7, 2, 2, 2, 9]), torch.tensor([0, 1, 1, 0, 1, 1]).bool())
    assert found.sequence_R.tolist() == [0, 0, 1, 1, 1, 2]
    assert found.rank_R.tolist() == [0, 0, 0, 1, 1, 0] and found.shape == (3, 2)
    everyone = Places.find(torch.tensor([7, 7, 2]), None)
    assert (everyone.rank_R.tolist(), everyone.shape) == ([0, 1, 0], (2, 2)) and everyone.is_counted_R.all()
    assert Places.find(torch.zeros(0, dtype=torch.long), None).shape == (0, 0)


@pytest.mark.parametrize(
    ("capacity", "expected"), [(3, [3, 3, 3, 3]), (0.01, [1, 1, 1, 1]), (2.0, [1, 2, 3, 4]), (1.0, [1, 1, 2, 2])]
)
def test_a_number_is_a_capacity_and_a_factor_one_of_the_share_so_far(capacity: float, expected: list[int]):
    places = Places.find(torch.zeros(4, dtype=torch.long), None)
    found = places.capacity(capacity, 2, 4)
    assert found.tolist() == expected and found.dtype == torch.long


@pytest.mark.parametrize("kept", [1, 2, 3])
def test_groups_outside_the_best_are_closed(kept: int):
    scores = torch.randn(40, 12, generator=torch.Generator().manual_seed(0))
    limited = limit_groups(scores, 3, kept)
    for row, found in zip(scores.tolist(), limited.tolist(), strict=True):
        worth = [sum(sorted(row[start : start + 4])[-2:]) for start in (0, 4, 8)]
        best = sorted(range(3), key=lambda group: -worth[group])[:kept]
        assert found == [x if place // 4 in best else -math.inf for place, x in enumerate(row)]


def test_whether_all_slots_are_used_is_not_asked_of_another_device():
    assert not uses_all_slots(torch.ones(2, device="meta"), 1)
    assert uses_all_slots(torch.zeros(2), 1) and uses_all_slots(torch.zeros(0), 1)
    assert not uses_all_slots(torch.zeros(0), 2)
