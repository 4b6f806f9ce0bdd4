"""Kernels of the experts on the GPU, in Triton: what lies between their matrix products, one pass over memory each.

- `swiglu`: the gated activation and the weight of the token's choice, `silu(gate) * up * weight`;
- `swiglu_backward`: its gradients, the weight's included, and the activation again, which was not kept;
- `combine`: the sum over a token's slots, in float32 and in a fixed order.

Imported only where there is a GPU: Triton comes with the CUDA builds of torch.

Shape suffixes: P slots, T tokens, K experts per token, D hidden size, I expert width, H = 2I.
"""

from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the kernels of the experts on a GPU need triton") from error

BLOCK = 1024  # most columns that a program works on at a time


@triton.jit
def _swiglu(hidden, weight, out, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    # 64 bits: slots times width may pass 2**31.
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate = tl.load(hidden + row * 2 * width + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(hidden + (row * 2 + 1) * width + columns, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(weight + row).to(tl.float32)
    active = gate * tl.sigmoid(gate) * up * scale
    tl.store(out + row * width + columns, active.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_backward(  # type: ignore[no-untyped-def]
    hidden, weight, grad, grad_hidden, grad_weight, active_out, width, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    scale = tl.load(weight + row).to(tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    # One program has the whole row, so the weight's gradient is summed in a fixed order, without atomics.
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < width
        gate = tl.load(hidden + row * 2 * width + columns, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(hidden + (row * 2 + 1) * width + columns, mask=inside, other=0.0).to(tl.float32)
        grad_active = tl.load(grad + row * width + columns, mask=inside, other=0.0).to(tl.float32)
        share = tl.sigmoid(gate)
        silu = gate * share
        total += grad_active * silu * up
        tl.store(active_out + row * width + columns, (silu * up * scale).to(active_out.dtype.element_ty), mask=inside)
        grad_active *= scale
        # The derivative of silu is s + silu * (1 - s), with s the sigmoid.
        grad_gate = grad_active * up * (share + silu * (1.0 - share))
        kind = grad_hidden.dtype.element_ty
        tl.store(grad_hidden + row * 2 * width + columns, grad_gate.to(kind), mask=inside)
        tl.store(grad_hidden + (row * 2 + 1) * width + columns, (grad_active * silu).to(kind), mask=inside)
    tl.store(grad_weight + row, tl.sum(total, axis=0))


@triton.jit
def _combine(states, slots, out, width, K: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for k in range(K):
        slot = tl.load(slots + token * K + k)
        # A sentinel's slot holds memory that no product wrote, so it is masked and not multiplied by zero.
        total += tl.load(states + slot * width + columns, mask=inside & (slot >= 0), other=0.0).to(tl.float32)
    tl.store(out + token * width + columns, total.to(out.dtype.element_ty), mask=inside)


def _block(width: int) -> int:
    return min(BLOCK, triton.next_power_of_2(width))


def swiglu(hidden_PH: Tensor, weight_P: Tensor) -> Tensor:
    """`silu(gate) * up * weight`, `(P, I)`, from contiguous pre-activations with the gate in front."""
    slots, width = hidden_PH.shape[0], hidden_PH.shape[1] // 2
    out_PI = hidden_PH.new_empty(slots, width)
    block = _block(width)
    if slots:
        _launch(_swiglu, (slots, triton.cdiv(width, block)), hidden_PH, weight_P, out_PI, width, BLOCK=block)
    return out_PI


def swiglu_backward(hidden_PH: Tensor, weight_P: Tensor, grad_PI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the pre-activations `(P, H)` and of the weights `(P,)` in float32, and the weighted activation."""
    slots, width = grad_PI.shape
    grad_PH, active_PI = torch.empty_like(hidden_PH), torch.empty_like(grad_PI)
    grad_P = weight_P.new_empty(slots, dtype=torch.float32)
    inputs = (hidden_PH, weight_P, grad_PI, grad_PH, grad_P, active_PI, width)
    if slots:
        _launch(_swiglu_backward, (slots,), *inputs, BLOCK=_block(width))
    return grad_PH, grad_P, active_PI


def combine(states_PD: Tensor, slot_TK: Tensor) -> Tensor:
    """The sum of every token's slots, `(T, D)`; a slot below zero adds nothing."""
    width, (tokens, top_k) = states_PD.shape[1], slot_TK.shape
    out_TD = states_PD.new_empty(tokens, width)
    block = _block(width)
    if tokens:
        grid = (tokens, triton.cdiv(width, block))
        _launch(_combine, grid, states_PD, slot_TK, out_TD, width, K=top_k, BLOCK=block)
    return out_TD


def _launch(kernel: Any, grid: tuple[int, ...], *inputs: Any, **constants: Any) -> None:
    """Run a kernel on the device of its inputs, whichever the current one is."""
    device = inputs[0].device
    if device.type == "cpu" or device.index == torch.cuda.current_device():
        kernel[grid](*inputs, **constants)
    else:
        with torch.cuda.device(device):
            kernel[grid](*inputs, **constants)
