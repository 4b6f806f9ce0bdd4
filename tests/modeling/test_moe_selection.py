"""From scores to experts: ties, groups, adaptive K and weights."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from chorus_moe.modeling.moe_selection import (
    FEW_TOKENS,
    MANY_CHOICES,
    best_experts,
    choice_weights,
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
