"""Writes a sharded safetensors checkpoint in consecutive pieces: memory never holds a whole tensor.

The layout is that of `save_pretrained`: `model.safetensors`, or numbered shards and an index of them.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from chorus_moe.surgery.parent_checkpoint import DTYPES

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()} | {torch.int64: "I64", torch.bool: "BOOL"}
# The header is padded to this, so that the data behind it starts at an aligned byte.
ALIGNMENT = 8
# Bytes handed to the system at once: larger writes take twice the processor time.
BLOCK = 2**20


# Called, it yields the tensor in consecutive pieces, in memory order.
Recipe = Callable[[], Iterable[Tensor]]


class PlannedTensor(NamedTuple):
    """A tensor that is not made yet."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    recipe: Recipe

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_checkpoint(folder: Path, tensors: Mapping[str, PlannedTensor], max_shard_size: int) -> list[str]:
    """Write the tensors and, for more than one file, their index.

    Args:
        max_shard_size: bytes in a file, unless one tensor has more.

    Returns:
        names of the files.
    """
    shards = _shards(tensors, max_shard_size)
    names = (
        [SAFE_WEIGHTS_NAME]
        if len(shards) == 1
        else [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    )
    for name, shard in zip(names, shards, strict=True):
        _write_shard(folder / name, {key: tensors[key] for key in shard})
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(tensor.size for tensor in tensors.values())},
            "weight_map": {key: name for name, shard in zip(names, shards, strict=True) for key in shard},
        }
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(text, encoding="utf-8")
    return names


def _shards(tensors: Mapping[str, PlannedTensor], max_shard_size: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        # A tensor larger than the limit gets a shard for itself; it cannot be divided between files.
        if shards[-1] and size + tensor.size > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.size
    return shards


def _write_shard(path: Path, tensors: Mapping[str, PlannedTensor]) -> None:
    """One file. Wider numbers come first, as the format's own writer does it, so that all are aligned."""
    # A 1-byte tensor in front would leave every wider one behind it at an odd address.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, tensor in ordered:
        stop = start + tensor.size
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, stop],
        }
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    # JSON allows trailing spaces, and the format expects the padding to be part of the header.
    text += b" " * (-len(text) % ALIGNMENT)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in ordered:
            _write_tensor(file, name, tensor)
        file.flush()
        # The configuration is written after the weights and marks the folder as complete, so the weights must be on
        # disk before it.
        os.fsync(file.fileno())


def _write_tensor(file: BinaryIO, name: str, tensor: PlannedTensor) -> None:
    written = 0
    for data in _bytes(tensor):
        written += file.write(data)
    # The header is written already, from the planned shape: a recipe that yields less would shift all tensors behind.
    if written != tensor.size:
        raise ValueError(f"tensor {name!r}: its pieces have {written} bytes, expected {tensor.size}")


def _bytes(tensor: PlannedTensor) -> Iterator[memoryview]:
    for piece in tensor.recipe():
        flat = piece.detach().to(tensor.dtype).contiguous().reshape(-1)
        # Bytes, because numpy has no bfloat16; `.data` hands them to `write` without a copy.
        data = flat.view(torch.uint8).numpy().data
        yield from (data[start : start + BLOCK] for start in range(0, len(data), BLOCK))
