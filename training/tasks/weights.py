"""What the loss of each task weighs: fixed, learned as an uncertainty, or by how fast the task is being learned.

Shape suffixes: K tasks.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from chorus_moe.training.objectives.objective import Objective
from chorus_moe.training.tasks.plan import TaskPlan


class UncertaintyWeights(Objective):
    """One learned log-variance `s` for each task (Kendall et al. 2018, arXiv 1705.07115, equation 10).

    The loss of a task with loss L and share p of the labels is `p * (exp(-s) * L + s / 2)`, as for an answer that is
    chosen among words: at the optimum `exp(-s) = 1 / (2 L)`. All begin at 0, which is plain training. The first term is
    the weight in the model's own loss; the second, which keeps variances from growing without end, is this objective.
    """

    by_labels = True

    def __init__(self, plan: TaskPlan):
        super().__init__("task_uncertainty")
        self.learning_rate = plan.arguments.task_learning_rate
        self.log_variances = nn.Parameter(torch.zeros(len(plan.names)))
        # Labels of each task in the micro-batch.
        self.tokens_K = torch.zeros(len(plan.names))

    def weights(self) -> Tensor:
        """`(K,)`."""
        return torch.exp(-self.log_variances)

    def forward(self, model: nn.Module, inputs: Mapping[str, Any], outputs: object) -> Tensor:
        share_K = self.tokens_K / self.tokens_K.sum().clamp(min=1)
        return (share_K * self.log_variances).sum() / 2


class RateWeights:
    """Dynamic Weight Average (Liu et al. 2019, arXiv 1803.10704): tasks whose loss falls slowly weigh more.

    `w_k = K * softmax(r_k / T)`, where `r_k` is the loss of the last window over that of the window before. The paper's
    window is an epoch; here it is a number of steps. The first two windows have weights of 1.

    Args:
        memory: what is remembered, empty at first and changed here: numbers that JSON keeps to the bit.
    """

    def __init__(self, plan: TaskPlan, memory: dict[str, Any]):
        self.plan, self.memory = plan, memory
        zeros = [0.0] * len(plan.names)
        for name, value in {"sums": zeros, "tokens": zeros, "steps": 0, "windows": []}.items():
            memory.setdefault(name, value)

    def weights(self) -> list[float]:
        if len(self.memory["windows"]) < 2:
            return [1.0] * len(self.plan.names)
        before, last = (torch.tensor(window, dtype=torch.float64) for window in self.memory["windows"])
        rates_K = last / before.clamp(min=1e-12)
        return (len(rates_K) * torch.softmax(rates_K / self.plan.arguments.task_rate_softness, dim=0)).tolist()

    def add(self, sums_K: Tensor, tokens_K: Tensor) -> None:
        """The losses of a step, over all micro-batches and ranks."""
        # A step that the guard skips has taught nothing.
        if not torch.isfinite(sums_K).all():
            return
        memory, num_tasks = self.memory, len(self.plan.names)
        for name, value_K in (("sums", sums_K), ("tokens", tokens_K)):
            memory[name] = (torch.tensor(memory[name], dtype=torch.float64) + value_K.double().cpu()).tolist()
        memory["steps"] += 1
        # A window goes on until every task has been seen in it.
        if memory["steps"] >= self.plan.arguments.task_rate_steps and all(memory["tokens"]):
            means = [total / count for total, count in zip(memory["sums"], memory["tokens"], strict=True)]
            memory["windows"] = [*memory["windows"], means][-2:]
            memory |= {"sums": [0.0] * num_tasks, "tokens": [0.0] * num_tasks, "steps": 0}
