"""Which tasks a run learns, from which rows, and how: everything that is known, and checked, before the first step."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

from chorus_moe.modeling.configuration_banks import check_name
from chorus_moe.training.data import RowDataset, RowReader
from chorus_moe.training.layouts import TASK
from chorus_moe.training.recipe import read_mapping
from chorus_moe.training.tasks.arguments import TaskArguments

WEIGHTINGS = ("fixed", "uncertainty", "rate")
# What needs torchjd; `measure` needs the gradients of each task alone, and no library.
RESOLVED = ("pcgrad", "aligned_mtl", "upgrad")
CONFLICTS = ("none", "measure", *RESOLVED)
# What torchjd's UPGrad asks for and does not install by itself.
UPGRAD_PACKAGES = ("qpsolvers", "quadprog")


class TaskPlan(NamedTuple):
    """The tasks of a run, in the order of their names.

    Args:
        names: the tasks.
        rows: the numbers of the rows of each task.
        num_rows: rows of the data, those of other tasks included.
        weights: fixed weight of each task's loss.
        arguments: the section `tasks`.
    """

    names: tuple[str, ...]
    rows: tuple[tuple[int, ...], ...]
    num_rows: int
    weights: tuple[float, ...]
    arguments: TaskArguments

    @property
    def counts(self) -> dict[str, int]:
        return {name: len(rows) for name, rows in zip(self.names, self.rows, strict=True)}

    @property
    def settings(self) -> dict[str, Any]:
        """What decides which rows come next and what the saved state means: a resumed run must have the same."""
        given = self.arguments
        return {
            "rows": self.counts,
            "task_temperature": given.task_temperature,
            "task_weighting": given.task_weighting,
            "task_conflicts": given.task_conflicts,
        }

    def __str__(self) -> str:
        left_out = self.num_rows - sum(self.counts.values())
        told = ", ".join(f"{name} ({count:,} rows)" for name, count in self.counts.items())
        return f"tasks: {told}" + (f"; {left_out:,} rows of other tasks are left out" if left_out else "")


def plan_tasks(arguments: TaskArguments, rows: RowReader | Sequence[Mapping[str, Any]]) -> TaskPlan:
    """The plan for the rows of a run.

    Raises:
        ValueError: rows that stream, a row without a task, a task without rows, fewer than two tasks where they would
            be weighed against each other, a method that is unknown or whose library is missing, or a number that makes
            no sense.
    """
    _check_methods(arguments)
    if isinstance(rows, RowReader) and not isinstance(rows, RowDataset):
        raise ValueError("tasks: rows that stream have no tasks before they are read; save them as a table first")
    found = tasks_of(rows)
    for number, name in enumerate(found):
        if not isinstance(name, str) or not name.strip():
            raise ValueError(
                f"tasks: row {number} has no task (key {TASK!r}: {name!r:.60}); every row needs a name there"
            )
    counts = Counter(found)
    names = sorted(counts) if arguments.task_names is None else list(dict.fromkeys(arguments.task_names))
    if not names:
        raise ValueError("tasks.task_names is empty; leave it out to learn all tasks")
    for name in names:
        _check_task("task_names", str(name), counts)
    if len(names) < 2 and (arguments.task_weighting != "fixed" or arguments.task_conflicts != "none"):
        raise ValueError(
            f"tasks: the only task is {names[0]!r}, and task_weighting={arguments.task_weighting} with "
            f"task_conflicts={arguments.task_conflicts} compares tasks; give rows of a second one, or leave them out"
        )
    numbers: dict[str, list[int]] = {name: [] for name in names}
    for number, name in enumerate(found):
        if name in numbers:
            numbers[name].append(number)
    weights = _weights(arguments, counts, names)
    plan = TaskPlan(tuple(names), tuple(map(tuple, numbers.values())), len(found), weights, arguments)
    for name, count in zip(names, quotas(list(plan.counts.values()), arguments.task_temperature), strict=True):
        if count == 0:
            raise ValueError(
                f"tasks.task_temperature={arguments.task_temperature} draws no row of {name!r} "
                f"({plan.counts[name]:,} of {sum(plan.counts.values()):,}) in an epoch; raise it"
            )
    return plan


def tasks_of(rows: RowDataset | Sequence[Mapping[str, Any]]) -> list[Any]:
    """The task of every row, None where it has none."""
    return rows.tasks() if isinstance(rows, RowDataset) else [row.get(TASK) for row in rows]


def quotas(counts: Sequence[int], temperature: float) -> list[int]:
    """How many rows of each task an epoch has: in proportion to `count ** (1 / temperature)`, as many as there are
    rows in all. At 1 that is every row once."""
    total = sum(counts)
    # In logarithms: a power of a small temperature overflows.
    logs = [math.log(count) / temperature for count in counts]
    parts = [math.exp(value - max(logs)) for value in logs]
    shares = [total * part / sum(parts) for part in parts]
    # A count that is whole but for rounding stays whole.
    found = [math.floor(share + 1e-9) for share in shares]
    by_remainder = sorted(range(len(counts)), key=lambda task: found[task] - shares[task])
    for task in by_remainder[: total - sum(found)]:
        found[task] += 1
    return found


def _check_methods(arguments: TaskArguments) -> None:
    check_name("tasks", "task_weighting", arguments.task_weighting, WEIGHTINGS)
    check_name("tasks", "task_conflicts", arguments.task_conflicts, CONFLICTS)
    for name in ("task_temperature", "task_learning_rate", "task_rate_softness"):
        if not 0 < getattr(arguments, name) < math.inf:
            raise ValueError(f"tasks.{name}={getattr(arguments, name)} must be a positive number")
    if arguments.task_rate_steps < 1:
        raise ValueError(f"tasks.task_rate_steps={arguments.task_rate_steps} must be at least 1")
    if arguments.task_weights is not None and arguments.task_weighting != "fixed":
        raise ValueError(
            f"tasks.task_weights are for task_weighting=fixed; {arguments.task_weighting} finds weights by itself"
        )
    method = arguments.task_conflicts
    if method in RESOLVED and find_spec("torchjd") is None:
        raise ValueError(
            f"tasks.task_conflicts={method}: torchjd is not installed; pip install 'chorus-moe[multitask]'"
        )
    if method == "upgrad" and (missing := [name for name in UPGRAD_PACKAGES if find_spec(name) is None]):
        raise ValueError(
            f"tasks.task_conflicts=upgrad: {' and '.join(missing)} not installed; pip install "
            "'torchjd[quadprog_projector]', which brings quadprog under the GPL. pcgrad and aligned_mtl need neither"
        )


def _check_task(where: str, name: str, counts: Mapping[str, int]) -> None:
    if name not in counts:
        raise ValueError(f"tasks.{where}: no row has the task {name!r}; the tasks are {', '.join(sorted(counts))}")


def _weights(arguments: TaskArguments, counts: Mapping[str, int], names: Sequence[str]) -> tuple[float, ...]:
    given = read_mapping("tasks.task_weights", arguments.task_weights, "{parity: 2}") or {}
    weights = dict.fromkeys(names, 1.0)
    for name, value in given.items():
        _check_task("task_weights", name, counts)
        if name not in weights:
            raise ValueError(f"tasks.task_weights: {name!r} is not among task_names, {list(names)}")
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not 0 < value < math.inf:
            raise ValueError(f"tasks.task_weights: expected a positive number for {name!r}, found {value!r}")
        weights[name] = float(value)
    return tuple(weights.values())
