"""Which rows an update takes, and how they come to the trainer: each in a batch of its own."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from opacus.utils.uniform_sampler import UniformWithReplacementSampler
from torch.utils.data import Sampler

ROWS = "rows"


class PoissonBatches(Sampler[list[int]]):
    """Batches of row numbers, `parts` an update. An update takes each row with probability `rate`, apart from all
    others, and deals its rows among its batches, which so differ in size and may be empty.

    Args:
        steps: updates in a pass over this sampler.
        generator: see `secret_generator`.
    """

    def __init__(self, num_rows: int, rate: float, steps: int, parts: int, generator: torch.Generator):
        self.parts = parts
        self.updates = UniformWithReplacementSampler(
            num_samples=num_rows, sample_rate=rate, steps=steps, generator=generator
        )

    def __len__(self) -> int:
        return len(self.updates) * self.parts

    def __iter__(self) -> Iterator[list[int]]:
        for rows in self.updates:
            for part in range(self.parts):
                yield rows[part :: self.parts]


class RowByRow:
    """Collates each row alone, so that none sees another: `{"rows": [batch of one row, ...]}`, also of no rows."""

    def __init__(self, collator: Callable[[Sequence[Any]], Mapping[str, Any]]):
        self.collator = collator

    def __call__(self, rows: Sequence[Any]) -> dict[str, list[Mapping[str, Any]]]:
        return {ROWS: [self.collator([row]) for row in rows]}
