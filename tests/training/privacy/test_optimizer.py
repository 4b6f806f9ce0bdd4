"""Rows are clipped one by one, and the noise is what was asked for."""

import pytest
import torch
from torch import nn

from tests.training.privacy.conftest import REASON

opacus = pytest.importorskip("opacus", reason=REASON)

from chorus_moe.training.privacy.optimizer import OPTIMIZERS, PrivateOptimizer, secret_generator  # noqa: E402


def make_optimizer(
    kind: str, parameters: list[nn.Parameter], noise: float, clip: float, rows: float
) -> PrivateOptimizer:
    plain = torch.optim.SGD(parameters, lr=1.0)
    return OPTIMIZERS[kind](plain, max_grad_norm=clip, expected_rows=rows, noise_multiplier=noise, seed=1)


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(3, 4)), nn.Parameter(torch.zeros(5))]


@pytest.mark.parametrize(("kind", "order"), [("gaussian", 2), ("laplace", 1)])
def test_the_step_is_the_sum_of_clipped_rows_over_the_expected_number(kind: str, order: int) -> None:
    trained = parameters()
    optimizer = make_optimizer(kind, trained, 1e-12, clip=2.0, rows=4)
    torch.manual_seed(0)
    expected = torch.zeros(17)
    for size in (0.01, 1.0, 100.0):
        row = size * torch.randn(17)
        trained[0].grad, trained[1].grad = row[:12].view(3, 4).clone(), row[12:].clone()
        expected += row * min(1.0, 2.0 / float(row.norm(order)))
        optimizer.add_row()
    optimizer.step()
    moved = torch.cat([parameter.detach().flatten() for parameter in trained])
    torch.testing.assert_close(moved, -expected / 4, atol=1e-5, rtol=1e-5)


def test_clipping_is_that_of_opacus() -> None:
    trained, theirs = parameters(), parameters()
    ours = make_optimizer("gaussian", trained, 1e-12, clip=0.5, rows=3)
    wrapped = opacus.optimizers.DPOptimizer(
        torch.optim.SGD(theirs, lr=1.0), noise_multiplier=0.0, max_grad_norm=0.5, expected_batch_size=3
    )
    torch.manual_seed(0)
    for parameter, other in zip(trained, theirs, strict=True):
        other.grad_sample = torch.randn(3, *parameter.shape)
    for row in range(3):
        for parameter, other in zip(trained, theirs, strict=True):
            parameter.grad = other.grad_sample[row].clone()
        ours.add_row()
    ours.step()
    wrapped.step()
    for parameter, other in zip(trained, theirs, strict=True):
        torch.testing.assert_close(parameter, other, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("kind", "variance"), [("gaussian", 1.0), ("laplace", 2.0)])
def test_the_noise_has_its_variance_and_its_form_also_without_rows(kind: str, variance: float) -> None:
    weight = nn.Parameter(torch.zeros(200_000))
    optimizer = make_optimizer(kind, [weight], noise=3.0, clip=0.5, rows=10)
    optimizer.step()
    drawn = weight.detach() * 10 / (3.0 * 0.5)
    # Standard errors of 200,000 draws: mean below 0.004, variance below 0.006 (laplace 0.011).
    assert float(drawn.mean()) == pytest.approx(0.0, abs=0.015)
    assert float(drawn.var()) == pytest.approx(variance, rel=0.03)
    # Mean distance from zero: sqrt(2 / pi) of a normal variable, 1 of a Laplace variable of scale 1.
    assert float(drawn.abs().mean()) == pytest.approx(0.7979 if kind == "gaussian" else 1.0, rel=0.02)
    before = weight.detach().clone()
    optimizer.step()
    # New noise for each update: two of them are uncorrelated.
    second = weight.detach() - before
    assert abs(float(torch.corrcoef(torch.stack([before, second]))[0, 1])) < 0.01


def test_a_row_that_breaks_adds_nothing_and_is_counted() -> None:
    trained = parameters()
    optimizer = make_optimizer("gaussian", trained, 1e-12, clip=1.0, rows=1)
    trained[0].grad = torch.full((3, 4), torch.nan)
    optimizer.add_row()
    trained[1].grad = torch.full((5,), 0.1)
    optimizer.add_row()
    optimizer.step()
    assert optimizer.num_broken_rows == 1
    torch.testing.assert_close(trained[0].detach(), torch.zeros(3, 4), atol=1e-9, rtol=0)
    torch.testing.assert_close(trained[1].detach(), torch.full((5,), -0.1), atol=1e-6, rtol=0)


def test_no_seed_of_a_run_gives_its_noise_away() -> None:
    drawn = []
    for _ in range(2):
        torch.manual_seed(0)
        drawn.append(torch.rand(4, generator=secret_generator()))
    assert not torch.equal(*drawn)
