"""What cannot train is refused before the first step."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from chorus_moe import ChorusForConditionalGeneration
from chorus_moe.training.readiness import check_recipe, check_scaled, check_weights, prepare_parts
from chorus_moe.training.recipe import read_recipe

QUIET = ["--report_to", "none", "--use_cpu", "true"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--optim", "prodigy"], "finds one rate for all and learning_rate, found 5e-05, is a factor"),
        (
            ["--optim", "prodigy", "--learning_rate", "1", "--layer_decay", "0.9"],
            "leave learning_rates and layer_decay",
        ),
        (["--optim", "schedule_free_adamw"], "set lr_scheduler_type to constant .* found linear and 0"),
        (
            ["--optim", "schedule_free_sgd", "--lr_scheduler_type", "constant", "--warmup_steps", "0.1"],
            "warmup_steps to a whole number; found constant and 0.1",
        ),
        (["--load_in_4bit", "true"], "load_in_4bit needs a lora section"),
        (["--quantize", "int8"], "quantization.quantize needs a lora section"),
        (["--quantize", "int8", "--load_in_4bit", "true", "--use_lora", "true"], "both quantise"),
        (["--use_lora", "true", "--add_bank", '{"name": "law"}'], "add_bank beside a LoRA"),
    ],
)
def test_settings_that_do_not_fit_each_other_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_recipe(read_recipe(None, [*words, *QUIET]))


def test_an_optimizer_whose_package_is_missing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chorus_moe.training.readiness.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="optim=prodigy: prodigyopt is not installed; pip install"):
        check_recipe(read_recipe(None, ["--optim", "prodigy", "--learning_rate", "1", *QUIET]))


def test_weights_that_are_not_finite_are_refused_by_name(model: ChorusForConditionalGeneration) -> None:
    check_weights(model)
    name, weight = list(model.named_parameters())[7]
    with torch.no_grad():
        weight.view(-1)[0] = torch.inf
    with pytest.raises(ValueError, match=f"^the weight {name} holds NaN or infinity$"):
        check_weights(model)
    model.lm_head.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=f"^2 weights hold NaN or infinity, the first is {name}$"):
        check_weights(model)


def test_fp16_does_not_train_float16_weights(model: ChorusForConditionalGeneration) -> None:
    arguments = read_recipe(None, QUIET).training
    # Only on a GPU can a run ask for it.
    asked: Any = SimpleNamespace(fp16=True)
    check_scaled(model, asked)
    check_scaled(model.half(), arguments)
    with pytest.raises(ValueError, match="is in float16: --dtype float32"):
        check_scaled(model, asked)
    # Below an adapter, whose own weights are float32, they may be.
    model.requires_grad_(False)
    check_scaled(model, asked)


def test_only_what_is_named_is_trained_and_something_is(model: ChorusForConditionalGeneration) -> None:
    prepare_parts(model, read_recipe(None, ["--train", "layers:top34%", "--freeze", "routers", *QUIET]))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(".layers.2." in name and ".router." not in name for name in trained)
    with pytest.raises(ValueError, match=r"nothing is trained: train=\['image'\], freeze=\['banks'\]"):
        prepare_parts(model, read_recipe(None, ["--train", "image", "--freeze", "banks", *QUIET]))
    with pytest.raises(ValueError, match="has no name"):
        prepare_parts(model, read_recipe(None, ["--add_bank", "{}", *QUIET]))
