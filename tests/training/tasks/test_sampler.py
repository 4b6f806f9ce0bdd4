"""Which rows come is a matter of seed and epoch, and every row of a task comes once before one comes twice."""

from collections import Counter
from itertools import islice

import pytest

from chorus_moe.training.tasks.arguments import TaskArguments
from chorus_moe.training.tasks.plan import TaskPlan, plan_tasks
from chorus_moe.training.tasks.sampler import TaskSampler

NAMES = ["big"] * 40 + ["middle"] * 8 + ["small"] * 2


def plan_of(temperature: float, **options: list[str]) -> TaskPlan:
    arguments = TaskArguments(task_temperature=temperature, **options)
    return plan_tasks(arguments, [{"task": name} for name in NAMES])


def epochs(plan: TaskPlan, count: int, seed: int = 0) -> list[list[int]]:
    sampler, found = TaskSampler(plan, seed), []
    for epoch in range(count):
        sampler.set_epoch(epoch)
        found.append(list(sampler))
    return found


def test_without_a_temperature_an_epoch_has_every_row_once() -> None:
    first, second = epochs(plan_of(1.0), 2)
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second


def test_a_temperature_evens_the_mix_in_every_epoch() -> None:
    for rows in epochs(plan_of(1e6), 5):
        assert Counter(NAMES[row] for row in rows) == {"big": 17, "middle": 17, "small": 16}


@pytest.mark.parametrize("temperature", [0.7, 2.0, 1e6])
def test_a_task_is_dealt_to_the_end_before_any_row_comes_again(temperature: float) -> None:
    found = [row for rows in epochs(plan_of(temperature), 9) for row in rows]
    for name in set(NAMES):
        times = Counter(row for row in found if NAMES[row] == name)
        counts = [times[row] for row, task in enumerate(NAMES) if task == name]
        # No row is two deals ahead of another.
        assert max(counts) - min(counts) <= 1


def test_an_epoch_follows_from_seed_and_number_alone() -> None:
    plan, last = plan_of(3.0), TaskSampler(plan_of(3.0), seed=0)
    last.set_epoch(7)
    assert list(last) == list(last) == epochs(plan, 8)[7]
    assert epochs(plan, 1, seed=1) != epochs(plan, 1, seed=0)


def test_only_named_tasks_come() -> None:
    plan = plan_of(1.0, task_names=["small", "middle"])
    assert len(TaskSampler(plan, 0)) == 10
    assert sorted(islice(TaskSampler(plan, 0), 10)) == list(range(40, 50))
