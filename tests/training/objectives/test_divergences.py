"""Divergences against torch.distributions, scipy and TRL, and what the rest of the probability does."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from torch.distributions import Categorical, kl_divergence

from chorus_moe.training.objectives.divergences import (
    LOSSES,
    TokenProbabilities,
    divergence,
    log_probabilities,
    relative_entropy,
    router_divergence,
    state_distance,
    token_divergence,
)

N, V = 7, 11
# float32 sums in another order, at divergences of size 1.
ATOL = 1e-6


@pytest.fixture
def logits() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(N, V) * 2, torch.randn(N, V) * 2


def test_forward_and_reverse_kl_are_those_of_torch_distributions(logits: tuple[torch.Tensor, torch.Tensor]) -> None:
    student, teacher = logits
    p, q = Categorical(logits=teacher / 3), Categorical(logits=student / 3)
    whole = TokenProbabilities(log_probabilities(teacher, 3.0))
    expected = {"forward_kl": kl_divergence(p, q) * 9, "reverse_kl": kl_divergence(q, p) * 9}
    for loss, value in expected.items():
        torch.testing.assert_close(
            token_divergence(student, whole, loss, temperature=3.0), value, atol=9 * ATOL, rtol=0
        )


def test_half_beta_is_the_jensen_shannon_divergence_of_scipy(logits: tuple[torch.Tensor, torch.Tensor]) -> None:
    student, teacher = logits
    expected = jensenshannon(teacher.double().softmax(-1).numpy(), student.double().softmax(-1).numpy(), axis=1) ** 2
    found = token_divergence(student, TokenProbabilities(log_probabilities(teacher, 1.0)), "jensen_shannon", beta=0.5)
    np.testing.assert_allclose(found.numpy(), expected, atol=ATOL)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("loss", "beta"), [("forward_kl", 0.0), ("reverse_kl", 1.0), ("jensen_shannon", 0.2)])
def test_value_and_gradient_are_those_of_trl_times_the_squared_temperature(
    logits: tuple[torch.Tensor, torch.Tensor], loss: str, beta: float
) -> None:
    gkd = pytest.importorskip("trl.experimental.gkd", reason="TRL is not installed (it is in the extra `dev`)")
    student, teacher = logits
    ours, theirs = (student.clone().requires_grad_() for _ in range(2))
    expected = 4 * gkd.GKDTrainer.generalized_jsd_loss(theirs, teacher, beta=beta, temperature=2.0)
    whole = TokenProbabilities(log_probabilities(teacher, 2.0))
    found = token_divergence(ours, whole, loss, beta=beta, temperature=2.0).mean()
    torch.testing.assert_close(found, expected, atol=4 * ATOL, rtol=0)
    found.backward(), expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, atol=4 * ATOL, rtol=0)


@pytest.mark.parametrize("loss", LOSSES)
def test_all_tokens_in_another_order_give_the_same_value_and_gradient(
    logits: tuple[torch.Tensor, torch.Tensor], loss: str
) -> None:
    student, teacher = logits
    whole = TokenProbabilities(log_probabilities(teacher, 1.0))
    kinds, grads = (whole, whole.top(V)), []
    assert whole.top(V).log_rest is None
    for kind in kinds:
        given = student.clone().requires_grad_()
        token_divergence(given, kind, loss).sum().backward()
        grads.append(given.grad)
    values = [token_divergence(student, kind, loss) for kind in kinds]
    torch.testing.assert_close(values[0], values[1], atol=ATOL, rtol=0)
    torch.testing.assert_close(grads[0], grads[1], atol=ATOL, rtol=0)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_rest_counts_as_one_token(logits: tuple[torch.Tensor, torch.Tensor], loss: str) -> None:
    student, teacher = (tensor.double().softmax(-1) for tensor in logits)
    whole = TokenProbabilities(log_probabilities(logits[1], 1.0))
    found = token_divergence(logits[0], whole.top(3), loss)
    order = teacher.argsort(dim=-1, descending=True)[:, :3]

    def pooled(p: torch.Tensor) -> torch.Tensor:
        top = p.gather(1, order)
        return torch.cat([top, 1 - top.sum(1, keepdim=True)], dim=1)

    expected = divergence(pooled(student).log(), pooled(teacher).log(), loss)
    torch.testing.assert_close(found.double(), expected, atol=ATOL, rtol=0)
    assert (
        found <= token_divergence(logits[0], TokenProbabilities(log_probabilities(logits[1], 1.0)), loss) + ATOL
    ).all()


def test_probabilities_of_zero_give_no_nan() -> None:
    teacher = torch.tensor([[0.0, 0.0, -torch.inf]])
    for loss in LOSSES:
        student = torch.zeros(1, 3, requires_grad=True)
        token_divergence(student, TokenProbabilities(log_probabilities(teacher, 1.0)), loss).sum().backward()
        assert student.grad is not None and student.grad.isfinite().all()
    # By hand: 2 * 1/2 log((1/2) / (1/3)).
    found = token_divergence(torch.zeros(1, 3), TokenProbabilities(log_probabilities(teacher, 1.0)), "forward_kl")
    assert found.item() == pytest.approx(np.log(1.5))


def test_a_rest_that_rounding_would_swallow_is_kept() -> None:
    top = TokenProbabilities(log_probabilities(torch.tensor([[40.0, 0.0, 0.0]]), 1.0)).top(1)
    assert top.log_rest is not None
    assert top.log_rest.item() == pytest.approx(np.log(2) - 40)


def test_the_distance_of_states_has_no_unit() -> None:
    teacher = torch.randn(4, 8)
    torch.testing.assert_close(state_distance(torch.zeros(4, 8), teacher), torch.ones(4))
    torch.testing.assert_close(state_distance(3 * teacher, teacher), torch.full((4,), 4.0))
    assert state_distance(teacher, teacher).max() == 0


def test_a_router_is_compared_with_the_sum_of_each_group_of_experts() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 2).softmax(-1), torch.randn(5, 6).softmax(-1)
    grouped = torch.stack([teacher[:, :3].sum(1), teacher[:, 3:].sum(1)], dim=1)
    expected = kl_divergence(Categorical(probs=grouped), Categorical(probs=student))
    torch.testing.assert_close(router_divergence(student, teacher), expected, atol=ATOL, rtol=0)
    equal = kl_divergence(Categorical(probs=teacher[:, :2]), Categorical(probs=student))
    normal = teacher[:, :2] / teacher[:, :2].sum(1, keepdim=True)
    torch.testing.assert_close(router_divergence(student, normal), equal, atol=ATOL, rtol=0)


def test_relative_entropy_is_of_the_last_dimension() -> None:
    torch.manual_seed(0)
    p, q = torch.randn(2, 3, 4, V).log_softmax(-1).unbind()
    expected = kl_divergence(Categorical(logits=p), Categorical(logits=q))
    torch.testing.assert_close(relative_entropy(p, q), expected, rtol=0, atol=ATOL)
