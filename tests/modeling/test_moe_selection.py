"""From scores to experts: ties, groups, adaptive K, draws and weights."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from chorus_moe.modeling.moe_selection import (
    FEW_TOKENS,
    MANY_CHOICES,
    best_experts,
    choice_weights,
    draw_log_probability,
    limit_groups,
    normalised_entropy,
    perturbed,
    unused_slots,
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
    found = (~unused_slots(torch.tensor([complexity]) * top_k, top_k)).sum().item()
    assert found == min(max(1, int(torch.tensor(complexity).mul(top_k).ceil())), top_k)


@given(st.lists(st.floats(0, 9, width=32), min_size=1, max_size=5), st.integers(1, 6))
def test_all_slots_are_used_just_where_none_is_unused(limits: list[float], top_k: int):
    limit = torch.tensor(limits)
    assert uses_all_slots(limit, top_k) == (not unused_slots(limit, top_k).any())


def test_slots_beyond_the_number_kept_are_unused_and_the_first_never_is():
    unused = [[False, True, True], [False, False, False], [False, True, True]]
    assert unused_slots(torch.tensor([1, 5, 0]), 3).tolist() == unused


def test_draws_have_the_probabilities_that_their_logarithm_says():
    log_weights = torch.tensor([[1.0, 0.0, -0.5, 0.3]])
    generator_state = torch.random.get_rng_state()
    torch.manual_seed(0)
    draws = best_experts(perturbed(log_weights.expand(40_000, 4).contiguous()), 2)
    torch.random.set_rng_state(generator_state)
    for pair in itertools.permutations(range(4), 2):
        expected = draw_log_probability(log_weights, torch.tensor([pair])).exp().item()
        found = (draws == torch.tensor(pair)).all(dim=-1).float().mean().item()
        # Binomial: three standard deviations of a share of 40,000 draws are below 0.0075.
        assert found == pytest.approx(expected, abs=0.0075), pair


def test_the_probabilities_of_all_ordered_draws_sum_to_one():
    log_weights = torch.randn(1, 5)
    pairs = torch.tensor(list(itertools.permutations(range(5), 3)))
    total = draw_log_probability(log_weights.expand(len(pairs), 5), pairs).exp().sum()
    # 60 float32 terms.
    assert total.item() == pytest.approx(1.0, abs=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 4))
def test_the_gradient_of_a_draw_is_that_of_successive_softmaxes(seed: int, top_k: int):
    generator = torch.Generator().manual_seed(seed)
    log_weights = torch.randn(3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    index = torch.stack([torch.randperm(4, generator=generator)[:top_k] for _ in range(3)])
    expected = log_weights.new_zeros(())
    for row, chosen in enumerate(index.tolist()):
        left = list(range(4))
        for expert in chosen:
            expected = expected + log_weights[row, left].log_softmax(dim=0)[left.index(expert)]
            left.remove(expert)
    found = draw_log_probability(log_weights, index).sum()
    first, second = (torch.autograd.grad(total, log_weights, retain_graph=True)[0] for total in (expected, found))
    torch.testing.assert_close(second, first)
    torch.testing.assert_close(found, expected)


def test_sentinels_are_no_draws():
    log_weights = torch.randn(2, 4)
    one = draw_log_probability(log_weights, torch.tensor([[2], [1]]))
    index = torch.tensor([[2, 4], [1, 4]])
    assert torch.equal(one, draw_log_probability(log_weights, index, index == 4))


def test_the_gradient_of_a_draw_passes_by_sentinels():
    log_weights = torch.randn(2, 4, requires_grad=True)
    index = torch.tensor([[2, 4], [1, 0]])
    draw_log_probability(log_weights, index, index == 4)[0].backward()
    expected = -log_weights.detach().softmax(dim=-1)
    expected[0, 2] += 1
    # One float32 softmax by way of cumulated sums.
    torch.testing.assert_close(log_weights.grad[0], expected[0], rtol=0, atol=1e-6)
    assert not log_weights.grad[1].any()


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
