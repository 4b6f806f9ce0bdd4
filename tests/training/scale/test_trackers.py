"""A run outlives its tracker, and no other callback."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import Trainer, TrainerCallback

from chorus_moe.training.scale import trackers
from chorus_moe.training.scale.trackers import outlive_trackers
from tests.training.routing_streams import make_trainer, skewed_model, token_rows


class Broken(TrainerCallback):
    """A tracker whose server is gone after the first log."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(logs)
        if len(self.logs) == 2:
            raise ConnectionError("no route to\nthe tracker")


def test_a_tracker_that_raises_is_switched_off_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trackers, "get_reporting_integration_callbacks", lambda names: [Broken])
    tracker = Broken()
    trainer: Trainer = make_trainer(
        skewed_model(), tmp_path, token_rows(8), callbacks=[tracker], max_steps=4, logging_steps=1
    )
    outlive_trackers(trainer)
    trainer.train()
    assert trainer.state.global_step == 4
    assert len(tracker.logs) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if "switched off" in line]
    assert said == ["Broken is switched off, the run goes on: ConnectionError: no route to the tracker"]


def test_other_callbacks_may_still_stop_a_run() -> None:
    others = [Broken()]
    trainer: Any = SimpleNamespace(
        args=SimpleNamespace(report_to="none"), callback_handler=SimpleNamespace(callbacks=others)
    )
    outlive_trackers(trainer)
    assert trainer.callback_handler.callbacks == others
