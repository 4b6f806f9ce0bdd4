"""Whether checkpoints beside a model are whole, as the doctor says it."""

from dataclasses import replace
from pathlib import Path

import pytest

from chorus_moe.training.doctor import whole as module
from chorus_moe.training.doctor.inputs import Patient
from chorus_moe.training.doctor.whole import whole_checkpoints


@pytest.fixture(autouse=True)
def faults(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Name of a checkpoint -> what is wrong with it."""
    found: dict[str, str] = {}
    monkeypatch.setattr(module, "fault_of", lambda path: found.get(path.name))
    return found


def at(patient: Patient, folder: Path | None) -> Patient:
    return replace(patient, source=None if folder is None else str(folder))


def test_a_model_without_checkpoints_is_skipped(patient: Patient, tmp_path: Path) -> None:
    found = whole_checkpoints(at(patient, None))
    assert (found.verdict, found.explanation) == ("skipped", "the model was built and not loaded")
    found = whole_checkpoints(at(patient, tmp_path))
    assert (found.verdict, found.explanation) == ("skipped", "no checkpoints lie in the folder")


def test_all_checkpoints_of_a_folder_are_looked_at(patient: Patient, tmp_path: Path, faults: dict[str, str]) -> None:
    for step in (2, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
    found = whole_checkpoints(at(patient, tmp_path))
    assert (found.verdict, found.explanation, found.cure) == ("ok", "2 checkpoints", "")
    faults["checkpoint-10"] = "has no optimizer.pt"
    found = whole_checkpoints(at(patient, tmp_path))
    assert (found.verdict, found.measured, found.explanation) == ("failed", 1, "checkpoint-10 has no optimizer.pt")
    assert "--resume_from_checkpoint auto" in found.cure


def test_a_checkpoint_itself_is_looked_at_alone(patient: Patient, tmp_path: Path, faults: dict[str, str]) -> None:
    for step in (2, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
    faults["checkpoint-2"] = "is broken"
    assert whole_checkpoints(at(patient, tmp_path / "checkpoint-10")).explanation == "1 checkpoints"
    assert whole_checkpoints(at(patient, tmp_path / "checkpoint-2")).verdict == "failed"


def test_what_a_run_left_half_written_is_a_warning(patient: Patient, tmp_path: Path, faults: dict[str, str]) -> None:
    (tmp_path / "_incomplete").mkdir()
    found = whole_checkpoints(at(patient, tmp_path))
    assert found.verdict == "warning" and found.explanation.startswith("0 checkpoints. But _incomplete holds")
    assert found.cure.startswith("Remove it")
    (tmp_path / "checkpoint-3").mkdir()
    faults["checkpoint-3"] = "is broken"
    assert whole_checkpoints(at(patient, tmp_path)).verdict == "failed"
