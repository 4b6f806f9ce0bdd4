"""The language loss by task, in the place of the model's own loss function.

Unusual here:
- it is the same sum over tokens as without tasks, each token times the weight of its row's task. So weights of 1 are
  plain training, and accumulation and ranks need no care: every term is a sum divided by the labels of the whole step;
- it works inside the model, where balance, z- and other losses of routers are added, which no task weighs.

Shape suffixes: B batch, S sequence, V vocabulary, K tasks.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor


@dataclass
class TaskLosses:
    """What one forward found.

    Args:
        weighted_K: the part of each task in the loss of the step, with its graph.
        sums_K: sum of the plain losses of the tokens of each task, without a graph.
        tokens_K: labelled tokens of each task.
    """

    weighted_K: Tensor
    sums_K: Tensor
    tokens_K: Tensor


class TaskLoss:
    """A `loss_function` for a model. Outside of [`TaskLoss.of`], as in evaluation, it is the one that it replaces.

    Args:
        replaced: the loss function of the model so far.
        num_tasks: K.
        epsilon: label smoothing.
    """

    def __init__(self, replaced: Callable[..., Tensor], num_tasks: int, epsilon: float = 0.0):
        self.replaced, self.num_tasks, self.epsilon = replaced, num_tasks, epsilon
        self._task_B: Tensor | None = None
        self._weight_K: Tensor | None = None
        self._is_apart = False
        self.found: TaskLosses | None = None

    @contextmanager
    def of(self, task_B: Tensor, weight_K: Tensor, is_apart: bool = False) -> Iterator[None]:
        """Within the block, losses are those of these tasks; afterwards `found` holds those of the first forward.

        Args:
            task_B: the number of each row's task.
            weight_K: what each task's loss weighs.
            is_apart: keep the graph of the tasks' losses out of the model's loss, which has their value: each is to be
                differentiated by itself.
        """
        self._task_B, self._weight_K, self._is_apart, self.found = task_B, weight_K, is_apart, None
        try:
            yield
        finally:
            self._task_B = self._weight_K = None

    def __call__(
        self, logits: Tensor, labels: Tensor, *, num_items_in_batch: Tensor | int | None = None, **options: Any
    ) -> Tensor:
        if self._task_B is None or self._weight_K is None:
            return self.replaced(logits, labels, num_items_in_batch=num_items_in_batch, **options)
        target_BS = labels[:, 1:].to(logits.device)
        loss_BS = F.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), target_BS.flatten(), reduction="none", label_smoothing=self.epsilon
        ).view(target_BS.shape)
        has_label_BS = target_BS != -100
        # A row that stands for a broken one has no label, and its task does not matter.
        task_B = self._task_B.to(logits.device).clamp(min=0)
        zeros_K = loss_BS.new_zeros(self.num_tasks)
        sums_K = zeros_K.index_add(0, task_B, loss_BS.sum(dim=1))
        tokens_K = zeros_K.index_add(0, task_B, has_label_BS.sum(dim=1).to(zeros_K.dtype))
        counted = tokens_K.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        counted = counted.to(logits.device) if isinstance(counted, Tensor) else counted
        if self.found is not None:
            # At an exit: the weights are those of the tasks, and are not learned there.
            return (self._weight_K.detach() * sums_K).sum() / counted
        weighted_K = self._weight_K * sums_K / counted
        self.found = TaskLosses(weighted_K, sums_K.detach(), tokens_K)
        return weighted_K.detach().sum() if self._is_apart else weighted_K.sum()
