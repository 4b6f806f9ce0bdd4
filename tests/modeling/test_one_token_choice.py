"""One token decided in Python numbers equals one row decided in tensors."""

import math
from typing import Any

import pytest
import torch

from chorus_moe import ExpertBankConfig
from chorus_moe.modeling.one_token_choice import MOST_EXPERTS, best, best_groups, draw_log_probability, entropy_share
from chorus_moe.modeling.routers import ROUTER_CLASSES, Router
from chorus_moe.modeling.routing_options import RowOptions

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "probabilities": {"norm_topk_prob": False},
    "bias": {"balance": "bias"},
    "groups": {"num_groups": 4, "topk_groups": 2},
    "groups and bias": {"num_groups": 4, "topk_groups": 2, "balance": "bias"},
    "adaptive": {"adaptive_experts": True},
    "factor": {"routed_scaling_factor": 2.5, "norm_topk_prob": False, "adaptive_experts": True},
}
OPTIONS = {
    "none": RowOptions(),
    "budget": RowOptions(budget_R=torch.tensor([2])),
    "given complexity": RowOptions(complexity_R=torch.tensor([0.4])),
    "complexity left open": RowOptions(complexity_R=torch.tensor([torch.nan])),
    "sampled": RowOptions(is_sampled=True),
    "sampled within a budget": RowOptions(budget_R=torch.tensor([2]), is_sampled=True),
}


def make(kind: str, num_experts: int = 8, **settings: Any) -> Router:
    values = {"num_experts": num_experts, "num_experts_per_tok": 3, "intermediate_size": 4, "balance": "none"}
    router = ROUTER_CLASSES[kind](16, ExpertBankConfig(name="common", **{**values, "router": kind, **settings})).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.normal_(generator=generator)
        if router.e_score_correction_bias is not None:
            router.e_score_correction_bias.normal_(std=0.1, generator=generator)
    return router


@torch.no_grad()
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("kind", ROUTER_CLASSES)
def test_numbers_decide_as_tensors_do(kind: str, settings: str, options: str):
    router, asked = make(kind, **SETTINGS[settings]), OPTIONS[options]
    for seed, scale in enumerate((0.05, 0.2, 1.0, 3.0)):
        torch.manual_seed(seed)
        hidden = scale * torch.randn(1, 16)
        torch.manual_seed(seed)
        found = router(hidden, asked)
        torch.manual_seed(seed)
        expected = router.choose(router.score(hidden), asked)
        assert torch.equal(found.selected_experts, expected.selected_experts)
        assert [value.dtype for value in found[:3]] == [value.dtype for value in expected[:3]]
        # Tensors round to float32 after each operation: 6e-8 of weights up to 2.5, some 1e-6 of log-probabilities up to
        # 100, where logits are large.
        torch.testing.assert_close(found.routing_weights, expected.routing_weights, rtol=0, atol=1e-6)
        if asked.is_sampled:
            torch.testing.assert_close(found.log_probs, expected.log_probs, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_saturated_scores_tie_as_in_float32():
    router = make("sigmoid", num_groups=2, topk_groups=1)
    logits = torch.tensor([[30.0, 40.0, 50.0, 60.0, 70.0, 80.0, 90.0, 95.0]])
    found = router._choose_for_one(logits, RowOptions())
    assert torch.equal(found.selected_experts, router.choose(logits, RowOptions()).selected_experts)
    assert found.selected_experts.tolist() == [[0, 1, 2]]


def test_of_equals_the_lower_index_is_first():
    assert best([1.0, 2.0, 2.0, 1.0, 2.0], range(5), 4) == [1, 2, 4, 0]
    assert best_groups([1.0, 1.0, 0.0, 2.0, 2.0, 0.0], 3, 2) == [0, 1, 2, 3]


def test_an_uncertain_router_has_all_of_the_entropy_and_a_certain_one_none():
    assert entropy_share([3.0] * 8) == pytest.approx(1.0)
    assert entropy_share([0.0, -torch.finfo(torch.float32).max, -math.inf]) == 0.0
    assert entropy_share([2.0]) == 0.0


def test_all_orders_of_a_draw_have_a_probability_of_one():
    weights = [0.3, -1.0, 2.0]
    orders = [(a, b) for a in range(3) for b in range(3) if a != b]
    total = sum(
        math.exp(draw_log_probability([weights[a], weights[b]], [weights[c] for c in range(3) if c not in (a, b)]))
        for a, b in orders
    )
    assert total == pytest.approx(1.0)


def test_a_draw_of_every_expert_leaves_none():
    assert draw_log_probability([1.0, 0.0], []) == pytest.approx(-math.log1p(math.exp(-1.0)))


@pytest.mark.parametrize("count", [MOST_EXPERTS, MOST_EXPERTS + 2])
def test_many_experts_are_decided_the_same(count: int):
    router, hidden = make("softmax", num_experts=count), torch.randn(1, 16)
    with torch.no_grad():
        found = router(hidden)
    expected = router(hidden)
    assert torch.equal(found.selected_experts, expected.selected_experts)
    # Two float32 softmaxes over three numbers.
    torch.testing.assert_close(found.routing_weights, expected.routing_weights, rtol=0, atol=1e-6)


def test_where_gradients_are_wanted_weights_have_them():
    assert make("softmax")(torch.randn(1, 16)).routing_weights.requires_grad
