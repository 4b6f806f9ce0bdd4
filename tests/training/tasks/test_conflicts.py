"""Gradients of tasks that pull apart: the library against a few lines, and what is left alone."""

import math

import pytest
import torch
from torch import Tensor, nn

from chorus_moe.training.tasks.conflicts import TaskGradients

BANK = "model.language_model.layers.1.mlp.banks.image.experts.up_proj"
OTHER = "model.language_model.norm.weight"
CONFLICT = torch.tensor([[1.0, 0.0, 2.0], [-3.0, 1.0, 0.5]])


def settled(gradients: Tensor, method: str, seed: int = 0, step: int = 1) -> Tensor:
    """`(N,)`: what a parameter gets for gradients `(K, N)`; each loss is a product with its own."""
    parameter = nn.Parameter(torch.zeros(gradients.shape[1]))
    names = [str(task) for task in range(len(gradients))]
    tasks = TaskGradients(names, {OTHER: parameter}, method, seed)
    tasks.add(gradients @ parameter, [True] * len(names))
    tasks.settle(step)
    assert parameter.grad is not None
    return parameter.grad


def test_pcgrad_of_two_takes_from_each_what_points_against_the_other() -> None:
    a, b = CONFLICT
    assert a @ b < 0
    expected = (a - (a @ b) / (b @ b) * b) + (b - (a @ b) / (a @ a) * a)
    torch.testing.assert_close(settled(CONFLICT, "pcgrad"), expected)
    # Nobody loses: the step points against no task.
    assert (CONFLICT @ expected > 0).all()


@pytest.mark.parametrize("method", ["pcgrad", "measure"])
def test_tasks_that_agree_are_added_up(method: str) -> None:
    agreeing = torch.tensor([[1.0, 0.0, 2.0], [3.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    torch.testing.assert_close(settled(agreeing, method), agreeing.sum(dim=0))


def test_aligned_mtl_evens_the_singular_values() -> None:
    # By the singular vectors of the gradients themselves, where the library takes those of their products.
    left, values, right = torch.linalg.svd(CONFLICT, full_matrices=False)
    expected = values.min() * (left @ right).sum(dim=0)
    torch.testing.assert_close(settled(CONFLICT, "aligned_mtl"), expected, atol=1e-5, rtol=1e-5)


def test_upgrad_projects_onto_what_no_task_objects_to() -> None:
    pytest.importorskip("quadprog", reason="under the GPL, so not among our dependencies")
    # With two tasks the projection onto the dual cone is PCGrad's.
    torch.testing.assert_close(settled(CONFLICT, "upgrad"), settled(CONFLICT, "pcgrad"), atol=1e-2, rtol=1e-2)


def test_what_one_task_alone_reaches_is_its_own() -> None:
    shared, own, unused = (nn.Parameter(torch.zeros(3)) for _ in range(3))
    tasks = TaskGradients(["a", "b"], {OTHER: shared, BANK: own, "unused": unused}, "pcgrad", 0)
    # Task b reaches the bank, too, but with a gradient of zero: it was routed elsewhere.
    losses = CONFLICT @ shared + torch.stack([own.sum() * 5, own.sum() * 0])
    tasks.add(losses, [True, True])
    tasks.settle(1)
    torch.testing.assert_close(shared.grad, settled(CONFLICT, "pcgrad"))
    assert own.grad is not None and own.grad.tolist() == [5, 5, 5]
    assert unused.grad is None


def test_micro_batches_are_summed_before_they_conflict_and_other_losses_are_added() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    parameter.grad = torch.tensor([10.0, 0.0, 0.0])
    tasks = TaskGradients(["a", "b"], {OTHER: parameter}, "pcgrad", 0)
    # The first micro-batch has rows of one task only.
    for losses, present in ((CONFLICT * 0.25, [True, False]), (CONFLICT * torch.tensor([[0.75], [1.0]]), [True, True])):
        tasks.add(losses @ parameter, present)
    tasks.settle(1)
    torch.testing.assert_close(parameter.grad, settled(CONFLICT, "pcgrad") + torch.tensor([10.0, 0.0, 0.0]))
    # The next step begins with nothing.
    parameter.grad = None
    tasks.add(CONFLICT @ parameter, [True, False])
    tasks.settle(2)
    torch.testing.assert_close(parameter.grad, CONFLICT[0])


def test_a_gradient_that_is_not_finite_stays_so() -> None:
    spoiled = CONFLICT.clone()
    spoiled[1, 0] = torch.nan
    for method in ("pcgrad", "aligned_mtl"):
        assert settled(spoiled, method)[0].isnan()


def test_the_order_of_pcgrad_follows_from_seed_and_step() -> None:
    gradients = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    state = torch.get_rng_state()
    first = settled(gradients, "pcgrad", seed=3, step=2)
    assert torch.get_rng_state().equal(state)
    torch.manual_seed(99)
    assert settled(gradients, "pcgrad", seed=3, step=2).equal(first)
    assert any(not settled(gradients, "pcgrad", seed=3, step=step).equal(first) for step in range(3, 9))


def test_cosines_are_logged_by_bank_as_a_mean_over_steps() -> None:
    bank, other = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    tasks = TaskGradients(["a", "b"], {BANK: bank, OTHER: other}, "measure", 0)
    for angle in (0.0, math.pi / 3):
        directions = torch.tensor([[1.0, 0.0], [3 * math.cos(angle), 3 * math.sin(angle)]])
        tasks.add(directions @ bank + torch.tensor([[1.0, 0.0], [0.0, 0.0]]) @ other, [True, True])
        tasks.settle(1)
    found = tasks.take_cosines()
    # Only one task reaches what is outside of banks.
    assert found == {"grad_cosine/image/a-b": pytest.approx(0.75)}
    assert tasks.take_cosines() == {}
