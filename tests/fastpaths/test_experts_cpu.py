"""The CPU experts equal transformers' plain loop, forward and backward."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.activations import ACT2FN
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation

from chorus_moe.fastpaths import expert_slots, experts_cpu
from chorus_moe.fastpaths.experts_cpu import CPU_EXPERTS, cpu_mm_experts_forward

NAMES = ("output", "hidden", "weights", "gate_up_proj", "down_proj")

# Norm of the difference over norm of the value. float32 sums in another order: some 1e-6. bfloat16 keeps 8 bits, one
# rounding is up to 4e-3, and the plain loop it is compared with runs in float32: four in a row stay below 1e-2.
RELATIVE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True, params=["units", "operands alike"])
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both kinds of processor, whichever runs the tests."""
    monkeypatch.setattr(expert_slots, "treats_operands_alike", lambda: request.param == "operands alike")


@use_experts_implementation
class Experts(nn.Module):
    """Transformers' reference experts."""

    def __init__(self, config: SimpleNamespace, num_experts: int = 6, width: int = 24, inner: int = 16) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.gate_up_proj = nn.Parameter(torch.randn(num_experts, 2 * inner, width) / width**0.5)
        self.down_proj = nn.Parameter(torch.randn(num_experts, width, inner) / inner**0.5)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        output = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            token, slot = torch.where(top_k_index == expert)
            gate_up = nn.functional.linear(hidden_states[token], self.gate_up_proj[expert])
            rows = nn.functional.linear(self._apply_gate(gate_up), self.down_proj[expert])
            rows = rows * top_k_weights[token, slot, None]
            output = output.index_add(0, token, rows.to(output.dtype))
        return output


def make(num_tokens: int, dtype: torch.dtype = torch.float32, top_k: int = 2, act: str = "silu", **sizes: int):
    torch.manual_seed(num_tokens)
    experts = Experts(SimpleNamespace(hidden_act=act, _experts_implementation=CPU_EXPERTS), **sizes).to(dtype)
    experts._is_expert_parallel = True
    width, num_experts = experts.gate_up_proj.shape[2], experts.num_experts
    hidden = torch.randn(num_tokens, width, dtype=dtype)
    scores, index = torch.rand(num_tokens, num_experts).topk(top_k)
    return experts, hidden, index, scores.softmax(-1).to(dtype)


def run(experts: nn.Module, implementation: str, hidden: Tensor, index: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Output and all gradients; a parameter the plain loop leaves out has gradient zero."""
    experts.config._experts_implementation = implementation
    experts.zero_grad()
    hidden, weights = hidden.detach().requires_grad_(), weights.detach().requires_grad_()
    output = experts(hidden, index, weights)
    (output.float() * torch.linspace(-1, 1, output.numel(), device=output.device).view_as(output)).sum().backward()
    grads = [hidden.grad, weights.grad, experts.gate_up_proj.grad, experts.down_proj.grad]
    return dict(zip(NAMES, [output.detach(), *grads], strict=True))


def assert_close(found: Tensor, expected: Tensor, relative: float, name: str) -> None:
    assert found.dtype == expected.dtype and found.shape == expected.shape, name
    difference = (found.double() - expected.double()).norm()
    assert difference <= relative * expected.double().norm() + 1e-30, (name, float(difference))


def assert_parity(experts: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> None:
    """Training and inference paths against the plain loop (computed in float32 for bfloat16)."""
    found = run(experts, CPU_EXPERTS, hidden, index, weights)
    with torch.no_grad():
        experts.config._experts_implementation = CPU_EXPERTS
        inference = experts(hidden, index, weights)
    tolerance = RELATIVE[hidden.dtype]
    wide = torch.float32 if hidden.dtype == torch.bfloat16 else hidden.dtype
    expected = run(experts.to(wide), "eager", hidden.to(wide), index, weights.to(wide))
    for name in NAMES:
        assert_close(found[name].to(wide), expected[name], tolerance, name)
    assert_close(inference.to(wide), expected["output"], tolerance, "inference")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 5, 16, 65, 300, 2000])
def test_output_and_gradients_equal_the_plain_loop(num_tokens: int, dtype: torch.dtype) -> None:
    assert_parity(*make(num_tokens, dtype))


@pytest.mark.parametrize("num_tokens", [5, 16, 300])
def test_bfloat16_where_the_processor_has_no_instructions_for_it(
    num_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experts_cpu, "_is_emulated", lambda dtype: dtype == torch.bfloat16)
    products: list[torch.dtype] = []
    run_units = experts_cpu._run_units
    monkeypatch.setattr(
        experts_cpu, "_run_units", lambda hidden, *others: products.append(hidden.dtype) or run_units(hidden, *others)
    )
    assert_parity(*make(num_tokens, torch.bfloat16, top_k=1))
    # Training always, inference from five rows an expert on.
    assert products == [torch.float32] * (2 if num_tokens == 300 else 1)


@pytest.mark.parametrize("num_tokens", [1, 3, 40, 300])
@pytest.mark.parametrize("num_experts", [1, 3, 32])
def test_any_number_of_experts(num_tokens: int, num_experts: int) -> None:
    assert_parity(*make(num_tokens, num_experts=num_experts, top_k=min(4, num_experts), width=20, inner=7))


@pytest.mark.parametrize("num_tokens", [1, 7, 1500])
@pytest.mark.parametrize("expert", [0, 5])
def test_all_tokens_to_one_expert(num_tokens: int, expert: int) -> None:
    experts, hidden, index, weights = make(num_tokens, top_k=1)
    assert_parity(experts, hidden, torch.full_like(index, expert), weights)


@pytest.mark.parametrize("num_tokens", [1, 4, 100, 1500])
def test_sentinels_have_no_effect_whatever_their_weight(num_tokens: int) -> None:
    experts, hidden, index, weights = make(num_tokens)
    skipped = torch.rand(index.shape) < 0.5
    skipped[0] = torch.tensor([True, False])
    index = index.masked_fill(skipped, experts.num_experts)
    assert_parity(experts, hidden, index, weights)
    plain = run(experts, CPU_EXPERTS, hidden, index, weights)
    broken = run(experts, CPU_EXPERTS, hidden, index, weights.masked_fill(skipped, float("nan")))
    assert all(torch.equal(plain[name], broken[name]) for name in NAMES)
    assert not plain["weights"][skipped].any()


@pytest.mark.parametrize("num_tokens", [1, 9])
def test_only_sentinels_give_zero(num_tokens: int) -> None:
    experts, hidden, index, weights = make(num_tokens)
    found = run(experts, CPU_EXPERTS, hidden, torch.full_like(index, 6), weights)
    assert not any(value.any() for value in found.values())
    with torch.no_grad():
        assert not experts(hidden, torch.full_like(index, 6), weights).any()


def test_other_activations() -> None:
    assert_parity(*make(33, act="gelu"))
    assert_parity(*make(300, act="relu"))
    assert_parity(*make(1, act="gelu"))


@pytest.mark.parametrize(("act", "is_plain"), [("silu", False), ("gelu", False), ("relu", False), ("prelu", True)])
def test_only_activations_that_learn_take_the_plain_way(
    act: str, is_plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain: list[int] = []
    run_plainly = experts_cpu.run_plainly
    monkeypatch.setattr(experts_cpu, "run_plainly", lambda *given: plain.append(1) or run_plainly(*given))
    experts, hidden, index, weights = make(33, act="gelu" if act == "prelu" else act)
    if act == "prelu":
        experts.act_fn = nn.PReLU()
    assert_parity(experts, hidden, index, weights)
    assert bool(plain) == is_plain


def test_gradients_in_float64() -> None:
    experts, hidden, index, weights = make(7, torch.float64, num_experts=3, width=4, inner=2)
    index[2, 1] = 3

    def function(hidden: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        parameters = {"gate_up_proj": gate_up, "down_proj": down}
        return torch.func.functional_call(experts, parameters, (hidden, index, weights))

    inputs = (hidden, weights, experts.gate_up_proj, experts.down_proj)
    assert torch.autograd.gradcheck(function, [tensor.detach().requires_grad_() for tensor in inputs])


@pytest.mark.parametrize("trained", ["hidden", "weights", "gate_up_proj", "down_proj"])
def test_a_lone_gradient_equals_that_of_full_training(trained: str) -> None:
    experts, hidden, index, weights = make(50)
    expected = run(experts, CPU_EXPERTS, hidden, index, weights)[trained]
    experts.zero_grad()
    tensors = {"hidden": hidden, "weights": weights, **dict(experts.named_parameters())}
    for name, tensor in tensors.items():
        tensor.requires_grad_(name == trained)
    output = experts(hidden, index, weights)
    (output * torch.linspace(-1, 1, output.numel(), device=output.device).view_as(output)).sum().backward()
    assert torch.equal(tensors[trained].grad, expected)
    assert all(tensor.grad is None for name, tensor in tensors.items() if name != trained)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_and_double_use_give_the_same_gradients(use_reentrant: bool) -> None:
    experts, hidden, index, weights = make(70)
    results = []
    for wrap in (lambda function, *args: function(*args), lambda *args: checkpoint(*args, use_reentrant=use_reentrant)):
        experts.zero_grad()
        leaf = hidden.detach().requires_grad_()
        wrap(experts, wrap(experts, leaf, index, weights), index, weights).square().sum().backward()
        results.append([leaf.grad, experts.gate_up_proj.grad, experts.down_proj.grad])
    for plain, checkpointed in zip(*results, strict=True):
        # Not bitwise: the reentrant variant runs the first forward without gradients, on the inference path.
        torch.testing.assert_close(checkpointed, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_tokens", [1, 40, 1300])
def test_autocast_computes_in_bfloat16_and_keeps_types(num_tokens: int) -> None:
    experts, hidden, index, weights = make(num_tokens)
    exact = run(experts, "eager", hidden, index, weights)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run(experts, CPU_EXPERTS, hidden, index, weights)
        with torch.no_grad():
            inference = experts(hidden, index, weights)
    for name in NAMES:
        assert_close(found[name], exact[name], RELATIVE[torch.bfloat16], name)
    assert_close(inference, exact["output"], RELATIVE[torch.bfloat16], "inference")


def test_inputs_need_not_be_contiguous() -> None:
    experts, hidden, index, weights = make(30)
    strided = [hidden.t().contiguous().t(), index.t().contiguous().t(), weights.t().contiguous().t()]
    found, expected = run(experts, CPU_EXPERTS, *strided), run(experts, CPU_EXPERTS, hidden, index, weights)
    for name in NAMES:
        assert_close(found[name], expected[name], RELATIVE[torch.float32], name)


def test_a_compiled_module_uses_transformers_own_function() -> None:
    experts, hidden, index, weights = make(12)
    with torch.no_grad():
        compiled = torch.compile(experts, backend="eager")(hidden, index, weights)
        grouped = ALL_EXPERTS_FUNCTIONS["grouped_mm"](experts, hidden, index, weights)
    torch.testing.assert_close(compiled, grouped)


@pytest.mark.parametrize("implementation", [None, "eager", "grouped_mm"])
def test_the_models_default_runs_here_and_a_users_choice_is_kept(implementation: str | None, monkeypatch) -> None:
    from chorus_moe.modeling.modeling_base import ChorusPreTrainedModel

    calls = []
    monkeypatch.setitem(
        type(ALL_EXPERTS_FUNCTIONS)._global_mapping,
        CPU_EXPERTS,
        lambda *args: calls.append(1) or cpu_mm_experts_forward(*args),
    )
    chosen = ChorusPreTrainedModel.get_correct_experts_implementation(
        ChorusPreTrainedModel.__new__(ChorusPreTrainedModel), implementation
    )
    assert chosen == (implementation or CPU_EXPERTS)
    run(*make(4)[:1], chosen, *make(4)[1:])
    assert len(calls) == (implementation is None)


@pytest.mark.parametrize("wanted", [{"hidden"}, {"weights"}, {"gate_up_proj"}, {"down_proj"}, {"hidden", "down_proj"}])
@pytest.mark.parametrize("num_tokens", [3, 300])
def test_a_gradient_is_the_same_whichever_others_are_wanted(wanted: set[str], num_tokens: int) -> None:
    """Frozen experts pass a gradient on; a LoRA on nothing below needs none of it. Sorted rows and units."""
    experts, hidden, index, weights = make(num_tokens)
    expected = run(experts, "eager", hidden, index, weights)
    experts.config._experts_implementation = CPU_EXPERTS
    experts.zero_grad()
    given = {"hidden": hidden, "weights": weights, **dict(experts.named_parameters())}
    for name, tensor in given.items():
        tensor.requires_grad_(name in wanted)
    output = experts(hidden, index, weights)
    (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    for name, tensor in given.items():
        assert (tensor.grad is not None) == (name in wanted)
        if tensor.grad is not None:
            assert_close(tensor.grad, expected[name], RELATIVE[torch.float32], name)


@pytest.mark.parametrize(("rows", "streams"), [(experts_cpu.MOST_ROWS, True), (experts_cpu.MOST_ROWS + 1, False)])
def test_weights_are_streamed_for_the_rows_of_an_expert_that_has_some(
    rows: int, streams: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts without tokens do not count: two of six have the rows here."""
    taken: list[str] = []

    def spy(name: str, hidden: Tensor, plan: expert_slots.SlotPlan) -> Tensor:
        taken.append(name)
        return torch.zeros(len(plan.token_P), hidden.shape[1])

    for name in ("_run_rows", "_run_grouped"):
        monkeypatch.setattr(experts_cpu, name, lambda hidden, *others, name=name: spy(name, hidden, others[-1]))
    for name, value in (("can_stream", True), ("can_group", True), ("few_rows", 100)):
        monkeypatch.setattr(experts_cpu, name, lambda *arguments, value=value: value)
    experts, hidden, _, weights = make(rows)
    with torch.no_grad():
        experts(hidden, torch.tensor([[0, 1]]).expand(rows, 2), weights)
    assert taken == ["_run_rows" if streams else "_run_grouped"]
