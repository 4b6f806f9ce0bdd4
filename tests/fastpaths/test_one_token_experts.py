"""Experts of one token."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from chorus_moe.fastpaths.one_token_experts import _free, run_one_token

EXPERTS, DIM, WIDTH = 5, 12, 8
# Relative to the largest value: float32 sums in another order; bfloat16 keeps 8 bits and rounds a few times.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}


def weights(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (1, DIM), (EXPERTS, 2 * WIDTH, DIM), (EXPERTS, DIM, WIDTH)
    hidden, gate_up, down = (torch.randn(*shape, generator=generator).to(dtype) for shape in shapes)
    return hidden, gate_up, down


def slow(hidden: Tensor, index: list[int], scales: list[float], gate_up: Tensor, down: Tensor) -> Tensor:
    output = torch.zeros(1, DIM, dtype=torch.float64)
    for expert, scale in zip(index, scales, strict=True):
        if expert < EXPERTS:
            gate, up = (hidden.double() @ gate_up[expert].double().t()).chunk(2, dim=-1)
            output += scale * (F.silu(gate) * up) @ down[expert].double().t()
    return output


@torch.no_grad()
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("index", [[3], [4, 0], [2, EXPERTS, 1], [EXPERTS, EXPERTS]])
def test_the_sum_is_that_of_a_slow_loop(dtype: torch.dtype, index: list[int]):
    hidden, gate_up, down = weights(dtype)
    scales = [0.5, 0.25, 2.0][: len(index)]
    found, expected = run_one_token(hidden, index, scales, gate_up, down), slow(hidden, index, scales, gate_up, down)
    assert found.dtype == dtype and found.shape == (1, DIM)
    assert (found.double() - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max().clamp(min=1)


@torch.no_grad()
def test_no_output_is_overwritten_by_the_next():
    hidden, gate_up, down = weights(torch.float32)
    first = run_one_token(hidden, [1, 2], [1.0, 1.0], gate_up, down)
    kept = first.clone()
    run_one_token(2 * hidden, [0, 3], [1.0, 1.0], gate_up, down)
    assert torch.equal(first, kept)


def test_buffers_made_in_inference_mode_serve_outside_of_it():
    _free.clear()
    hidden, gate_up, down = weights(torch.float32)
    with torch.inference_mode():
        inside = run_one_token(hidden, [1], [1.0], gate_up, down)
    with torch.no_grad():
        assert torch.equal(run_one_token(hidden, [1], [1.0], gate_up, down), inside)
