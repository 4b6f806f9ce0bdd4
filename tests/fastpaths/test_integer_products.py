"""Products in whole numbers against double precision."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import chorus_moe.fastpaths.experts_cpu as experts_cpu
from chorus_moe.fastpaths import integer_products
from chorus_moe.fastpaths.integer_products import in_pieces, integer_product, multiplies_integers
from chorus_moe.fastpaths.quantized_weights import (
    multiplies_whole_numbers,
    multiply,
    quantized,
    restore,
    store_quantized,
)
from tests.fastpaths.test_quantized_weights import make_experts, make_weight

needs_integers = pytest.mark.skipif(not multiplies_integers(), reason="this processor multiplies no int8 matrices")


def rows_with_outliers(rows: int, width: int) -> Tensor:
    """What language models have: one feature is hundreds of times as large as the others."""
    states = make_weight(rows, width, seed=1)
    states[:, 3] *= 500
    return states


def test_pieces_hold_all_bits_beside_the_largest_number() -> None:
    rows = rows_with_outliers(5, 64)
    pieces, scale = in_pieces(rows)
    found = sum(piece.double() / 254**index for index, piece in enumerate(pieces)) * scale.double()
    # Half a step of the last piece, and what float32 rounds on the way: 1.3e-7 of the largest number was seen.
    assert ((found - rows).abs() / rows.abs().amax(-1, keepdim=True)).max() < 3e-7


def test_rows_of_zeros_and_of_tiny_numbers_are_finite() -> None:
    rows = torch.zeros(3, 16)
    rows[1] = 1e-40
    pieces, scale = in_pieces(rows)
    assert torch.equal(pieces[:, 0], torch.zeros(3, 16, dtype=torch.int8))
    assert scale.isfinite().all()


@needs_integers
@pytest.mark.parametrize(("rows", "count", "width"), [(1, 24, 64), (7, 33, 96), (32, 16, 2048)])
def test_products_are_as_exact_as_in_float32(rows: int, count: int, width: int) -> None:
    weight, states = quantized(make_weight(count, width), 8, width), rows_with_outliers(rows, width)
    expected = states.double() @ weight.dequantize().double().t()
    pieces, scale = in_pieces(states)
    found = integer_product(pieces, weight.values, weight.scale).mul_(scale)
    # Half a step of the last piece for each term, and float32's rounding of sums and scales.
    terms = scale.double() / 254**2 / 2 * weight.dequantize().double().abs().sum(-1)
    assert ((found - expected).abs() < terms + 3e-7 * expected.abs().max()).all()


@needs_integers
def test_a_number_that_is_not_finite_is_seen_in_its_row_alone() -> None:
    weight, states = quantized(make_weight(8, 64), 8, 64), make_weight(3, 64, seed=1)
    states[0, 5], states[1, 5] = float("inf"), float("nan")
    product = multiply(states, weight)
    assert product[:2].isnan().all()
    assert product[2].isfinite().all()


@needs_integers
def test_only_few_rows_of_int8_rows_with_one_scale_are_multiplied_so() -> None:
    weight = make_weight(8, 64)
    assert multiplies_whole_numbers(quantized(weight, 8, 64), integer_products.MOST_ROWS)
    assert not multiplies_whole_numbers(quantized(weight, 8, 64), integer_products.MOST_ROWS + 1)
    for bits, group, symmetric in ((8, 16, True), (8, 64, False), (4, 64, True)):
        assert not multiplies_whole_numbers(quantized(weight, bits, group, symmetric), 1)
    assert not multiplies_whole_numbers(quantized(weight.double(), 8, 64), 1)


@needs_integers
def test_bfloat16_layers_are_closer_to_the_truth_than_their_dtype() -> None:
    weight, states = quantized(make_weight(8, 64).bfloat16(), 8, 64), make_weight(3, 64, seed=1).bfloat16()
    expected = states.double() @ (weight.values.double() * weight.scale.double()).t()
    product = multiply(states, weight)
    assert product.dtype == torch.bfloat16
    # One rounding to bfloat16 at the end: half of 2**-7.
    torch.testing.assert_close(product.double(), expected, rtol=2**-8, atol=1e-4)


@needs_integers
@pytest.mark.parametrize("activation", ["silu", "module"])
def test_experts_agree_with_their_computed_weights(activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    experts = make_experts()
    if activation == "module":
        experts.act_fn = nn.Tanh()
    experts.config._experts_implementation = "cpu_mm"
    experts._is_expert_parallel = True  # an id of E is a sentinel
    with torch.no_grad():
        weights_of = dict(experts.named_parameters())
        store_quantized(experts, {name: quantized(each, 8, each.shape[-1]) for name, each in weights_of.items()})
    ran = []
    run = experts_cpu._run_integers
    monkeypatch.setattr(experts_cpu, "_run_integers", lambda *a: ran.append(1) or run(*a))
    states = rows_with_outliers(9, experts.hidden_dim)
    index = torch.arange(18).view(9, 2) % (experts.num_experts + 1)
    weights = torch.rand(9, 2, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = experts(states, index, weights)
        restore(experts)
        expected = experts.double()(states.double(), index, weights.double())
    # As for one product; a gated activation and a second product follow. 4e-7 of the largest was seen.
    assert (found - expected).abs().max() < 2e-6 * expected.abs().max()
    assert ran


@pytest.fixture
def anew() -> Iterator[Callable[[], bool]]:
    """Asks again, and forgets the answer."""
    multiplies_integers.cache_clear()
    yield multiplies_integers
    multiplies_integers.cache_clear()


FLAGS = {"amx_int8", "avx512_vnni", "avx_vnni"}
CPUINFO = Path("/proc/cpuinfo")


@pytest.mark.skipif(not CPUINFO.exists(), reason="flags of a processor are read from Linux")
@pytest.mark.skipif("ONEDNN_MAX_CPU_ISA" in os.environ, reason="oneDNN is told to act like an older processor")
def test_a_processor_with_the_instructions_multiplies_whole_numbers(anew: Callable[[], bool]) -> None:
    assert anew() == bool(FLAGS & set(CPUINFO.read_text().split()))


@pytest.mark.parametrize("name", sorted(FLAGS))
@pytest.mark.parametrize("way", ["exact", "sums two products in 16 bits", "no oneDNN", "no instruction"])
def test_whole_numbers_are_multiplied_where_the_sums_are_right(
    name: str, way: str, anew: Callable[[], bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    def product(left: Tensor, right: Tensor) -> Tensor:
        if way == "exact":
            return (left.long() @ right.long()).int()
        # As oneDNN does it without these instructions: one side without a sign, pairs cut off at 16 bits.
        pairs = ((left.long() + 128)[:, :, None] * right.long()).unflatten(1, (-1, 2)).sum(2).clamp(-(2**15), 2**15 - 1)
        return (pairs.sum(1) - 128 * right.long().sum(0)).int()

    monkeypatch.setattr(torch, "_int_mm", product)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {name: way != "no instruction", "avx2": True})
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: way != "no oneDNN")
    if way.startswith("no"):
        monkeypatch.setattr(torch, "_int_mm", lambda left, right: (left.long() @ right.long()).int())
    assert anew() == (way == "exact")
