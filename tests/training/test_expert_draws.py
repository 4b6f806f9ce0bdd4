"""Draws of experts and their probabilities."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chorus_moe.modeling.moe_selection import best_experts
from chorus_moe.training.expert_draws import draw_log_probability, perturbed


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


def test_the_gradient_of_a_draw_skips_sentinels():
    log_weights = torch.randn(2, 4, requires_grad=True)
    index = torch.tensor([[2, 4], [1, 0]])
    draw_log_probability(log_weights, index, index == 4)[0].backward()
    expected = -log_weights.detach().softmax(dim=-1)
    expected[0, 2] += 1
    # One float32 softmax by way of cumulated sums.
    torch.testing.assert_close(log_weights.grad[0], expected[0], rtol=0, atol=1e-6)
    assert not log_weights.grad[1].any()
