"""A run ends as soon as it has lost an old skill, and goes back to where it had it."""

import json
from pathlib import Path

import pytest
from transformers import AutoModelForMultimodalLM

from chorus_moe.training.guards.skills import skills_of
from chorus_moe.training.recipe import read_recipe
from chorus_moe.training.train import run_training
from tests.training.test_data import write_jsonl
from tests.training.test_train import assert_equal, recipe  # noqa: F401  a fixture

STEPS = ["--eval_strategy", "steps", "--eval_steps", "2", "--save_steps", "2", "--max_steps", "12"]


def test_a_skill_is_what_a_row_shows_and_its_task() -> None:
    rows = [{"images": ["a"]}, {}, {"images": ["a"], "audio": ["b"], "task": "colours"}, {"images": [], "audio": None}]
    assert skills_of(rows) == {"image": [0], "text": [1, 3], "image+audio.colours": [2]}


def forgetful(recipe: Path, folder: Path) -> list[str]:  # noqa: F811
    """Training on one answer forgets the other."""
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "three three three"}]
    write_jsonl(folder / "new" / "train.jsonl", [{"messages": turns}] * 8)
    return ["--train_data", str(folder / "new"), *STEPS, "--learning_rate", "3e-2"]


@pytest.mark.parametrize("action", ["roll_back", "stop"])
def test_a_lost_skill_ends_the_run(
    action: str,
    recipe: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "new").mkdir()
    words = [*forgetful(recipe, tmp_path), "--keep_skills", "0.05", "--on_lost_skill", action]
    words += ["--output_dir", str(tmp_path / "out")]
    metrics = run_training(read_recipe(recipe, words))
    said = capsys.readouterr().err
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    before = state["stateful_callbacks"]["skill_guard"]["before"]
    assert set(before) == {"text", "image+audio"}
    assert "a skill was lost at step" in said
    assert state["global_step"] < 12
    checkpoints = sorted((tmp_path / "out").glob("checkpoint-*"))
    assert checkpoints[-1].name != f"checkpoint-{state['global_step']}"
    if action == "roll_back":
        assert f"the model is that of {checkpoints[-1].name}" in said
        assert_equal(*map(AutoModelForMultimodalLM.from_pretrained, (tmp_path / "out", checkpoints[-1])))
        assert metrics["eval_loss"] > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--keep_skills", "0.1"], "guards.keep_skills needs data.eval_data, and training.eval_strategy"),
        ([*STEPS, "--keep_skills", "-1"], "guards.keep_skills=-1.0 must not be negative"),
        ([*STEPS, "--keep_skills", "1", "--on_lost_skill", "cry"], "guards: unknown on_lost_skill 'cry'"),
        ([*STEPS, "--keep_skills", "1", "--save_steps", "3"], "roll_back needs a checkpoint of each evaluation"),
    ],
)
def test_a_guard_that_cannot_work_is_refused(
    recipe: Path,  # noqa: F811
    words: list[str],
    message: str,
) -> None:
    with pytest.raises(ValueError, match=message):
        run_training(read_recipe(recipe, words))
