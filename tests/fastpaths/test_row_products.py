"""Streamed products equal torch's, and run only where they are meant to."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from chorus_moe.fastpaths import row_products
from chorus_moe.fastpaths.row_products import (
    MOST_ROWS,
    MOST_THREADS,
    MOST_VALUES,
    add_product,
    can_stream,
    multiply,
    multiply_stacked,
    operand,
    weight_operand,
)

# Relative to the largest value: float32 sums in another order; bfloat16 keeps 8 bits and rounds twice.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}
H, D = 40, 24


@pytest.fixture(params=[MOST_THREADS, MOST_THREADS + 1])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert (found.double() - expected).abs().max() <= TOLERANCE[found.dtype] * expected.abs().max()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("alike", [False, True])
def test_a_product_with_one_row(dtype: torch.dtype, alike: bool, threads: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(row_products, "treats_operands_alike", lambda: alike)
    weight, states, output = random(H, D, dtype=dtype), random(D, dtype=dtype), torch.empty(H, dtype=dtype)
    found = multiply(weight_operand(torch.nn.Parameter(weight)), operand(states), operand(output))
    assert found.data_ptr() == output.data_ptr()
    assert_close(output, weight.double() @ states.double())


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("beta", [0, 1])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_product_that_is_added_or_ignores_what_was_there(dtype: torch.dtype, beta: int, scale: float, threads: int):
    weight, states, before = random(H, D, dtype=dtype), random(D, dtype=dtype), random(H, dtype=dtype)
    output = before.clone() if beta else torch.full_like(before, torch.nan)
    add_product(operand(output), weight_operand(weight), operand(states), scale, beta)
    expected = scale * weight.double() @ states.double() + (before.double() if beta else 0)
    assert_close(output, expected)


@pytest.mark.parametrize("counts", [[2, 0, 1, MOST_ROWS], [0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 3]])
def test_products_of_the_rows_of_each_matrix(counts: list[int]):
    weight, states = random(4, H, D), random(sum(counts), D)
    expected = [weight[i].double() @ part.double().t() for i, part in enumerate(states.split(counts))]
    found = multiply_stacked(weight, states, counts)
    assert found.shape == (H, sum(counts))
    if sum(counts):
        assert_close(found, torch.cat(expected, dim=1))


def test_equal_rows_of_a_matrix_give_equal_bits():
    weight = random(H, D)
    weight[1::2] = weight[0]
    output = torch.empty(H)
    multiply(weight_operand(weight), operand(random(D)), operand(output))
    assert output[1::2].unique().tolist() == [output[0].item()]


def test_it_streams_where_it_is_faster(threads: int):
    assert can_stream(random(H, D)) == (threads <= MOST_THREADS)
    assert can_stream(random(H, 2 * MOST_VALUES)) == (threads <= MOST_THREADS)  # one row is read whatever its length
    assert not can_stream(random(H, D), MOST_ROWS + 1)
    assert not can_stream(random(H, MOST_VALUES // 2 + 1), 2)
    assert not can_stream(random(H, D, dtype=torch.bfloat16))
    assert not can_stream(random(D, H).t())
