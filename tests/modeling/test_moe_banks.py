"""Expert banks: who sees whom, the gate over them, and one result whatever implementation computes it."""

import pytest
import torch
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from chorus_moe import MODALITY_IDS, ChorusForConditionalGeneration
from chorus_moe.fastpaths.experts_cpu import CPU_EXPERTS
from chorus_moe.modeling.moe_banks import BankGate, LinearExperts, MixtureOfBanks
from chorus_moe.modeling.moe_plan import ForwardPlan, RoutingOptions
from chorus_moe.surgery import unfuse_experts
from tests.conftest import moved, tiny_batch, tiny_config

IMPLEMENTATIONS = ["eager", "batched_mm", "grouped_mm", CPU_EXPERTS]
# float32 sums in another order: worst difference seen over four seeds is 1.5e-8.
ATOL = 2e-7


def mixture(**text) -> MixtureOfBanks:
    torch.manual_seed(0)
    model = ChorusForConditionalGeneration(tiny_config(**text))
    return model.model.language_model.layers[1].mlp


def tokens(modalities: list[int], width: int = 64, options: RoutingOptions | None = None) -> tuple[Tensor, ForwardPlan]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, len(modalities), width, generator=generator)
    return hidden, ForwardPlan.build(torch.tensor([modalities]), None, options)


def capacity_options(modalities: list[int], banks: tuple[str, ...] = ("text", "audio", "common")) -> RoutingOptions:
    """Capacity counted over one sequence."""
    sequence_T = torch.zeros(len(modalities), dtype=torch.long)
    return RoutingOptions(None, {}, frozenset(), sequence_T, dict.fromkeys(banks, "sequence"))


def use(mlp: MixtureOfBanks, implementation: str) -> None:
    for bank in mlp.banks.values():
        for stack in bank.stacks:
            stack.config._experts_implementation = implementation


MIXED = [0, 0, 1, 1, 1, 3, 0, 3, 0, 0]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("modalities", [MIXED, [0] * 6, [3]], ids=["mixed", "text", "one audio token"])
def test_implementations_agree_forward_and_backward(implementation: str, modalities: list[int]):
    mlp = mixture()
    results = {}
    for name in ("eager", implementation):
        use(mlp, name)
        mlp.zero_grad()
        hidden, plan = tokens(modalities)
        hidden.requires_grad_()
        output, _ = mlp(hidden, plan)
        (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
        results[name] = [output, hidden.grad, *(p.grad for p in mlp.parameters())]
    for expected, found in zip(results["eager"], results[implementation], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=ATOL)


DROPPED = {"expert_capacity": 1.0, "capacity_overflow": "drop"}
UNUSED = {"adaptive_experts": True, **DROPPED}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("unused", [UNUSED, DROPPED, {"adaptive_experts": True}], ids=["both", "dropped", "adaptive"])
@pytest.mark.parametrize("modalities", [MIXED, [0] * 40, [3]], ids=["mixed", "text", "one audio token"])
def test_implementations_agree_on_unused_slots(implementation: str, modalities: list[int], unused: dict[str, object]):
    mlp = mixture(expert_banks={name: unused for name in ("text", "audio", "common")}).train()
    results = {}
    for name in ("eager", implementation):
        use(mlp, name)
        mlp.zero_grad()
        has_places = "expert_capacity" in unused
        hidden, plan = tokens(modalities, options=capacity_options(modalities) if has_places else None)
        hidden.requires_grad_()
        output, routing = mlp(hidden * 30.0, plan)
        assert len(modalities) == 1 or any((bank.selected_experts == 4).any() for bank in routing.values())
        (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
        results[name] = [output, hidden.grad, *(p.grad for p in mlp.parameters())]
    for expected, found in zip(results["eager"], results[implementation], strict=True):
        # float32 sums in another order: worst seen over four seeds is 1.8e-5 of a tensor's largest value, up to 700.
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * max(float(expected.detach().abs().max()), 1e-3))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_token_without_any_expert_gets_the_shared_experts_alone(implementation: str):
    mlp = mixture(expert_banks={"common": UNUSED}).train()
    use(mlp, implementation)
    same = torch.randn(1, 1, 64, generator=torch.Generator().manual_seed(0)).expand(1, 9, 64).contiguous()
    plan = ForwardPlan.build(torch.zeros(1, 9, dtype=torch.long), None, capacity_options([0] * 9, ("common",)))
    output, routing = mlp(same, plan)
    dropped = (routing["common"].selected_experts == 4).all(dim=-1)
    assert dropped.any()
    assert torch.equal(output[0, dropped], mlp.shared_experts(same)[0, dropped])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_bank_without_tokens_keeps_its_parameters_in_the_graph(implementation: str):
    mlp = mixture()
    use(mlp, implementation)
    mlp(*tokens([0, 0, 0]))[0].sum().backward()
    for name in ("image", "audio"):
        for key, parameter in mlp.banks[name].named_parameters():
            assert parameter.grad is not None, key
            assert not parameter.grad.any(), key


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_implementation_asked_for_is_the_one_that_runs(
    monkeypatch: pytest.MonkeyPatch, implementation: str, batch: dict[str, Tensor]
):
    calls = []
    for name in ("batched_mm", "grouped_mm", CPU_EXPERTS):
        function = ALL_EXPERTS_FUNCTIONS[name]

        def spy(*args, _name=name, _function=function, **kwargs):
            calls.append(_name)
            return _function(*args, **kwargs)

        monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._global_mapping, name, spy)
    model = ChorusForConditionalGeneration._from_config(tiny_config(), experts_implementation=implementation).eval()
    with torch.no_grad():
        model(**batch)
    sparse = len(model.config.text_config.sparse_layers) * len(model.config.text_config.banks)
    assert calls == ([] if implementation == "eager" else [implementation] * sparse)


def test_the_fast_implementation_runs_when_nothing_is_asked(model: ChorusForConditionalGeneration):
    config = model.config
    assert config.text_config._experts_implementation == CPU_EXPERTS
    expert = model.model.language_model.layers[1].mlp.banks["text"].experts
    assert expert.config._experts_implementation == CPU_EXPERTS


def test_weights_of_the_bank_gate_sum_to_one_over_open_banks_only():
    gate = mixture().bank_gate
    modalities = torch.tensor(MIXED)
    weights = gate(torch.randn(len(MIXED), 64), modalities)
    opened = gate.is_open[modalities]
    assert not weights[~opened].any()
    assert (weights[opened] > 0).all()
    # One float32 rounding a bank.
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(len(MIXED)), rtol=0, atol=1e-6)


def test_a_token_that_no_bank_is_open_to_gets_the_shared_experts_alone():
    mlp = mixture(expert_banks={"image": {}, "audio": {}})
    hidden, plan = tokens([0, 0, 1])
    output, _ = mlp(hidden, plan)
    assert torch.equal(output[:, :2], mlp.shared_experts(hidden)[:, :2])


def test_a_single_bank_has_a_gate_without_parameters():
    gate = mixture(expert_banks={"common": {}}).bank_gate
    assert isinstance(gate, BankGate)
    assert list(gate.parameters()) == []
    assert torch.equal(gate(torch.randn(3, 64), torch.tensor([0, 1, 3])), torch.ones(3, 1))


@pytest.mark.parametrize("changed", ["text", "image", "audio"])
def test_a_modality_sees_its_own_banks_and_no_other(changed: str):
    mlp = mixture()
    hidden, plan = tokens(MIXED)
    with torch.no_grad():
        before, _ = mlp(hidden, plan)
        for parameter in mlp.banks[changed].parameters():
            parameter.add_(1.0)
        after, _ = mlp(hidden, plan)
    assert torch.equal(moved(before, after)[0], torch.tensor(MIXED) == MODALITY_IDS[changed])


def test_the_common_bank_serves_every_token():
    mlp = mixture()
    hidden, plan = tokens(MIXED)
    with torch.no_grad():
        before, _ = mlp(hidden, plan)
        mlp.banks["common"].experts.down_proj.add_(1.0)
        after, _ = mlp(hidden, plan)
    assert moved(before, after).all()


def test_the_output_is_the_documented_sum():
    mlp = mixture()
    hidden, plan = tokens(MIXED)
    with torch.no_grad():
        found, routing = mlp(hidden, plan)
        for token, modality in enumerate(MIXED):
            x = hidden[0, token]
            opened = [n for n, bank in mlp.banks.items() if modality in [MODALITY_IDS[m] for m in bank.modalities]]
            rows = [list(mlp.banks).index(name) for name in opened]
            gates = (mlp.bank_gate.weight[rows] @ x).softmax(dim=0)
            expected = mlp.shared_experts(x)
            for gate, name in zip(gates, opened, strict=True):
                bank = mlp.banks[name]
                scores, chosen = (bank.router.weight @ x).softmax(dim=0).topk(2)
                for weight, expert in zip(scores / scores.sum(), chosen, strict=True):
                    first, second = (bank.experts.gate_up_proj[expert] @ x).chunk(2)
                    states = bank.experts.down_proj[expert] @ (torch.nn.functional.silu(first) * second)
                    expected = expected + gate * weight * states
            torch.testing.assert_close(found[0, token], expected, rtol=1e-5, atol=ATOL)
    assert set(routing) == {"text", "image", "audio", "common"}


def test_statistics_count_only_real_tokens_of_the_bank(model: ChorusForConditionalGeneration):
    batch = tiny_batch(model.config)
    with torch.no_grad():
        layers = model(**batch, output_router_logits=True).routing
    real = batch["attention_mask"].bool()
    counts = {name: int(((batch["mm_token_type_ids"] == value) & real).sum()) for name, value in MODALITY_IDS.items()}
    counts["common"] = int(real.sum())
    for layer in layers:
        for name, routing in layer.items():
            rows = len(routing.router_logits) if routing.token_mask is None else int(routing.token_mask.sum())
            assert rows == counts[name], name


def test_banks_live_in_the_layers_they_name():
    config = tiny_config(expert_banks={"text": {"layers": [1]}, "common": {}})
    layers = ChorusForConditionalGeneration(config).model.language_model.layers
    assert list(layers[1].mlp.banks) == ["common", "text"]
    assert list(layers[2].mlp.banks) == ["common"]


def test_linear_experts_are_the_weighted_sum_of_the_chosen_feed_forwards():
    """Written out token by token, with the activation of the configuration."""
    experts = mixture(experts_layout="linear").banks["common"].experts
    assert isinstance(experts, LinearExperts)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, 64, generator=generator)
    scores, index = torch.rand(5, experts.num_experts, generator=generator).topk(2)
    expected = torch.zeros_like(hidden)
    for token, slot in [(t, s) for t in range(5) for s in range(2)]:
        chosen = experts[int(index[token, slot])]
        gate, up = (projection.weight @ hidden[token] for projection in (chosen.gate_proj, chosen.up_proj))
        expected[token] += scores[token, slot] * (chosen.down_proj.weight @ (torch.nn.functional.silu(gate) * up))
    torch.testing.assert_close(experts(hidden, index, scores), expected, rtol=1e-5, atol=ATOL)


DEEP = {name: {"expert_depth": 3} for name in ("text", "image", "audio", "common")}


def test_a_deep_expert_is_the_sum_of_its_feed_forwards_each_on_the_input_and_the_sum_so_far():
    mlp = mixture(expert_banks={"common": {"expert_depth": 3}}, shared_expert_intermediate_size=0)
    hidden, plan = tokens([0] * 7)
    output, routing = mlp(hidden, plan)
    bank, choice = mlp.banks["common"], routing["common"]
    for token in range(7):
        expected = torch.zeros(64)
        for expert, weight in zip(choice.selected_experts[token], choice.routing_weights[token], strict=True):
            total = torch.zeros(64)
            for stack in (bank.experts, *bank.deeper_experts):
                gate, up = (stack.gate_up_proj[expert] @ (hidden[0, token] + total)).chunk(2)
                total = total + stack.down_proj[expert] @ (torch.nn.functional.silu(gate) * up)
            torch.testing.assert_close(bank.run_expert(int(expert), hidden[0, token]), total)
            expected += weight * total
        torch.testing.assert_close(output[0, token], expected, rtol=1e-5, atol=ATOL)


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS[1:], "linear"])
@pytest.mark.parametrize("modalities", [MIXED, [3]], ids=["mixed", "one audio token"])
def test_implementations_and_layouts_agree_on_deep_experts(implementation: str, modalities: list[int]):
    torch.manual_seed(0)
    model = ChorusForConditionalGeneration(tiny_config(expert_banks=DEEP))
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    mlp = model.model.language_model.layers[1].mlp
    results = {}
    for name in ("eager", implementation):
        if name == "linear":
            unfuse_experts(model)
        else:
            model.set_experts_implementation(name)
        mlp.zero_grad()
        hidden, plan = tokens(modalities)
        hidden.requires_grad_()
        output, _ = mlp(hidden, plan)
        (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
        assert all(parameter.grad is not None for parameter in mlp.parameters())
        routers = [bank.router.weight.grad for bank in mlp.banks.values()]
        results[name] = [output, hidden.grad, *routers]
    for expected, found in zip(results["eager"], results[implementation], strict=True):
        # float32 sums in another order, three feed-forwards deep.
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.detach().abs().max()) + ATOL)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_deep_experts_leave_unused_slots_alone(implementation: str):
    settings = UNUSED | {"expert_depth": 2}
    mlp = mixture(expert_banks={name: settings for name in ("text", "audio", "common")}).train()
    results = []
    for name in ("eager", implementation):
        use(mlp, name)
        hidden, plan = tokens(MIXED, options=capacity_options(MIXED))
        output, routing = mlp(hidden * 30.0, plan)
        assert any((bank.selected_experts == 4).any() for bank in routing.values())
        results.append(output)
    assert results[1].isfinite().all()
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-5 * float(results[0].detach().abs().max()))


def test_a_deep_expert_answers_alike_with_a_cache_alone_and_in_a_batch(batch: dict[str, Tensor]):
    torch.manual_seed(0)
    model = ChorusForConditionalGeneration(tiny_config(expert_banks=DEEP)).eval()
    model.generation_config.eos_token_id = None
    ids = batch["input_ids"].masked_fill(batch["mm_token_type_ids"] > 0, 7)[:2]
    texts = [
        model.generate(input_ids=rows, attention_mask=torch.ones_like(rows), max_new_tokens=6, use_cache=use_cache)
        for rows in (ids, ids[:1])
        for use_cache in (True, False)
    ]
    assert torch.equal(texts[0], texts[1])
    assert torch.equal(texts[0][:1], texts[2])
    assert torch.equal(texts[2], texts[3])
