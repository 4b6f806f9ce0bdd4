"""The examples run as they stand."""

from pathlib import Path

import pytest

from chorus_moe import ChorusForConditionalGeneration, ChorusProcessor
from chorus_moe.training.recipe import read_recipe
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
