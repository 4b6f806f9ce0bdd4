"""The section `tasks`: what is so where a recipe says nothing."""

from dataclasses import asdict

from chorus_moe.training.tasks.arguments import TaskArguments


def test_defaults_leave_the_rows_as_they_are() -> None:
    assert asdict(TaskArguments()) == {
        "use_tasks": False,
        "task_names": None,
        "task_temperature": 1.0,
        "task_weighting": "fixed",
        "task_weights": None,
        "task_learning_rate": 1e-2,
        "task_rate_steps": 100,
        "task_rate_softness": 2.0,
        "task_conflicts": "none",
    }
