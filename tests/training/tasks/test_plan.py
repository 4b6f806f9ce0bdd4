"""What a run with tasks needs is checked before the first step, by name and number."""

import importlib.util
from collections import Counter
from typing import Any

import numpy as np
import pytest

from chorus_moe.training.data import RowDataset, RowReader
from chorus_moe.training.tasks import plan as planning
from chorus_moe.training.tasks.arguments import TaskArguments
from chorus_moe.training.tasks.plan import plan_tasks, quotas

ROWS = [{"task": name} for name in ("parity", "digit", "parity", "large")]


def test_a_plan_has_the_rows_of_each_task() -> None:
    plan = plan_tasks(TaskArguments(task_weights='{"large": 3}'), ROWS)
    assert plan.names == ("digit", "large", "parity")
    assert plan.rows == ((1,), (3,), (0, 2))
    assert plan.weights == (1.0, 3.0, 1.0)
    assert str(plan) == "tasks: digit (1 rows), large (1 rows), parity (2 rows)"


def test_named_tasks_are_learned_alone_and_it_is_said() -> None:
    plan = plan_tasks(TaskArguments(task_names=["parity"]), ROWS)
    assert (plan.names, plan.rows, plan.num_rows) == (("parity",), ((0, 2),), 4)
    assert str(plan).endswith("; 2 rows of other tasks are left out")


def test_the_column_may_have_another_name_and_media_are_not_read() -> None:
    import datasets

    table = datasets.Dataset.from_dict({"kind": ["a", "b"], "messages": [None, None]})
    # Reading a row would fail: it has no turns.
    assert RowDataset(table, None, {"task": "kind"}).tasks() == ["a", "b"]
    assert RowDataset(table, None).tasks() == [None, None]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task_names": ["parity", "colour"]}, "task_names: no row has the task 'colour'; the tasks are digit, large"),
        ({"task_names": []}, "task_names is empty"),
        ({"task_weights": '{"colour": 1}'}, "task_weights: no row has the task 'colour'"),
        ({"task_weights": '{"parity": NaN}'}, "task_weights: expected a positive number for 'parity', found nan"),
        ({"task_weights": '{"parity": Infinity}'}, "expected a positive number for 'parity', found inf"),
        ({"task_weights": '{"parity": 0}'}, "expected a positive number for 'parity', found 0"),
        ({"task_weights": '{"parity": true}'}, "expected a positive number for 'parity', found True"),
        ({"task_weights": '{"parity": "much"}'}, "expected a positive number for 'parity', found 'much'"),
        ({"task_weights": "parity"}, "tasks.task_weights: expected a mapping"),
        ({"task_weights": '{"digit": 2}', "task_names": ["parity"]}, "'digit' is not among task_names, \\['parity'\\]"),
        ({"task_weights": '{"digit": 2}', "task_weighting": "rate"}, "task_weights are for task_weighting=fixed; rate"),
        ({"task_weighting": "certainty"}, "tasks: unknown task_weighting 'certainty'; did you mean 'uncertainty'"),
        ({"task_conflicts": "pcgard"}, "tasks: unknown task_conflicts 'pcgard'; did you mean 'pcgrad'"),
        ({"task_temperature": 0.0}, "tasks.task_temperature=0.0 must be a positive number"),
        ({"task_temperature": float("nan")}, "tasks.task_temperature=nan must be"),
        ({"task_rate_softness": float("inf")}, "tasks.task_rate_softness=inf must be"),
        ({"task_rate_steps": 0}, "tasks.task_rate_steps=0 must be at least 1"),
        ({"task_temperature": 0.05}, "task_temperature=0.05 draws no row of 'digit' \\(1 of 4\\)"),
        ({"task_names": ["parity"], "task_conflicts": "pcgrad"}, "the only task is 'parity'"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_tasks(TaskArguments(**options), ROWS)


@pytest.mark.parametrize("name", [None, "", " ", 3])
def test_a_row_without_a_task_is_named(name: object) -> None:
    with pytest.raises(ValueError, match=f"tasks: row 1 has no task .key 'task': {name!r}"):
        plan_tasks(TaskArguments(), [{"task": "a"}, {"task": name}])


def test_rows_that_stream_are_refused_before_they_are_read() -> None:
    with pytest.raises(ValueError, match="tasks: rows that stream have no tasks before they are read"):
        plan_tasks(TaskArguments(), RowReader(None))


@pytest.mark.parametrize("method", ["pcgrad", "aligned_mtl", "upgrad"])
def test_a_missing_library_is_named(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(planning, "find_spec", lambda name: None if name == "torchjd" else found(name))
    with pytest.raises(ValueError, match=f"{method}: torchjd is not installed; pip install 'chorus-moe.multitask.'"):
        plan_tasks(TaskArguments(task_conflicts=method), ROWS)


def test_upgrad_says_that_its_solver_is_under_the_gpl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "find_spec", lambda name: None if name == "quadprog" else object())
    with pytest.raises(ValueError, match="quadprog not installed; .* under the GPL. pcgrad and"):
        plan_tasks(TaskArguments(task_conflicts="upgrad"), ROWS)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 7.3, 1e6])
def test_quotas_follow_the_power_of_the_counts(temperature: float) -> None:
    counts = np.array([900, 90, 10])
    share = counts ** (1 / temperature)
    expected = 1000 * share / share.sum()
    found = quotas(counts.tolist(), temperature)
    assert sum(found) == 1000
    assert np.abs(found - expected).max() < 1
    if temperature == 1:
        assert found == counts.tolist()


def test_a_power_that_overflows_is_a_quota_all_the_same() -> None:
    assert quotas([10_000, 1], 1e-4) == [10_001, 0]


def test_the_tasks_of_a_plan_are_those_of_the_rows() -> None:
    names = np.random.default_rng(0).choice(["a", "b", "c"], 50).tolist()
    plan = plan_tasks(TaskArguments(), [{"task": name} for name in names])
    assert plan.counts == dict(sorted(Counter(names).items()))
    assert all(names[row] == name for name, rows in zip(plan.names, plan.rows, strict=True) for row in rows)
