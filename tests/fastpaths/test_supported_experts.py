"""Which experts the fast ways take, and who computes the others."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate

from chorus_moe.fastpaths import supported_experts as module
from chorus_moe.fastpaths.supported_experts import (
    can_group,
    has_plain_layout,
    is_few_to_gather,
    is_silu,
    run_plainly,
)
from tests.conftest import override


class Stacked(nn.Module):
    _apply_gate = _default_apply_gate

    def __init__(self, act_fn: nn.Module | None = None, **marks: bool):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(4, 16, 8))
        self.down_proj = nn.Parameter(torch.zeros(4, 8, 8))
        self.act_fn = nn.SiLU() if act_fn is None else act_fn
        for name, value in marks.items():
            setattr(self, name, value)


class OwnGate(Stacked):
    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        return gate_up


class OwnTensor(torch.Tensor):
    pass


def test_swiglu_is_known_by_its_activation_and_its_gate() -> None:
    assert is_silu(Stacked()) and is_silu(Stacked(ACT2FN["silu"]))
    assert not is_silu(Stacked(nn.GELU())) and not is_silu(OwnGate())


def test_a_plain_layout_has_one_weight_and_nothing_else() -> None:
    assert has_plain_layout(Stacked())
    assert has_plain_layout(Stacked(has_gate=True, is_concatenated=True, has_bias=False, is_transposed=False))


@pytest.mark.parametrize(
    "marks",
    [
        {"has_gate": False},
        {"is_concatenated": False},
        {"has_bias": True},
        {"is_transposed": True},
        {"has_post_expert_norm": True},
    ],
    ids=str,
)
def test_another_layout_is_not_plain(marks: dict[str, bool]) -> None:
    assert not has_plain_layout(Stacked(**marks))


def test_weights_of_another_type_are_not_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    experts = Stacked()
    assert not has_plain_layout(experts, (OwnTensor,))
    experts.gate_up_proj = nn.Parameter(torch.zeros(1).as_subclass(OwnTensor), requires_grad=False)
    assert not has_plain_layout(experts) and has_plain_layout(experts, (type(experts.gate_up_proj),))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not has_plain_layout(Stacked())


@pytest.mark.parametrize(
    ("dtype", "width", "expected"),
    [
        (torch.float32, 4, True),
        (torch.float32, 6, False),
        (torch.bfloat16, 8, True),
        (torch.bfloat16, 4, False),
        (torch.float16, 8, True),
        (torch.float64, 8, False),
    ],
)
def test_grouped_products_want_rows_of_16_bytes_in_three_dtypes(dtype: torch.dtype, width: int, expected: bool) -> None:
    hidden = torch.zeros(2, width, dtype=dtype)
    assert can_group(hidden, hidden.new_zeros(3, 8, width), hidden.new_zeros(3, width, width)) is expected


def test_grouped_products_want_both_weights_alike() -> None:
    hidden, up, down = torch.zeros(2, 8), torch.zeros(3, 16, 8), torch.zeros(3, 8, 8)
    assert can_group(hidden, up, down)
    assert not can_group(hidden, up.bfloat16(), down) and not can_group(hidden, up, down.bfloat16())
    assert not can_group(hidden.bfloat16(), up, down)
    assert not can_group(hidden, up.mT.contiguous().mT, down) and not can_group(hidden, up, down.mT)
    # The second weight has rows of its own.
    assert not can_group(hidden, up, torch.zeros(3, 8, 6))


@pytest.mark.parametrize(("tokens", "expected"), [(0, True), (1, True), (8, True), (9, False)])
def test_few_tokens_without_gradients_are_gathered(tokens: int, expected: bool) -> None:
    index = torch.zeros(tokens, 3, dtype=torch.int64)
    assert not is_few_to_gather(index)
    with torch.no_grad():
        assert is_few_to_gather(index) is expected


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []
    for name in ("batched_mm", "grouped_mm"):
        override(monkeypatch, ALL_EXPERTS_FUNCTIONS, name, lambda *given, name=name: names.append(name) or given)
    return names


@pytest.mark.parametrize(
    ("device", "experts", "choices", "with_gradients", "expected"),
    [
        ("meta", 32, 16, False, "batched_mm"),
        ("meta", 32, 17, False, "grouped_mm"),
        ("meta", 4, 4, False, "batched_mm"),
        ("meta", 4, 5, False, "grouped_mm"),
        ("meta", 32, 1, True, "grouped_mm"),
        ("cpu", 32, 1, False, "grouped_mm"),
    ],
)
def test_a_batched_product_is_for_few_choices_on_a_gpu_that_train_nothing(
    called: list[str], device: str, experts: int, choices: int, with_gradients: bool, expected: str
) -> None:
    stacked: Any = SimpleNamespace(gate_up_proj=torch.zeros(experts, 2, 2))
    hidden, index = torch.zeros(choices, 2, device=device), torch.zeros(choices, 1, dtype=torch.int64)
    weights = torch.ones(choices, 1)
    with torch.set_grad_enabled(with_gradients):
        found: Any = run_plainly(stacked, hidden, index, weights)
    assert called == [expected]
    assert found[0] is stacked and found[1] is hidden and found[2] is index and found[3] is weights


def test_limits_are_those_of_a_decoding_step() -> None:
    assert (module.GATHERED, module.GATHERED_TOKENS, module.FEW_CHOICES) == ("gathered", 8, 16)
