"""Weights of tasks, against the library that has them for losses of a whole batch."""

import json

import pytest
import torch
from torch import nn
from torchjd.scalarization import DWA, UW

from chorus_moe.training.tasks.arguments import TaskArguments
from chorus_moe.training.tasks.plan import TaskPlan, plan_tasks
from chorus_moe.training.tasks.weights import RateWeights, UncertaintyWeights

TOKENS = torch.tensor([10.0, 10.0])


def plan_of(**options: float) -> TaskPlan:
    return plan_tasks(TaskArguments(task_weighting="rate", **options), [{"task": "a"}, {"task": "b"}])


def regulariser(weights: UncertaintyWeights, tokens: torch.Tensor) -> torch.Tensor:
    weights.tokens_K = tokens
    return weights(nn.Identity(), {}, None)


def total_of(weights: UncertaintyWeights, means: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The loss of a step of one micro-batch, from mean losses of the tasks."""
    return (weights.weights() * means * tokens).sum() / tokens.sum() + regulariser(weights, tokens)


def test_uncertainty_is_that_of_torchjd_for_twice_the_loss() -> None:
    # torchjd has the form for squared errors, exp(-s) L / 2 + s / 2, summed over tasks; equal shares make it a mean.
    weights, theirs, means = UncertaintyWeights(plan_of()), UW(2), torch.tensor([0.3, 4.0])
    with torch.no_grad():
        weights.log_variances.copy_(torch.tensor([0.5, -1.0]))
        theirs.log_var.copy_(weights.log_variances)
    ours, expected = total_of(weights, means, TOKENS), theirs(2 * means) / 2
    assert ours.item() == pytest.approx(expected.item(), rel=1e-6)
    ours.backward()
    expected.backward()
    torch.testing.assert_close(weights.log_variances.grad, theirs.log_var.grad)


def test_the_learned_weight_is_one_over_twice_the_loss() -> None:
    weights, means, tokens = UncertaintyWeights(plan_of()), torch.tensor([0.25, 2.0]), torch.tensor([90.0, 10.0])
    optimizer = torch.optim.SGD(weights.parameters(), lr=2.0)
    for _ in range(400):
        optimizer.zero_grad()
        total_of(weights, means, tokens).backward()
        optimizer.step()
    assert weights.weights().tolist() == pytest.approx((1 / (2 * means)).tolist(), rel=1e-3)


def test_its_regulariser_does_not_grow_with_the_number_of_micro_batches() -> None:
    weights, tokens = UncertaintyWeights(plan_of()), torch.tensor([[6.0, 0.0], [1.0, 5.0]])
    with torch.no_grad():
        weights.log_variances.copy_(torch.tensor([1.0, 3.0]))
    parts = sum(regulariser(weights, row) * row.sum() / tokens.sum() for row in tokens)
    assert parts.item() == pytest.approx(regulariser(weights, tokens.sum(dim=0)).item())


def test_rates_are_those_of_torchjd() -> None:
    rates, theirs = RateWeights(plan_of(task_rate_steps=3, task_rate_softness=1.5), {}), DWA(temperature=1.5)
    generator = torch.Generator().manual_seed(0)
    for step in range(12):
        means = torch.rand(2, generator=generator) + 0.1
        values = means.clone().requires_grad_()
        theirs(values).backward()
        assert rates.weights() == pytest.approx(values.grad.tolist(), rel=1e-6)
        rates.add(means * TOKENS, TOKENS)
        if step % 3 == 2:
            theirs.step()


def test_the_task_that_learns_slowly_weighs_more() -> None:
    rates = RateWeights(plan_of(task_rate_steps=1), {})
    assert rates.weights() == [1, 1]
    rates.add(torch.tensor([10.0, 10.0]), TOKENS)
    rates.add(torch.tensor([9.0, 5.0]), TOKENS)
    slow, fast = rates.weights()
    assert slow > 1 > fast
    assert slow + fast == pytest.approx(2)


def test_a_window_waits_for_every_task_and_a_skipped_step_is_none() -> None:
    rates = RateWeights(plan_of(task_rate_steps=2), {})
    for sums, tokens in (([4.0, 0.0], [2.0, 0.0]), ([6.0, 0.0], [2.0, 0.0]), ([torch.nan, 1.0], [1.0, 1.0])):
        rates.add(torch.tensor(sums), torch.tensor(tokens))
    assert rates.memory["windows"] == []
    rates.add(torch.tensor([2.0, 9.0]), torch.tensor([2.0, 3.0]))
    assert rates.memory["windows"] == [[2.0, 3.0]]


def test_json_keeps_what_it_remembers_to_the_bit() -> None:
    memory: dict[str, object] = {}
    rates = RateWeights(plan_of(task_rate_steps=1), memory)
    for seed in range(3):
        rates.add(torch.rand(2, generator=torch.Generator().manual_seed(seed)), torch.tensor([3.0, 7.0]))
    again = RateWeights(plan_of(task_rate_steps=1), json.loads(json.dumps(memory, allow_nan=False)))
    assert again.weights() == rates.weights()
