"""The router's weights, choices and arithmetic."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from chorus_moe import ExpertBankConfig
from chorus_moe.modeling.configuration_banks import BALANCES, ROUTERS
from chorus_moe.modeling.moe_plan import RowOptions
from chorus_moe.modeling.moe_routers import ROUTER_CLASSES, Router, SigmoidRouter, SoftmaxRouter
from chorus_moe.surgery.experts_resize import expert_rows
from chorus_moe.training.expert_draws import draw_log_probability


def router(num_experts: int = 8, top_k: int = 3, norm: bool = True) -> SoftmaxRouter:
    bank = ExpertBankConfig(
        name="common", num_experts=num_experts, num_experts_per_tok=top_k, intermediate_size=4, norm_topk_prob=norm
    )
    module = ROUTER_CLASSES["softmax"](16, bank)
    torch.manual_seed(0)
    torch.nn.init.normal_(module.weight)
    return module


def test_the_chosen_are_the_most_probable():
    module, hidden = router(), torch.randn(20, 16)
    logits, _, chosen, *_ = module(hidden)
    assert torch.equal(chosen, logits.softmax(dim=-1).topk(3).indices)


def test_normalised_weights_are_probabilities_divided_by_their_sum():
    module, hidden = router(), torch.randn(20, 16)
    logits, weights, chosen, *_ = module(hidden)
    probabilities = logits.softmax(dim=-1).gather(1, chosen)
    # Two float32 softmaxes, a few roundings of 6e-8.
    torch.testing.assert_close(weights, probabilities / probabilities.sum(dim=-1, keepdim=True), rtol=0, atol=1e-6)


def test_plain_weights_are_probabilities():
    module, hidden = router(norm=False), torch.randn(20, 16)
    logits, weights, chosen, *_ = module(hidden)
    torch.testing.assert_close(weights, logits.softmax(dim=-1).gather(1, chosen), rtol=0, atol=1e-6)


def test_all_experts_chosen_is_the_dense_mixture():
    logits, weights, chosen, *_ = router(num_experts=4, top_k=4)(torch.randn(5, 16))
    dense = torch.zeros(5, 4).scatter(1, chosen, weights)
    torch.testing.assert_close(dense, logits.softmax(dim=-1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_arithmetic_is_float32_also_under_autocast(dtype: torch.dtype):
    module, hidden = router().to(dtype), torch.randn(6, 16, dtype=dtype)
    expected = module(hidden)
    with torch.autocast("cpu", torch.bfloat16):
        found = module(hidden)
    assert found[0].dtype == found[1].dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(expected[:3], found[:3], strict=True))


def test_no_tokens_are_no_error():
    logits, weights, chosen, *_ = router()(torch.randn(0, 16))
    assert (logits.shape, weights.shape, chosen.shape) == ((0, 8), (0, 3), (0, 3))


def test_gradients_reach_the_weights_through_the_chosen_only():
    module = router(num_experts=4, top_k=1, norm=False)
    _, weights, *_ = module(torch.randn(3, 16))
    weights.sum().backward()
    assert module.weight.grad.abs().sum() > 0


KINDS = list(ROUTER_CLASSES)


def make(kind: str, seed: int = 0, **bank: Any) -> Router:
    values = {"num_experts": 8, "num_experts_per_tok": 3, "intermediate_size": 4, "router": kind, **bank}
    module = ROUTER_CLASSES[kind](16, ExpertBankConfig(name="common", **values))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(generator=generator)
    return module


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 2, 64, 65, 200])
def test_experts_with_one_key_tie_and_the_lower_index_wins_on_every_path(kind: str, size: int):
    # Whole numbers, so that no sum is rounded and equal rows give equal logits at any number of tokens.
    module = make(kind)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(torch.randint(-1, 2, parameter.shape, generator=generator))
            if name in ("weight", "expert_keys", "expert_values"):
                parameter[4:] = parameter[:4]
    hidden = torch.randint(-2, 3, (size, 16), generator=generator).float()
    reference = torch.tensor([module(row[None])[2][0].tolist() for row in hidden])
    for states in (hidden, hidden.bfloat16()):
        assert torch.equal(module(states)[2], reference)
    if kind == "softmax":
        assert torch.equal(reference, module(hidden)[0].sort(dim=-1, descending=True, stable=True).indices[:, :3])


@pytest.mark.parametrize("kind", KINDS)
def test_every_router_is_float32_under_autocast_and_in_bfloat16(kind: str):
    for dtype in (torch.float32, torch.bfloat16):
        module, hidden = make(kind).to(dtype), torch.randn(6, 16, dtype=dtype)
        expected = module(hidden)
        with torch.autocast("cpu", torch.bfloat16):
            found = module(hidden)
        for first, second in zip(expected[:3], found[:3], strict=True):
            assert torch.equal(first, second)
        assert found.router_logits.dtype == found.routing_weights.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_a_router_scores_each_token_alone(kind: str):
    module, hidden = make(kind), torch.randn(9, 16)
    whole = module(hidden)
    for row in range(9):
        # float32 sums in another order, at logits of size 10 and more.
        torch.testing.assert_close(module(hidden[row : row + 1])[0][0], whole[0][row], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_all_parameters_of_a_router_are_trained_by_the_weights(kind: str):
    module = make(kind)
    (module(torch.randn(50, 16)).routing_weights * torch.randn(50, 3)).sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in module.parameters())


@pytest.mark.parametrize("bias", [False, True])
def test_the_sigmoid_router_is_that_of_deepseek_v3(bias: bool):
    config = DeepseekV3Config(
        hidden_size=16,
        n_routed_experts=8,
        num_experts_per_tok=3,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.5,
        norm_topk_prob=True,
        moe_intermediate_size=4,
        n_shared_experts=1,
        num_local_experts=8,
    )
    theirs = DeepseekV3TopkRouter(config)
    ours = make("sigmoid", num_groups=4, topk_groups=2, routed_scaling_factor=2.5)
    if bias:
        ours.e_score_correction_bias.uniform_(-0.5, 0.5)
    theirs.load_state_dict(ours.state_dict())
    hidden = torch.randn(300, 16)
    _, weights, index = theirs(hidden)
    found = ours(hidden)
    order, our_order = index.argsort(dim=-1), found.selected_experts.argsort(dim=-1)
    assert torch.equal(index.gather(1, order), found.selected_experts.gather(1, our_order))
    # Their sum of sigmoids is ours as a softmax of their logarithms: a few roundings at weights up to 2.5.
    torch.testing.assert_close(
        found.routing_weights.gather(1, our_order), weights.gather(1, order), rtol=1e-5, atol=1e-6
    )


def test_plain_sigmoid_weights_are_the_sigmoids():
    module, hidden = make("sigmoid", norm_topk_prob=False), torch.randn(20, 16)
    logits, weights, chosen, *_ = module(hidden)
    torch.testing.assert_close(weights, logits.sigmoid().gather(1, chosen), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_correction_bias_moves_choices_and_no_weight(kind: str):
    module, hidden = make(kind, balance="bias", norm_topk_prob=False), torch.randn(20, 16)
    before = module(hidden)
    module.e_score_correction_bias[5] = 2.0
    after = module(hidden)
    assert (after.selected_experts[:, 0] == 5).all()
    assert torch.equal(before.router_logits, after.router_logits)
    both = (before.selected_experts[:, :, None] == after.selected_experts[:, None, :]).nonzero()
    for row, old, new in both.tolist():
        assert before.routing_weights[row, old] == after.routing_weights[row, new]


@pytest.mark.parametrize("kind", KINDS)
def test_a_constant_in_the_correction_bias_changes_nothing(kind: str):
    module, hidden = make(kind, balance="bias"), torch.randn(50, 16)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(0.3)  # probabilities far below the constant would lose bits beside it
    expected = module(hidden).selected_experts
    module.e_score_correction_bias.add_(0.25)
    assert torch.equal(module(hidden).selected_experts, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_chosen_experts_lie_in_the_best_groups(kind: str):
    module = make(kind, num_groups=4, topk_groups=2, balance="none")
    chosen = module(torch.randn(100, 16)).selected_experts
    assert max(len(set(row)) for row in (chosen // 2).tolist()) <= 2


def test_the_scaling_factor_multiplies_the_weights():
    hidden = torch.randn(5, 16)
    plain, scaled = make("softmax")(hidden), make("softmax", routed_scaling_factor=2.0)(hidden)
    # The same softmax of the same logits, times a power of two.
    assert torch.equal(scaled.routing_weights, 2.0 * plain.routing_weights)


@pytest.mark.parametrize("kind", KINDS)
def test_jitter_is_for_training_only(kind: str):
    module, hidden = make(kind, router_jitter_noise=0.3), torch.randn(5, 16)
    assert not torch.equal(module.train()(hidden)[0], module(hidden)[0])
    assert torch.equal(module.eval()(hidden)[0], make(kind)(hidden)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_adaptive_experts_follow_the_entropy_of_the_router(kind: str):
    module, hidden = make(kind, adaptive_experts=True), torch.randn(200, 16) * torch.logspace(-3, 1, 200)[:, None]
    logits, weights, chosen, *_ = module(hidden)
    probabilities = module.probabilities(logits)
    complexity = -(probabilities * probabilities.log()).nan_to_num().sum(dim=-1) / math.log(8)
    expected = (complexity * 3).ceil().clamp(1, 3)
    assert torch.equal((chosen < 8).sum(dim=-1), expected.long())
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(200))
    assert not weights[chosen == 8].any()
    # A sigmoid router that knows nothing is as sure of each expert as of any other, and so never certain.
    assert len(expected.unique()) == 3 or kind == "sigmoid"


@pytest.mark.parametrize("kind", KINDS)
def test_complexity_given_by_the_caller_overrules_the_entropy_but_where_it_is_nan(kind: str):
    module, hidden = make(kind, adaptive_experts=True), torch.randn(4, 16)
    own = (module(hidden).selected_experts < 8).sum(dim=-1)
    given = RowOptions(complexity_R=torch.tensor([0.0, 0.34, 1.0, torch.nan]))
    assert (module(hidden, given).selected_experts < 8).sum(dim=-1).tolist() == [1, 2, 3, own[3]]


@pytest.mark.parametrize("norm", [True, False])
def test_a_budget_keeps_the_best_and_weighs_them_as_the_bank_does(norm: bool):
    module, hidden = make("softmax", norm_topk_prob=norm), torch.randn(4, 16)
    logits, _, chosen, *_ = module(hidden)
    found = module(hidden, RowOptions(budget_R=torch.tensor([1, 2, 3, 9])))
    assert (found.selected_experts < 8).sum(dim=-1).tolist() == [1, 2, 3, 3]
    for row, kept in enumerate([1, 2, 3, 3]):
        assert torch.equal(found.selected_experts[row, :kept], chosen[row, :kept])
        expected = logits[row].softmax(dim=-1)[chosen[row, :kept]]
        expected = expected / expected.sum() if norm else expected
        torch.testing.assert_close(found.routing_weights[row, :kept], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["softmax", "attention"])
def test_a_budget_of_k_changes_no_bit(kind: str):
    module, hidden = make(kind), torch.randn(40, 16)
    plain, budget = module(hidden), module(hidden, RowOptions(budget_R=torch.full((40,), 3)))
    for first, second in zip(plain[:3], budget[:3], strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("kind", KINDS)
def test_sampled_experts_are_distinct_and_carry_the_probability_of_their_draw(kind: str):
    module, hidden = make(kind, balance="none"), torch.randn(30, 16)
    found = module(hidden, RowOptions(is_sampled=True))
    assert all(len(set(row)) == 3 for row in found.selected_experts.tolist())
    log_weights = module.probabilities(found.router_logits).log()
    expected = draw_log_probability(log_weights, found.selected_experts)
    # Log-weights up to a constant a token, at log-probabilities of size 10.
    torch.testing.assert_close(found.log_probs, expected, rtol=1e-4, atol=1e-4)
    found.log_probs.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())


def test_draws_stay_within_the_best_groups():
    module = make("softmax", num_groups=4, topk_groups=2)
    found = module(torch.randn(100, 16) * 0.1, RowOptions(is_sampled=True))
    assert max(len(set(row)) for row in (found.selected_experts // 2).tolist()) <= 2
    assert found.log_probs.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_router_compiles_into_one_graph_with_all_its_options(kind: str):
    torch.compiler.reset()
    options = RowOptions(budget_R=torch.tensor([1, 2, 3, 3, 3]))
    module = make(kind, num_groups=4, topk_groups=2, adaptive_experts=True, balance="bias", routed_scaling_factor=2.0)
    hidden = torch.randn(5, 16)
    expected = module(hidden, options)
    found = torch.compile(module, fullgraph=True, backend="aot_eager")(hidden, options)
    assert torch.equal(found.selected_experts, expected.selected_experts)
    torch.testing.assert_close(found.routing_weights, expected.routing_weights, rtol=1e-5, atol=1e-6)
    torch.compiler.reset()


@pytest.mark.parametrize("cast", ["bfloat16", "half", "double"])
def test_no_cast_of_the_model_touches_the_correction_bias(cast: str):
    module = make("sigmoid")
    bias = torch.randn(8) * 1e-3 + 1.0
    module.e_score_correction_bias.copy_(bias)
    getattr(module, cast)()
    assert module.weight.dtype != torch.float32
    assert module.e_score_correction_bias.dtype == torch.float32
    assert torch.equal(module.e_score_correction_bias, bias)


def test_probabilities_of_a_sigmoid_router_are_its_sigmoids_divided_by_their_sum():
    logits = torch.randn(4, 6)
    expected = logits.sigmoid() / logits.sigmoid().sum(dim=-1, keepdim=True)
    torch.testing.assert_close(SigmoidRouter.probabilities(logits), expected)
    torch.testing.assert_close(SoftmaxRouter.probabilities(logits), logits.softmax(dim=-1))


def test_every_router_of_the_configuration_has_a_class_that_states_its_facts():
    assert list(ROUTER_CLASSES) == list(ROUTERS)
    for kind, balance in ROUTERS.items():
        assert balance in BALANCES
        rows = {name: len(tensor) for name, tensor in expert_rows(make(kind)).items()}
        assert rows and set(rows.values()) == {8}
        assert ROUTER_CLASSES[kind].flops(16, 8) > 0


def test_a_class_of_a_name_without_a_line_is_refused():
    with pytest.raises(ValueError, match="Mistyped: unknown router 'softmix'; did you mean 'softmax'?"):
        type("Mistyped", (SoftmaxRouter,), {}, name="softmix")
    assert "softmix" not in ROUTER_CLASSES


def test_no_other_file_asks_for_a_router_by_name():
    """A comparison with a router's name outside its class and the table would have to grow with every router."""
    pattern = re.compile(r"router[\w.]* *(?:[=!]=|(?:not )?in) *[('\[{\"]+(?:" + "|".join(ROUTERS) + ")")
    folders = [Path(__file__).parents[2] / name for name in ("modeling", "surgery", "training", "fastpaths")]
    found = [
        f"{path.name}:{line}"
        for folder in folders
        for path in folder.rglob("*.py")
        for line, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if pattern.search(text)
    ]
    assert not found


def test_a_bank_without_tokens_decides_nothing():
    nothing = router().no_rows(torch.empty(5, 16, dtype=torch.bfloat16))
    shapes = [tuple(tensor.shape) for tensor in nothing if isinstance(tensor, torch.Tensor)]
    assert shapes == [(0, 8), (0, 3), (0, 3), (0,), (0,)]
    assert nothing.router_logits.dtype == nothing.routing_weights.dtype == torch.float32
    assert nothing.selected_experts.dtype == nothing.rows.dtype == torch.int64
