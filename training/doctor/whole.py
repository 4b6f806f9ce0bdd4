"""Whether a run can continue from the checkpoints that lie with a model."""

from pathlib import Path

from chorus_moe.training.checkpoints import fault_of, numbered_checkpoints, step_of
from chorus_moe.training.doctor.finding import Finding, counted, skipped
from chorus_moe.training.doctor.inputs import Patient
from chorus_moe.training.saving import INCOMPLETE


def whole_checkpoints(patient: Patient) -> Finding:
    """Every checkpoint in the folder, or the folder itself if it is one, has all its files as they were written."""
    if patient.source is None:
        return skipped("the model was built and not loaded")
    folder = Path(patient.source)
    checkpoints = [folder] if step_of(folder) is not None else numbered_checkpoints(folder)
    left = folder / INCOMPLETE
    if not checkpoints and not left.is_dir():
        return skipped("no checkpoints lie in the folder")
    found = [(path.name, fault_of(path)) for path in checkpoints]
    warnings = {
        f"{INCOMPLETE} holds what a run was writing when it ended": "Remove it; the next save of a run does so as well"
    }
    return counted(
        [f"{name} {fault}" for name, fault in found if fault is not None],
        f"{len(checkpoints)} checkpoints",
        "Continue with `--resume_from_checkpoint auto`, which takes the newest whole one, and remove the others",
        warnings if left.is_dir() else {},
    )
