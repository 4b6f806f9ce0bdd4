"""Feed-forwards in chunks of the sequence: exact, for every token is fed forward alone, and far smaller in memory.

At inference long sequences are cut by themselves. With `chunk_size_feed_forward` set they are cut to that size, in
training too: there each chunk is computed a second time in the backward, and nothing between its input and its output
is kept.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Tokens of a chunk where nothing else is asked for: on the CPU, whose caches hold them; a GPU wants so many times more.
CHUNK = 1024
GPU_CHUNKS = 16


def in_chunks(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], size: int, automatic: int = CHUNK) -> Tensor:
    """`function(*inputs)`, on so many rows at a time.

    Args:
        function: from tensors `(T, ...)` to one tensor `(T, D)`, each row by itself.
        size: rows of a chunk, also in training; 0 for chunks of `automatic` rows (on a GPU more), at inference only.
    """
    count, is_training = len(inputs[0]), torch.is_grad_enabled()
    if inputs[0].device.type != "cpu":
        automatic *= GPU_CHUNKS
    size = size or (count if is_training else automatic)
    if count <= size or torch.compiler.is_compiling():
        return function(*inputs)
    parts = zip(*(states.split(size) for states in inputs), strict=True)
    if is_training:
        return torch.cat([checkpoint(function, *part, use_reentrant=False) for part in parts])
    output = None
    for start, part in zip(range(0, count, size), parts, strict=True):
        result = function(*part)
        output = result.new_empty(count, *result.shape[1:]) if output is None else output
        output[start : start + size] = result
    assert output is not None
    return output
