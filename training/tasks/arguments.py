"""The section `tasks` of a recipe."""

from dataclasses import dataclass, field


@dataclass
class TaskArguments:
    """How the tasks of the rows share a run. A `tasks:` section in a recipe switches it on."""

    use_tasks: bool = field(default=False, metadata={"help": "learn by the column `task` of the rows"})
    task_names: list[str] | None = field(
        default=None, metadata={"help": "learn these tasks only, and leave the rows of others out; None: all"}
    )
    task_temperature: float = field(
        default=1.0,
        metadata={"help": "a task of n rows is drawn in proportion to n^(1/temperature): 1 as the data, 100 evenly"},
    )
    task_weighting: str = field(
        default="fixed", metadata={"help": "what the loss of a task weighs: fixed, uncertainty (learned) or rate"}
    )
    task_weights: str | None = field(
        default=None, metadata={"help": "task -> weight of its loss, a mapping; 1 for tasks that are not in it"}
    )
    task_learning_rate: float = field(
        default=1e-2, metadata={"help": "uncertainty: learning rate of the weights, before the run's schedule"}
    )
    task_rate_steps: int = field(
        default=100, metadata={"help": "rate: steps over which losses are averaged before they are compared"}
    )
    task_rate_softness: float = field(
        default=2.0, metadata={"help": "rate: temperature of the softmax over rates; larger is closer to even weights"}
    )
    task_conflicts: str = field(
        default="none",
        metadata={"help": "none; measure: log the cosines of the tasks' gradients; pcgrad, aligned_mtl, upgrad"},
    )
