"""A checkpoint that is written while the run goes on: what is saved is copied first, then written by a thread."""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from chorus_moe.training.scale.shards import (
    file_numbers,
    join_pieces,
    named_failures,
    optimizer_writer,
    weights_writer,
    write_numbers,
)


class BackgroundWriter:
    """Writes one checkpoint at a time. Every rank must make one, and call it alike."""

    def __init__(self) -> None:
        # Of their own, so that the threads' exchanges cannot meet those of the training steps, nor each other's.
        groups: list[Any] = [dist.new_group(backend="gloo") for _ in range(3)]
        self._weights, self._optimizer, self._asked = groups
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._written: Future[None] | None = None

    @property
    def is_writing(self) -> bool:
        return self._written is not None

    def begin(
        self, weights: dict[str, Tensor], tensors: dict[str, Tensor], settings: Mapping[str, Any], folder: Path
    ) -> None:
        """Copy all of it, and return."""
        numbers = file_numbers(weights)
        begun: list[Any] = [
            dcp.async_save(weights, storage_writer=weights_writer(folder, numbers), process_group=self._weights),
            dcp.async_save(tensors, storage_writer=optimizer_writer(folder), process_group=self._optimizer),
        ]

        def finish() -> None:
            with named_failures():
                for future in begun:
                    future.result()
            join_pieces(folder, numbers, self._weights)
            write_numbers(settings, folder)

        self._written = self._thread.submit(finish)

    def all_done(self) -> bool:
        """Whether all ranks have written; one that failed is done, too."""
        assert self._written is not None
        flag = torch.tensor(int(self._written.done()))
        dist.all_reduce(flag, op=dist.ReduceOp.MIN, group=self._asked)
        return bool(flag)

    def settle(self) -> None:
        """Wait until all is written. Raises what the writing raised."""
        written, self._written = self._written, None
        if written is not None:
            written.result()
