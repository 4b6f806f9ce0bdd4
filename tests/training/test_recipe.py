"""Recipes: sections, overrides, and names nobody knows."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from chorus_moe.training.recipe import read_layers, read_recipe, to_words


def write(path: Path, sections: Any) -> Path:
    path.write_text(yaml.safe_dump(sections), encoding="utf-8")
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    sections = {
        "model": {"config": {"text_config": {"hidden_size": 64}}},
        "data": {"train_data": "data", "max_length": 128},
        "lora": {"banks": ["image", "common"], "attention": [0, 1], "cross_modal": True, "lora_rank": 4},
        "training": {"output_dir": str(tmp_path / "out"), "report_to": "none", "use_cpu": True, "max_steps": 3},
    }
    return write(tmp_path / "recipe.yaml", sections)


def test_sections_become_typed_arguments(path: Path) -> None:
    recipe = read_recipe(path)
    assert recipe.model.config == '{"text_config": {"hidden_size": 64}}'
    assert recipe.data.max_length == 128
    options = recipe.lora.to_options()
    assert recipe.lora.use_lora
    assert (options["banks"], options["attention"], options["cross_modal"]) == (["image", "common"], [0, 1], True)
    assert (options["dense"], options["towers"], options["r"]) == (False, False, 4)
    assert recipe.training.max_steps == 3


def test_the_trainer_gets_the_settings_this_model_needs(path: Path) -> None:
    training = read_recipe(path).training
    assert training.remove_unused_columns is False
    assert training.label_names == ["labels"]
    assert training.prediction_loss_only is True


def test_overrides_win(path: Path) -> None:
    words = ["--max-steps=7", "--learning_rate", "1e-3", "--banks", "text", "--prediction_loss_only", "false"]
    recipe = read_recipe(path, words)
    assert (recipe.training.max_steps, recipe.training.learning_rate) == (7, 1e-3)
    assert recipe.lora.banks == ["text"]
    assert recipe.training.prediction_loss_only is False


def test_skip_gates_are_trained_where_a_recipe_asks_for_them(path: Path) -> None:
    asked = [read_recipe(path, words).lora.to_options()["skip_gates"] for words in ([], ["--skip_gates"])]
    assert asked == [False, True]


def test_numbers_that_yaml_reads_as_text_are_numbers(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("training: {learning_rate: 1e-4, report_to: none, use_cpu: true}")
    assert read_recipe(tmp_path / "recipe.yaml").training.learning_rate == 1e-4


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"modle": {}}, "unknown section 'modle'; did you mean 'model'?"),
        ({"training": {"learning_rte": 1}}, "section 'training' has no 'learning_rte'; did you mean 'learning_rate'?"),
        ({"model": {"learning_rate": 1}}, "section 'model' has no 'learning_rate'; it belongs to 'training'"),
        ({"data": 3}, "section 'data' must be a mapping, found 3"),
        (
            [1],
            "expected the sections model, data, lora, routing, parts, guards, objectives, distillation, tasks,",
        ),
    ],
)
def test_unknown_names_are_errors_with_the_nearest(tmp_path: Path, sections: Any, message: str) -> None:
    with pytest.raises(ValueError, match="recipe.yaml") as error:
        read_recipe(write(tmp_path / "recipe.yaml", sections))
    assert message in str(error.value)


def test_unknown_overrides_are_errors_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="unknown option --max_setps; did you mean '--max_steps'"):
        read_recipe(None, ["--max_setps", "3"])
    with pytest.raises(ValueError, match="expected an option such as --learning_rate, found '3'"):
        read_recipe(None, ["3"])


def test_layers_are_true_false_or_numbers() -> None:
    assert [read_layers("dense", words) for words in (None, ["True"], ["false"], ["0", "2"])] == [
        False,
        True,
        False,
        [0, 2],
    ]
    with pytest.raises(ValueError, match="dense: expected true, false or layer numbers, found 'all'"):
        read_layers("dense", ["all"])


def test_values_become_words() -> None:
    values = {"a": True, "b": None, "c": [1, 2], "d": {"e": 1}, "f": []}
    assert to_words(values) == ["--a", "true", "--c", "1", "2", "--d", '{"e": 1}']


def test_prodigy_is_an_optimizer_by_its_name(tmp_path: Path) -> None:
    words = ["--optim", "prodigy", "--learning_rate", "1", "--report_to", "none", "--use_cpu", "true"]
    assert read_recipe(None, words).training.optim == "prodigy"
    with pytest.raises(ValueError, match="prodgy"):
        read_recipe(None, ["--optim", "prodgy"])


def test_rates_are_positive_numbers() -> None:
    assert read_recipe(None, ["--learning_rates", '{"towers": "1e-5"}']).parts.rates() == {"towers": 1e-5}
    for text, message in (("[1]", "expected a mapping"), ('{"a": 0}', "positive number for 'a', found 0")):
        with pytest.raises(ValueError, match=message):
            read_recipe(None, ["--learning_rates", text]).parts.rates()
