"""Trackers that a long run outlives: one that raises is switched off, and the run goes on."""

import sys
from typing import Any

from transformers import Trainer, TrainerCallback
from transformers.integrations import get_reporting_integration_callbacks


class OutlivedTracker:
    """A callback of the Trainer's that may fail: its first error switches it off, with one line."""

    def __init__(self, tracker: TrainerCallback):
        self.tracker, self.is_off = tracker, False

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.tracker, name)
        if not name.startswith("on_"):
            return method

        def guarded(*arguments: Any, **options: Any) -> Any:
            if self.is_off:
                return None
            try:
                return method(*arguments, **options)
            except Exception as error:
                self.is_off = True
                text = f"{type(error).__name__}: {' '.join(str(error).split()):.200}"
                print(f"{type(self.tracker).__name__} is switched off, the run goes on: {text}", file=sys.stderr)
                return None

        return guarded


def outlive_trackers(trainer: Trainer) -> None:
    """Guard the trackers of `report_to`; all other callbacks may still stop a run."""
    kinds = tuple(get_reporting_integration_callbacks(trainer.args.report_to))
    callbacks = trainer.callback_handler.callbacks
    callbacks[:] = [OutlivedTracker(one) if isinstance(one, kinds) else one for one in callbacks]
