"""A card says where its weights come from, and nothing of the machine or of secrets."""

import subprocess
from pathlib import Path

import pytest
import torch
import transformers
import yaml

from chorus_moe.training.recipe import read_recipe
from chorus_moe.training.results import provenance
from chorus_moe.training.results.provenance import commit_here, given_of, name_of
from chorus_moe.training.train import run_training
from tests.training.test_train import recipe  # noqa: F401  a fixture


def test_the_card_of_a_run_tells_recipe_data_seed_and_versions(
    recipe: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    words = ["--seed", "7", "--max_steps", "2", "--logging_steps", "1", "--hub_token", "hf_secret"]
    run_training(read_recipe(recipe, words))
    text = (tmp_path / "out" / "README.md").read_text()
    for line in (
        "| starts from | new weights |",
        f"| data | {tmp_path.name}, train: 8 rows |",
        f"| evaluation data | {tmp_path.name}, test: 2 rows |",
        "| steps | 2 (0.50 epochs) |",
        "| seed | 7 |",
        "| learning_rate | 0.01 |",
        "![Loss and token accuracy by step, in training and evaluation](curves.png)",
    ):
        assert line in text.splitlines(), line
    assert f"torch {torch.__version__.partition('+')[0]}" in text
    assert f"transformers {transformers.__version__}" in text
    said = yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0])
    assert said["training"]["seed"] == 7
    assert said["data"] == {"eval_data": tmp_path.name, "train_data": tmp_path.name}
    # Only what was said, and no default of the two hundred.
    assert said["training"].keys() == {
        "report_to", "use_cpu", "disable_tqdm", "learning_rate", "max_steps", "per_device_train_batch_size",
        "output_dir", "seed", "logging_steps",
    }  # fmt: skip
    assert str(tmp_path.parent) not in text
    assert "hf_secret" not in text
    assert (tmp_path / "out" / "curves.png").is_file()


def test_what_was_said_on_the_command_line_is_told_in_any_spelling() -> None:
    words = ["--learning-rate=0.5", "--no_average_tokens_across_devices", "--optim", "adamw_torch"]
    words += [
        "--banks",
        "image",
        "audio",
        "--use_cpu",
        "true",
        "--output_dir",
        "nowhere",
        "--config",
        '{"text_config": {}}',
    ]
    found = given_of(read_recipe(None, words))
    assert found == {
        "model": {"config": '{"text_config": {}}'},
        "lora": {"banks": ["image", "audio"]},
        "training": {
            "average_tokens_across_devices": False,
            "learning_rate": 0.5,
            "optim": "adamw_torch",
            "output_dir": "nowhere",
            "use_cpu": True,
        },
    }


def test_a_path_is_told_by_its_last_name(tmp_path: Path) -> None:
    assert name_of(str(tmp_path)) == tmp_path.name
    assert name_of("/not/there/model") == "model"
    assert name_of("owner/model") == "owner/model"


def test_the_commit_is_that_of_the_folder_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert commit_here() is None
    author = ["-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "recipe.yaml").write_text("a: 1\n")
    for words in (["init", "-q"], ["add", "."], [*author, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", *words], check=True)
    commit = commit_here()
    assert commit is not None
    assert len(commit) == 40
    (tmp_path / "recipe.yaml").write_text("a: 2\n")
    assert commit_here() == f"{commit} with changes"


def test_without_git_there_is_no_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: str) -> str:
        raise FileNotFoundError("git")

    monkeypatch.setattr(provenance, "_git", missing)
    assert commit_here() is None
