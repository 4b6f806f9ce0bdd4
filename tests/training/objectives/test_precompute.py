"""`precompute-teacher`, then training from what it wrote, as recipes and on the command line."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from chorus_moe.training.cli import app
from chorus_moe.training.objectives.precompute import precompute_teachers
from chorus_moe.training.objectives.teacher_files import MANIFEST
from chorus_moe.training.stages import Stage, check_stages, read_stages, run_stages
from tests.parents import plain_tokenizer
from tests.training.objectives.test_teachers import save_chorus, save_llama
from tests.training.test_data import write_splits


@pytest.fixture
def recipe(source: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: Any) -> Path:
    """A student, a data set and a recipe for both, in the folder of work."""
    monkeypatch.chdir(tmp_path)
    save_chorus(tmp_path / "student", tokenizer, seed=0)
    write_splits(tmp_path)
    sections = {
        "model": {"model_name_or_path": "student"},
        "data": {"train_data": ".", "eval_data": "."},
        "distillation": {"teachers": [source], "teacher_logits": "answers", "teacher_top_k": 10**6},
        "training": {"output_dir": "out", "max_steps": 2, "per_device_train_batch_size": 2, "report_to": "none",
                     "use_cpu": True, "disable_tqdm": True, "learning_rate": 1e-2, "eval_strategy": "steps",
                     "eval_steps": 1, "logging_steps": 1},
    }  # fmt: skip
    return write(tmp_path, sections)


def write(folder: Path, sections: dict[str, Any]) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(sections), encoding="utf-8")
    return path


def run(command: str, recipe: Path, *words: str) -> None:
    assert not app([command, str(recipe), *words], standalone_mode=False)


def test_training_from_files_of_all_tokens_is_training_with_the_teacher(
    recipe: Path, source: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run("precompute-teacher", recipe)
    said = capsys.readouterr()
    # Four rows stand twice in the data, and lie here once.
    assert "answers: 2 of 8 rows" in said.err
    assert json.loads(said.out)["answers"] == json.loads(Path("answers", MANIFEST).read_text())
    run("train", recipe, "--output_dir", "from-files")
    live = yaml.safe_load(recipe.read_text())
    del live["distillation"]["teacher_logits"]
    run_stages(read_stages(write(recipe.parent, live)))
    weights, others = (load_file(f"{name}/model.safetensors") for name in ("from-files", "out"))
    # The teacher read batches of other shapes, and Adam divides small gradients by themselves.
    worst = max((weights[name] - others[name]).abs().max().item() for name in weights)
    assert worst < 1e-4
    logs = json.loads(Path("from-files/trainer_state.json").read_text())["log_history"]
    assert any(entry.get("teacher_tokens", 0) > 0 for entry in logs)
    assert any("eval_loss" in entry for entry in logs)


def test_changed_data_are_refused_before_the_first_step(recipe: Path) -> None:
    run("precompute-teacher", recipe)
    path = Path("train.jsonl")
    path.write_text(path.read_text().replace("hello", "hallo", 1))
    with pytest.raises(ValueError, match="row 1 is none of the 2 that 'answers' was written for"):
        run("train", recipe)
    assert not list(Path("out").glob("checkpoint-*"))
    with pytest.raises(ValueError, match=r"another processor or max_length than this run's \(50\)"):
        run("train", recipe, "--max_length", "50")
    with pytest.raises(ValueError, match="'answers' holds something already"):
        run("precompute-teacher", recipe)


def test_a_folder_that_two_stages_name_is_written_once(recipe: Path) -> None:
    stages = in_stages(recipe, {})
    assert list(precompute_teachers(stages, progress=False)) == ["answers"]
    check_stages(stages)


def test_a_later_stages_teacher_is_checked_before_the_first_stage(recipe: Path, tmp_path: Path) -> None:
    other = plain_tokenizer()
    save_llama(tmp_path / "other", other, len(other))
    del (sections := yaml.safe_load(recipe.read_text()))["distillation"]
    write(tmp_path, sections)
    for distillation, said in (
        ({"teachers": ["other"]}, "stage 'two': teacher 'other' has another tokenizer: its token 0 is '<s>'"),
        ({"teachers": ["other/none"]}, "stage 'two': no model at 'other/none'"),
        ({"teacher_logits": "answers"}, "stage 'two': distillation.teacher_logits: 'answers' has no teacher.json"),
        ({"teachers": ["student"], "distilled_layers": {"a": 1}}, "stage 'two': distilled_layers: expected numbers"),
        ({"teachers": ["student"], "distillation_loss": "kl"}, "stage 'two': distillation_loss='kl'; choose from"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=said):
            run_stages(in_stages(recipe, distillation))
    assert not Path("out").exists()


def in_stages(recipe: Path, distillation: dict[str, Any]) -> list[Stage]:
    """The recipe in two stages, the second with a teacher of its own."""
    sections = yaml.safe_load(recipe.read_text())
    second = {"name": "two", "train": ["banks.text"], "distillation": distillation}
    return read_stages(write(recipe.parent, {**sections, "stages": [{"name": "one", "train": ["connectors"]}, second]}))


def test_what_is_missing_is_named(recipe: Path) -> None:
    sections = yaml.safe_load(recipe.read_text())
    teachers = sections["distillation"].pop("teachers")
    with pytest.raises(ValueError, match="distillation.teachers is missing"):
        precompute_teachers(read_stages(write(recipe.parent, sections)))
    sections["distillation"] = {"teachers": teachers}
    with pytest.raises(ValueError, match="distillation.teacher_logits is missing"):
        precompute_teachers(read_stages(write(recipe.parent, sections)))
