"""Steps that would break a run: skipped, counted, and their batch kept.

Unusual here: all that the guard remembers lies in the Trainer's state, so a checkpoint holds it and a resumed run
decides as an uninterrupted one.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import save_file

# Norms that the typical one is the median of, and how many must be there before one can be called too large.
NUM_NORMS, MIN_NORMS = 50, 10
# Skipped steps are counted among this many.
WINDOW = 100
FOLDER, REPORT = "guards", "report.json"


class TrainingBroke(ValueError):
    """Too many steps had to be skipped."""


class StepGuard:
    """Decides by the norm of the whole gradient, which all ranks see alike, whether a step is taken.

    Args:
        norm_ratio: skip steps above this multiple of the median norm of the last 50 that were taken; None skips only
            steps whose gradient is not finite.
        max_skipped_steps: among the last 100 steps; one more ends the run.

    Raises:
        ValueError: a ratio that is not above 1, or a negative number of steps.
    """

    def __init__(self, norm_ratio: float | None = None, max_skipped_steps: int = 10):
        if norm_ratio is not None and not norm_ratio > 1:
            raise ValueError(f"guards.norm_ratio={norm_ratio} must be above 1")
        if max_skipped_steps < 0:
            raise ValueError(f"guards.max_skipped_steps={max_skipped_steps} must not be negative")
        self.norm_ratio, self.max_skipped_steps = norm_ratio, max_skipped_steps

    def admits(self, norm: float, step: int, memory: dict[str, Any]) -> bool:
        """Whether the step is taken.

        Args:
            norm: of the gradient before clipping.
            step: its number, from 1.
            memory: what the guard knows, empty at first; changed here.
        """
        norms = memory.setdefault("norms", [])
        skipped = memory.setdefault("skipped", [])
        typical = median(norms) if len(norms) >= MIN_NORMS else None
        is_large = self.norm_ratio is not None and typical is not None and norm > self.norm_ratio * typical
        if math.isfinite(norm) and not is_large:
            norms.append(norm)
            del norms[:-NUM_NORMS]
            return True
        # As text: JSON has no NaN.
        skipped.append({"step": step, "norm": str(norm), "typical_norm": typical})
        return False

    def check(self, step: int, memory: Mapping[str, Any], folder: Path) -> None:
        """Write the report of what was skipped.

        Raises:
            TrainingBroke: more steps were skipped than the run may lose.
        """
        skipped = memory["skipped"]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / REPORT).write_text(json.dumps(skipped, indent=2) + "\n", encoding="utf-8")
        recent = [entry for entry in skipped if entry["step"] > step - WINDOW]
        if len(recent) > self.max_skipped_steps:
            last = skipped[-1]
            raise TrainingBroke(
                f"{len(recent)} of the last {min(step, WINDOW)} steps were skipped, guards.max_skipped_steps is "
                f"{self.max_skipped_steps}; step {step} had a gradient of norm {last['norm']}, typical is "
                f"{last['typical_norm']}. {folder} holds the report and the batches; lower the learning rate, or look "
                "for the rows of these batches"
            )


def keep_batch(path: Path, batches: Sequence[Mapping[str, Any]], entry: Mapping[str, Any]) -> None:
    """Save the batches of a step, `N.name` for the tensors of the N-th, with the norm in the metadata."""
    tensors = {
        f"{number}.{name}": value.detach().cpu().contiguous()
        for number, batch in enumerate(batches)
        for name, value in batch.items()
        if isinstance(value, torch.Tensor)
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata={name: str(value) for name, value in entry.items()})
