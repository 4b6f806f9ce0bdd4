"""Whole numbers for weights: what is stored, what is computed from it, and products that never see the weight."""

from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chorus_moe.fastpaths import quantized_weights
from chorus_moe.fastpaths.integer_products import in_pieces, integer_product, multiplies_integers
from chorus_moe.fastpaths.quantized_weights import (
    BLOCK,
    Quantized,
    QuantizedExperts,
    multiply,
    product_in_blocks,
    quantized,
    restore,
    row_product,
    store_quantized,
    stored_weight,
)
from chorus_moe.modeling.moe_banks import ChorusExperts
from tests.conftest import tiny_config

FORMATS = [(8, 64, True), (8, 16, False), (4, 32, True), (4, 16, False)]


def make_weight(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_hand(weight: np.ndarray, bits: int, group: int, symmetric: bool) -> np.ndarray:
    """Each group rounded by itself, in a plain loop."""
    limit, result = 2 ** (bits - 1), np.empty_like(weight)
    for row in range(len(weight)):
        for start in range(0, weight.shape[1], group):
            part = weight[row, start : start + group]
            if symmetric:
                scale, offset = part[np.abs(part).argmax()] / -limit, np.float32(0)
            else:
                scale = (part.max() - part.min()) / np.float32(2 * limit - 1)
                offset = part.min() + limit * scale
            whole = np.clip(np.round((part - offset) / scale), -limit, limit - 1)
            result[row, start : start + group] = whole * scale + offset
    return result


@pytest.mark.parametrize(("bits", "group", "symmetric"), FORMATS)
def test_weights_are_rounded_to_the_nearest_number_of_their_group(bits: int, group: int, symmetric: bool) -> None:
    weight = make_weight(6, 64)
    found = quantized(weight, bits, group, symmetric)
    expected = by_hand(weight.numpy(), bits, group, symmetric)
    # A number halfway between two may go to either side where a division rounds: none does here.
    assert np.abs(found.dequantize().numpy() - expected).max() < 1e-6
    assert found.values.nbytes == weight.numel() * bits // 8
    assert found.shape == weight.shape
    assert found.bits == bits


def test_groups_of_equal_numbers_and_of_zeros_are_exact() -> None:
    weight = torch.zeros(2, 32)
    weight[1] = 0.25
    for symmetric in (True, False):
        assert torch.equal(quantized(weight, 4, 16, symmetric).dequantize(), weight)


def test_a_bfloat16_weight_keeps_its_dtype_and_rounds_by_the_scale_that_is_stored() -> None:
    weight = make_weight(4, 64).bfloat16()
    found = quantized(weight, 8, 64)
    assert found.dequantize().dtype == torch.bfloat16
    error = (found.values.float() * found.scale.float() - weight.float()).abs()
    # The one number that becomes -128 misses by what bfloat16 rounds the scale, all others by half a step.
    assert (error <= found.scale.float().abs() * 0.51).float().mean() > 0.98


@pytest.mark.parametrize(("bits", "group", "symmetric"), FORMATS)
def test_products_agree_with_the_computed_weight(bits: int, group: int, symmetric: bool) -> None:
    found, states = quantized(make_weight(24, 64), bits, group, symmetric), make_weight(5, 64, seed=1)
    expected = states.double() @ found.dequantize().double().t()
    # Sums of 64 float32 terms: the worst seen over 20 seeds is 6e-6.
    for product in (product_in_blocks(states, found), torch.stack([row_product(found, row) for row in states])):
        assert (product - expected).abs().max() < 2e-5


def test_states_that_are_rounded_give_the_same_product_in_whole_numbers_and_in_floats() -> None:
    weight = replace(quantized(make_weight(24, 64), 8, 64), rounds_states=True)
    states = make_weight(5, 64, seed=1)
    pieces, scale = in_pieces(states, weight.pieces)
    assert len(pieces) == 1
    expected = (pieces[0].float() * scale) @ weight.dequantize().t()
    assert (torch.stack([row_product(weight, row) for row in states]) - expected).abs().max() < 2e-5
    assert (product_in_blocks(weight.rounded(states), weight) - expected).abs().max() < 2e-5
    assert (states @ weight.dequantize().t() - expected).abs().max() > 1e-3
    if multiplies_integers():
        assert (integer_product(pieces, weight.values, weight.scale).mul_(scale) - expected).abs().max() < 2e-5
    # Parts of it round as well.
    assert all(part.rounds_states for part in (*weight.tensor_split(2, dim=-2), weight[:4]))


@pytest.mark.parametrize("index", [None, torch.tensor([2])])
def test_a_product_in_streams_is_the_product(index: torch.Tensor | None) -> None:
    stack = quantized(make_weight(4 * 24, 64).unflatten(0, (4, 24)), 4, 32, False)
    weight = stack[1] if index is None else stack
    state = make_weight(1, 64, seed=1)[0]
    whole, parted = (row_product(weight, state, streams, index) for streams in (1, 4))
    assert whole.shape == ((24,) if index is None else (1, 24))
    expected = stack[1 if index is None else index].dequantize() @ state
    assert (whole - expected).abs().max() < 2e-5 and (parted - expected).abs().max() < 2e-5


def test_a_weight_larger_than_a_block_is_multiplied_block_by_block() -> None:
    found, states = quantized(make_weight(9, BLOCK // 4), 8, BLOCK // 4), make_weight(2, 3, BLOCK // 4, seed=1)
    expected = F.linear(states.double(), found.dequantize().double())
    # Sums of 65,536 terms of size 1 in float32: .0014 to .0015 on a processor that adds eight numbers at once, also
    # where the whole weight is multiplied. A block in another's place is off by hundreds.
    assert (product_in_blocks(states, found) - expected).abs().max() < 1e-2


def test_gradients_pass_a_quantised_weight_and_keep_no_copy_of_it() -> None:
    found = quantized(make_weight(24, 64), 4, 32)
    states = make_weight(5, 64, seed=1).requires_grad_()
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        product = multiply(states, found)
    product.square().sum().backward()
    plain = states.detach().clone().requires_grad_()
    F.linear(plain, found.dequantize()).square().sum().backward()
    torch.testing.assert_close(states.grad, plain.grad)
    assert 24 * 64 not in kept


def make_experts(seed: int = 0) -> ChorusExperts:
    config = tiny_config().text_config
    experts = ChorusExperts(config, config.banks_of_layer(config.sparse_layers[0])[0])
    for index, parameter in enumerate(experts.parameters()):
        parameter.data = make_weight(*parameter.shape, seed=seed + index) * 0.1
    return experts


def store_all(module: nn.Module, bits: int = 4, group: int = 16) -> None:
    with torch.no_grad():
        store_quantized(module, {n: quantized(p, bits, group) for n, p in module.named_parameters()})


@pytest.mark.parametrize("rows", [1, 3, 200])
@pytest.mark.parametrize("is_trained", [False, True])
def test_stacked_experts_agree_with_their_computed_weights(rows: int, is_trained: bool) -> None:
    experts = make_experts()
    experts.config = tiny_config().text_config
    experts.config._experts_implementation = "cpu_mm"
    store_all(experts)
    plain = deepcopy(experts)
    restore(plain)
    assert isinstance(experts, QuantizedExperts)
    assert type(plain) is ChorusExperts
    width, count = experts.hidden_dim, experts.num_experts
    states, index = make_weight(rows, width), torch.arange(2 * rows).view(rows, 2) % (count + 1)
    weights = torch.rand(rows, 2, generator=torch.Generator().manual_seed(1))
    for module in (experts, plain):
        module._is_expert_parallel = True  # an id of E is a sentinel
    outputs = []
    for module in (experts, plain):
        leaf = states.clone().requires_grad_(is_trained)
        output = module(leaf, index, weights)
        if is_trained:
            output.square().sum().backward()
        outputs.append((output.detach(), leaf.grad))
    torch.testing.assert_close(outputs[0][0], outputs[1][0], atol=1e-5, rtol=1e-4)
    if is_trained:
        torch.testing.assert_close(outputs[0][1], outputs[1][1], atol=1e-4, rtol=1e-4)


def test_equal_layers_have_one_class() -> None:
    # Otherwise the compiler, which tells layers apart by their class, would compile each of them.
    first, second = nn.Linear(16, 4), nn.Linear(16, 4)
    for layer in (first, second):
        store_quantized(layer, {"weight": quantized(layer.weight, 8, 16)})
    assert type(first) is type(second)


def test_a_computed_weight_cannot_be_written_to() -> None:
    layer = nn.Linear(16, 4)
    store_quantized(layer, {"weight": quantized(layer.weight, 8, 16)})
    # As PEFT does when it merges: into a copy the change would be lost.
    with pytest.raises(RuntimeError, match="dequantize"):
        layer.weight.data += 1
    assert isinstance(stored_weight(layer, "weight"), Quantized)


@pytest.mark.parametrize("block", [1, 64, 65, 200, 5 * 64])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_row_wider_than_a_block_is_multiplied_alone(
    block: int, symmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantized_weights, "BLOCK", block)
    weight, states = quantized(make_weight(5, 64), 8, 64, symmetric), make_weight(3, 64, seed=1)
    torch.testing.assert_close(product_in_blocks(states, weight), states @ weight.dequantize().T, rtol=1e-5, atol=1e-5)


def test_states_are_rounded_by_row_around_zero_or_not_at_all() -> None:
    def stack(kind: str | None = None, by: str = "PerRow", **fixed: float) -> SimpleNamespace:
        granularity = type(by, (), {})()
        asked = (
            None if kind is None else SimpleNamespace(mapping_type=SimpleNamespace(name=kind), granularity=granularity)
        )
        others = dict.fromkeys(("act_quant_scale", "act_quant_zero_point", "act_pre_scale"))
        return SimpleNamespace(act_quant_kwargs=asked, **others | fixed)

    assert not quantized_weights._rounds_states(stack())
    assert quantized_weights._rounds_states(stack("SYMMETRIC"))
    for wrong, named in (
        (stack("ASYMMETRIC"), "ASYMMETRIC"),
        (stack("SYMMETRIC", by="PerTensor"), "PerTensor"),
        (stack("SYMMETRIC", act_pre_scale=2.0), "not with a fixed scale"),
        (stack(act_quant_scale=2.0), "not with a fixed scale"),
        (stack(act_quant_zero_point=2.0), "not with a fixed scale"),
    ):
        with pytest.raises(ValueError, match=named):
            quantized_weights._rounds_states(wrong)
