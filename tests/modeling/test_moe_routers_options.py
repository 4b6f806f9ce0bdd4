"""Options of routers: a bias on the scores, rounding down, a learned number of experts, capacity over a batch."""

import math
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError

from chorus_moe import ChorusForConditionalGeneration
from chorus_moe.modeling.configuration_banks import LayerBankConfig
from chorus_moe.modeling.losses import expert_budget_loss
from chorus_moe.modeling.moe_routers import ROUTER_CLASSES, Router
from chorus_moe.surgery.experts_resize import expert_rows
from tests.conftest import tiny_batch, tiny_config

NUM_EXPERTS, WIDTH, TOP_K = 6, 16, 4


def router(kind: str = "softmax", **bank: Any) -> Router:
    torch.manual_seed(0)
    sizes = {"num_experts": NUM_EXPERTS, "num_experts_per_tok": TOP_K, "intermediate_size": 8}
    module = ROUTER_CLASSES[kind](WIDTH, LayerBankConfig(name="common", router=kind, **sizes | bank))
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    return module.eval()


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_a_bias_of_the_router_is_added_to_its_scores_and_follows_its_experts(kind: str) -> None:
    module, hidden = router(kind, router_bias=True), torch.randn(5, WIDTH)
    expected = torch.nn.functional.linear(hidden, module.weight, module.bias)
    torch.testing.assert_close(module.score(hidden), expected)
    assert len(expert_rows(module)["bias"]) == NUM_EXPERTS
    assert "bias" not in expert_rows(router(kind))
    module.start_weights(0.02)
    assert not module.bias.any()


def test_a_router_without_a_place_for_a_bias_refuses_it() -> None:
    with pytest.raises(ValueError, match="'common': router='attention' has no place for router_bias=True"):
        router("attention", router_bias=True)


@pytest.mark.parametrize(("rounding", "rounded"), [("ceil", math.ceil), ("floor", math.floor)])
def test_the_number_of_experts_is_complexity_times_k_rounded(rounding: str, rounded: Any) -> None:
    model = ChorusForConditionalGeneration(
        tiny_config(
            expert_banks={
                "common": {"num_experts_per_tok": TOP_K, "adaptive_experts": True, "adaptive_rounding": rounding}
            }
        )
    ).eval()
    scores = torch.tensor([[0.0, 0.2, 0.25, 0.3, 0.5, 0.7, 0.75, 0.9, 1.0]])
    with torch.no_grad():
        ids = torch.randint(5, 128, scores.shape)
        routing = model(input_ids=ids, complexity_scores=scores, output_router_logits=True).routing[0]["common"]
    used = (routing.selected_experts < routing.router_logits.shape[-1]).sum(dim=1)
    assert used.tolist() == [max(1, rounded(score * TOP_K)) for score in scores[0].double().round(decimals=4).tolist()]


def test_a_learned_complexity_uses_the_last_expert_in_part() -> None:
    module, hidden = router(adaptive_experts=True, mean_experts=2), torch.randn(50, WIDTH)
    choice = module(hidden)
    sigmoid = torch.sigmoid(hidden @ module.complexity.weight[0] + module.complexity.bias)
    wanted = 1 + (TOP_K - 1) * (1.2 * sigmoid - 0.1).clamp(0, 1)
    torch.testing.assert_close(choice.wanted_experts, wanted)
    logits = module.score(hidden)
    for row in range(len(hidden)):
        order = logits[row].argsort(descending=True)[:TOP_K]
        part = [min(max(wanted[row].item() - slot, 0.0), 1.0) for slot in range(TOP_K)]
        weights = logits[row, order].exp() * torch.tensor(part)
        torch.testing.assert_close(choice.routing_weights[row], weights / weights.sum(), atol=1e-5, rtol=1e-4)
        used = choice.selected_experts[row] < NUM_EXPERTS
        assert used.sum() == math.ceil(choice.wanted_experts[row].item())
    choice.routing_weights[:, 0].sum().backward()
    assert module.complexity.weight.grad.abs().sum() > 0


def test_a_learned_complexity_follows_its_router_to_another_dtype_and_device() -> None:
    module = router("sigmoid", adaptive_experts=True, mean_experts=2)
    bias = module.e_score_correction_bias
    assert module.complexity is not None and bias is not None and bias.dtype == torch.float32
    assert module.bfloat16().complexity.weight.dtype == torch.bfloat16 == module.weight.dtype
    assert module.e_score_correction_bias.dtype == torch.float32
    moved = module.to("meta")
    assert moved.complexity.weight.device.type == moved.e_score_correction_bias.device.type == "meta"


def test_the_budget_is_reached_in_training() -> None:
    torch.manual_seed(0)
    bank = {"num_experts": 6, "num_experts_per_tok": TOP_K, "adaptive_experts": True, "mean_experts": 1.5}
    model = ChorusForConditionalGeneration(tiny_config(expert_banks={"common": bank})).train()
    batch = tiny_batch(model.config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(80):
        output = model(**batch, output_router_logits=True)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    used = [(layer["common"].selected_experts < 6).sum(dim=1).float() for layer in output.routing]
    real = batch["attention_mask"].flatten().bool()
    mean = torch.stack([part[real].mean() for part in used]).mean().item()
    assert mean == pytest.approx(1.5, abs=0.25)
    expected = ((mean - 1.5) / TOP_K) ** 2
    assert output.expert_budget_loss.item() == pytest.approx(expected, abs=1e-6)
    assert expert_budget_loss([{}], {}) is None


@pytest.mark.parametrize("overflow", ["drop", "reroute"])
def test_capacity_over_a_batch_fills_each_expert_to_its_buffer_and_no_further(overflow: str) -> None:
    model = {}
    for scope in ("sequence", "batch"):
        torch.manual_seed(0)
        bank = {"expert_capacity": 5, "capacity_overflow": overflow, "capacity_scope": scope, "num_experts_per_tok": 1}
        model[scope] = ChorusForConditionalGeneration(tiny_config(expert_banks={"common": bank})).train()
    ids = torch.randint(5, 128, (3, 6))
    found = {
        scope: part(input_ids=ids, output_router_logits=True).routing[0]["common"] for scope, part in model.items()
    }
    wanted = found["batch"].router_logits.argmax(dim=1)
    counts = torch.bincount(found["batch"].selected_experts.flatten(), minlength=5)[:4]
    assert counts.max() <= 5 < torch.bincount(found["sequence"].selected_experts.flatten(), minlength=5)[:4].max()
    if overflow == "drop":
        # The first five of the whole batch that want an expert get it: later samples depend on earlier ones.
        taken = [0] * 4
        for choice, got in zip(wanted.tolist(), found["batch"].selected_experts[:, 0].tolist(), strict=True):
            assert got == (choice if taken[choice] < 5 else 4)
            taken[choice] += 1


@pytest.mark.parametrize(
    ("bank", "words"),
    [
        ({"capacity_scope": "batch"}, "capacity_scope='batch' needs an expert_capacity, found None"),
        ({"capacity_scope": "batch", "expert_capacity": 4, "capacity_in_eval": True}, "batch mates"),
        ({"capacity_scope": "row"}, "unknown capacity_scope 'row'"),
        ({"adaptive_rounding": "floor"}, "adaptive_experts, which is False"),
        ({"adaptive_experts": True, "mean_experts": 3}, "between 1 and num_experts_per_tok=2"),
        ({"adaptive_experts": True, "mean_experts": 1.5, "adaptive_rounding": "floor"}, "found 'floor'"),
    ],
)
def test_options_that_do_not_go_together_are_refused(bank: dict[str, Any], words: str) -> None:
    with pytest.raises(StrictDataclassClassValidationError, match=words):
        tiny_config(expert_banks={"common": bank})


@pytest.mark.parametrize(("start", "end"), [("cpu", "cpu"), ("cpu", "meta"), ("meta", "cpu"), ("meta", "meta")])
def test_a_balance_bias_stays_in_float32_wherever_its_router_goes(start: str, end: str) -> None:
    module = router("sigmoid").to(start)
    before = module.e_score_correction_bias.clone()
    module._apply(lambda x: torch.zeros(x.shape, dtype=torch.bfloat16, device=end) + (x.to(end) if start == end else 0))
    after = module.e_score_correction_bias
    assert (after.dtype, after.device.type) == (torch.float32, end)
    assert start + end != "cpucpu" or torch.equal(after, before)
