"""What layers are made of, against torch's own functions: each branch, both ends of each bound."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chorus_moe import ChorusTextConfig
from chorus_moe.modeling import layers
from chorus_moe.modeling.layers import (
    GatedMLP,
    RMSNorm,
    TokenGate,
    filled_rows,
    float32_product,
    in_chunks,
    without_autocast,
)

# float32 sums of at most 48 numbers in another order.
ATOL = 2e-6


def test_autocast_is_off_within_and_on_again_behind() -> None:
    states = torch.randn(2, 4)
    assert F.linear(states, states).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with without_autocast(states):
            assert F.linear(states, states).dtype == torch.float32
        assert F.linear(states, states).dtype == torch.bfloat16
    with without_autocast(states):
        assert F.linear(states, states).dtype == torch.float32


@pytest.mark.parametrize(
    "kinds", [(torch.float32, torch.float32), (torch.bfloat16,) * 2, (torch.float16, torch.float32)]
)
def test_a_product_is_in_float32_whatever_comes_in(kinds: tuple[torch.dtype, torch.dtype], monkeypatch: Any) -> None:
    # The short cut is for graphics cards.
    monkeypatch.setitem(layers.SERVICES, "narrow_product", None)
    states, weight = torch.randn(3, 8).to(kinds[0]), torch.randn(5, 8).to(kinds[1])
    found = float32_product(states, weight)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), states.double() @ weight.double().T, rtol=0, atol=ATOL)


@pytest.mark.parametrize(("rows", "filled"), [(1, 4), (3, 4), (4, 4), (5, 8), (8, 8)])
def test_rows_are_filled_up_to_fours_with_zeros(rows: int, filled: int) -> None:
    weight = torch.randn(rows, 3)
    found = filled_rows(weight)
    assert torch.equal(found, torch.cat((weight, torch.zeros(filled - rows, 3))))
    assert (found is weight) is (rows == filled)


@pytest.mark.parametrize("eps", [1e-6, 0.5])
@pytest.mark.parametrize("with_gradients", [True, False])
@pytest.mark.parametrize(
    "kinds", [(torch.float32, torch.float32), (torch.float64,) * 2, (torch.bfloat16, torch.float32)]
)
def test_the_norm_is_that_of_its_formula(eps: float, with_gradients: bool, kinds: tuple) -> None:
    torch.manual_seed(0)
    norm, states = RMSNorm(6, eps).to(kinds[1]), (3 * torch.randn(2, 5, 6)).to(kinds[0])
    nn.init.uniform_(norm.weight, 0.5, 2)
    before = states.clone()
    with torch.set_grad_enabled(with_gradients):
        found = norm(states)
    wide = states.double()
    normed = wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt()
    expected = normed.to(kinds[0]).double() * norm.weight.double()
    assert found.dtype == torch.promote_types(*kinds) and found.requires_grad is with_gradients
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=3e-2 if kinds[0] == torch.bfloat16 else ATOL)
    assert torch.equal(states, before)


def test_a_gate_is_a_linear_layer_of_one_number_in_float32() -> None:
    gate, states = TokenGate(8), torch.randn(2, 3, 8)
    gate.start_weights(0.02)
    assert not gate.weight.any() and gate.bias.item() == 0
    nn.init.normal_(gate.weight)
    nn.init.normal_(gate.bias)
    expected = (states * gate.weight[0]).sum(-1) + gate.bias
    torch.testing.assert_close(gate(states), expected, rtol=0, atol=ATOL)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(gate(states), expected, rtol=0, atol=ATOL)
    assert gate.bfloat16()(states.bfloat16()).dtype == torch.float32


class Recorder:
    """The sine of the first input plus the last, and how many rows came each time."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, *inputs: Tensor) -> Tensor:
        self.sizes.append(len(inputs[0]))
        return inputs[0].sin() + inputs[-1]


@pytest.mark.parametrize(
    ("count", "size", "automatic", "trains", "sizes"),
    [
        (6, 0, 6, False, [6]),
        (7, 0, 6, False, [6, 1]),
        (6, 6, 2, False, [6]),
        (6, 3, 2, False, [3, 3]),
        (6, 0, 2, True, [6]),
        (6, 6, 2, True, [6]),
        (6, 4, 2, True, [4, 2]),
        (0, 4, 2, False, [0]),
        (0, 4, 2, True, [0]),
    ],
)
def test_rows_run_in_chunks_of_the_size_that_was_asked_for(
    count: int, size: int, automatic: int, trains: bool, sizes: list[int]
) -> None:
    run, inputs = Recorder(), (torch.randn(count, 3), torch.randn(count, 3))
    with torch.set_grad_enabled(trains):
        found = in_chunks(run, inputs, size, automatic)
    assert run.sizes == sizes and torch.equal(found, inputs[0].sin() + inputs[1])


def test_a_chunk_has_1024_rows_unless_another_number_is_asked_for() -> None:
    run = Recorder()
    with torch.no_grad():
        in_chunks(run, (torch.zeros(2_049, 1),), 0)
    assert run.sizes == [1_024, 1_024, 1]


def test_a_graphics_card_takes_sixteen_times_as_many() -> None:
    run = Recorder()
    with torch.no_grad():
        in_chunks(run, (torch.zeros(33, 1, device="meta"),), 0, 2)
        in_chunks(run, (torch.zeros(33, 1, device="meta"),), 5, 2)
    assert run.sizes == [32, 1] + [5] * 6 + [3]


def test_a_chunk_in_training_is_computed_a_second_time() -> None:
    run, rows = Recorder(), torch.randn(5, 3, requires_grad=True)
    in_chunks(run, (rows,), 2).sum().backward()
    assert run.sizes[:3] == [2, 2, 1] and sorted(run.sizes[3:]) == [1, 2, 2]
    assert rows.grad is not None and torch.equal(rows.grad, rows.detach().cos() + 1)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("act", "function"), [("silu", F.silu), ("gelu", F.gelu)])
@pytest.mark.parametrize("chunk", [0, 2])
def test_a_feed_forward_is_that_of_its_formula(bias: bool, act: str, function: Any, chunk: int) -> None:
    torch.manual_seed(0)
    config = ChorusTextConfig(
        vocab_size=8, hidden_size=8, num_attention_heads=2, hidden_act=act, chunk_size_feed_forward=chunk
    )
    mlp, states = GatedMLP(config, 12, bias), torch.randn(2, 3, 8)
    for parameter in mlp.parameters():
        nn.init.normal_(parameter)
    gate, up, down = mlp.gate_proj, mlp.up_proj, mlp.down_proj
    assert [layer.bias is not None for layer in (gate, up, down)] == [bias] * 3
    add = [layer.bias if bias else torch.zeros(len(layer.weight)) for layer in (gate, up, down)]
    hidden = function(states @ gate.weight.T + add[0]) * (states @ up.weight.T + add[1])
    expected = hidden @ down.weight.T + add[2]
    torch.testing.assert_close(mlp(states), expected, rtol=1e-5, atol=1e-5)
    assert GatedMLP(config, 12).gate_proj.bias is None
