"""Rows by task: which come next follows from the seed and the epoch alone, so a resumed run sees what is left.

Unusual here:
- an epoch has a whole number of rows of each task, fixed by the temperature, in random order: the mix does not wander;
- a task's rows are dealt like cards: all of them once before any comes again, also over the ends of epochs.
"""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from chorus_moe.training.tasks.plan import TaskPlan, quotas

ORDER, DEAL = 0, 1


class TaskSampler(Sampler[int]):
    """Row numbers of an epoch. All ranks make the same ones; accelerate deals the batches out to them.

    Args:
        seed: of all orders.
    """

    def __init__(self, plan: TaskPlan, seed: int):
        self.plan, self.seed, self.epoch = plan, seed, 0
        self.quotas = quotas(list(plan.counts.values()), plan.arguments.task_temperature)

    def __len__(self) -> int:
        return sum(self.quotas)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        found = np.concatenate([self._dealt(task) for task in range(len(self.quotas))])
        return iter(np.random.default_rng((self.seed, ORDER, self.epoch)).permutation(found).tolist())

    def _dealt(self, task: int) -> np.ndarray:
        """The rows of a task in this epoch: the next ones of an endless deal."""
        rows, quota = np.array(self.plan.rows[task]), self.quotas[task]
        start, stop = self.epoch * quota, (self.epoch + 1) * quota
        first, last = start // len(rows), (stop - 1) // len(rows)
        deals = [
            np.random.default_rng((self.seed, DEAL, task, deal)).permutation(rows) for deal in range(first, last + 1)
        ]
        return np.concatenate(deals)[start - first * len(rows) : stop - first * len(rows)]
