"""A matrix times one row, or a handful of rows, on the CPU: the matrix is read once, in one stream.

The products of matrix libraries read several rows of the matrix side by side, each a stream too short for the processor
to fetch ahead: 7 to 9 GB/s on EPYC processors that can read 22 (rows of 2 KB). `numpy.vecdot` takes one row after the
other, at 17 to 21 GB/s, and further rows of the input find it in the first cache. It runs on one thread, and knows
neither bfloat16 nor float16: there torch's product runs.

Shape suffixes: R rows, D columns of the matrix, H its rows.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from chorus_moe.fastpaths.expert_slots import treats_operands_alike

STREAMED_DTYPES = torch.float32, torch.float64
# With more, a product that uses them all is left to torch: two are as fast on EPYC processors and faster on a Xeon.
MOST_THREADS = 1
MOST_ROWS = 6  # more rows are products whose arithmetic counts
MOST_VALUES = 4096  # of all rows: beside a row of the matrix they fill the first cache


class Operand(NamedTuple):
    """A tensor and, where products with it may be streamed, the same memory as an array."""

    tensor: Tensor
    array: Any


def operand(tensor: Tensor) -> Operand:
    """A buffer or an input."""
    tensor = tensor.detach()
    return Operand(tensor, tensor.numpy() if tensor.dtype in STREAMED_DTYPES else None)


def can_stream(weight: Tensor, rows: int = 1) -> bool:
    """Whether the product of a plain CPU weight `(..., H, D)` with this many rows is faster as a stream."""
    return (
        weight.dtype in STREAMED_DTYPES
        and weight.is_contiguous()
        and torch.get_num_threads() <= MOST_THREADS
        and (rows == 1 or (rows <= MOST_ROWS and rows * weight.shape[-1] <= MOST_VALUES))
    )


def weight_operand(weight: Tensor) -> Operand:
    """A weight `(..., H, D)`; without an array where torch's product is faster."""
    return operand(weight) if can_stream(weight) else Operand(weight.detach(), None)


def multiply(weight_HD: Operand, states_D: Operand, out_H: Operand) -> Tensor:
    """`out = weight @ states`."""
    if weight_HD.array is not None:
        np.vecdot(weight_HD.array, states_D.array, out=out_H.array)
        return out_H.tensor
    return multiply_plainly(weight_HD.tensor, states_D.tensor, out_H.tensor)


def multiply_plainly(weight_HD: Tensor, states_D: Tensor, out_H: Tensor) -> Tensor:
    """The same by torch."""
    # In half precision AMD's processors are up to 1.6 times as fast at a matrix with one column.
    if weight_HD.dtype in STREAMED_DTYPES or not treats_operands_alike():
        return torch.mv(weight_HD, states_D, out=out_H)
    return torch.mm(weight_HD, states_D.unsqueeze(1), out=out_H.unsqueeze(1)).squeeze(1)


def add_product(output_D: Operand, weight_DI: Operand, states_I: Operand, scale: float = 1.0, beta: int = 1) -> None:
    """`output = beta * output + scale * weight @ states`; beta 0 ignores what `output` held."""
    output, weight = output_D.tensor, weight_DI.tensor
    if weight_DI.array is not None:
        product = output_D.array if not beta else None
        product = np.vecdot(weight_DI.array, states_I.array, out=product)
        if scale != 1.0:
            np.multiply(product, scale, out=product)
        if beta:
            np.add(output_D.array, product, out=output_D.array)
    elif output.dtype in STREAMED_DTYPES:
        output.addmv_(weight, states_I.tensor, beta=beta, alpha=scale)
    elif not beta:
        multiply_plainly(weight, states_I.tensor, output).mul_(scale)
    else:
        # In bfloat16 `addmv_` is slower than a product and a sum.
        output.add_(multiply_plainly(weight, states_I.tensor, torch.empty_like(output)), alpha=scale)


def multiply_stacked(weight_EHD: Tensor, states_PD: Tensor, counts: Sequence[int]) -> Tensor:
    """`(H, P)`: the products `weight[e] @ states.T` of the `counts[e]` rows of each matrix, which stand in its order;
    streamed. Each count must be one that [`can_stream`] accepts, or zero."""
    output_HP = states_PD.new_empty(weight_EHD.shape[1], len(states_PD))
    weights, states, output = weight_EHD.detach().numpy(), states_PD.numpy(), output_HP.numpy()
    stop = 0
    for matrix, count in enumerate(counts):
        start, stop = stop, stop + count
        if count:
            np.vecdot(weights[matrix][:, None], states[None, start:stop], out=output[:, start:stop])
    return output_HP
