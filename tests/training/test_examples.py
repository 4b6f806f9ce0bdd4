"""The examples run as they stand."""

from pathlib import Path

import pytest

from chorus_moe import ChorusForConditionalGeneration, ChorusProcessor
from chorus_moe.training.loading import load_model
from chorus_moe.training.recipe import read_recipe
from chorus_moe.training.stages import read_stages, run_stages
from tests.training.test_data import folder  # noqa: F401  a fixture

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_the_example_recipe_can_be_read() -> None:
    recipe = read_recipe(EXAMPLES / "recipe.yaml", ["--use_cpu", "true"])
    assert recipe.lora.to_options()["banks"] == ["image", "common"]
    assert recipe.training.learning_rate == 1e-3


def test_the_example_script_trains_and_saves_an_adapter(
    model: ChorusForConditionalGeneration,
    processor: ChorusProcessor,
    folder: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import runpy

    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    program = runpy.run_path(str(EXAMPLES / "train_on_your_data.py"))
    program["main"](str(tmp_path / "base"), str(folder), str(tmp_path / "out"))
    assert (tmp_path / "out" / "adapter_config.json").is_file()
    assert (tmp_path / "out" / "processor_config.json").is_file()
    assert "'num_rows': 2" in capsys.readouterr().out


def test_the_example_with_two_stages_ends_with_an_adapter_on_the_first(
    model: ChorusForConditionalGeneration,
    processor: ChorusProcessor,
    folder: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    out = tmp_path / "out"
    words = ["--model_name_or_path", str(tmp_path / "base"), "--train_data", str(folder), "--output_dir", str(out)]
    run_stages(read_stages(EXAMPLES / "stages.yaml", [*words, "--max_steps", "2", "--use_cpu", "true"]))
    adapted, _ = load_model(out)
    assert adapted.peft_config["default"].base_model_name_or_path == str(out / "stages" / "connectors")
    assert "## Stages" in (out / "README.md").read_text()
