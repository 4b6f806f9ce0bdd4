"""A run from cached features takes the same steps as one from media, or is refused before the first."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from chorus_moe import ChorusForConditionalGeneration
from chorus_moe.training.data import load_rows
from chorus_moe.training.objectives.arguments import ObjectiveArguments
from chorus_moe.training.objectives.served import check_served
from chorus_moe.training.recipe import read_recipe
from chorus_moe.training.stages import read_stages, run_stages
from chorus_moe.training.train import run_training

WORDS = ["--use_cpu", "true", "--disable_tqdm", "true", "--report_to", "none", "--per_device_train_batch_size", "3"]
WORDS += ["--max_steps", "6", "--logging_steps", "1", "--learning_rate", "1e-2", "--gradient_accumulation_steps", "2"]


def losses_of(base: Path, data: Path, out: Path, *words: str) -> list[float]:
    """The losses of all steps and of the evaluation at the end."""
    given = ["--model_name_or_path", base, "--train_data", data, "--eval_data", data, "--output_dir", out]
    metrics = run_training(read_recipe(None, [*map(str, given), *WORDS, *words]))
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return [*(entry["loss"] for entry in history if "loss" in entry), metrics["eval_loss"]]


PARTS = [("--freeze", "towers"), ("--use_lora", "true", "--banks", "image", "common", "--connectors", "true")]


@pytest.mark.parametrize(("parts", "evaluates_media"), zip(PARTS, (False, True), strict=True), ids=["whole", "lora"])
def test_the_losses_are_those_of_the_media(
    parts: tuple[str, ...], evaluates_media: bool, base: Path, data: Path, cache: Path
) -> None:
    expected = losses_of(base, data, data / "out", *parts)
    # Training rows may be cached and those of the evaluation not.
    found = losses_of(base, cache, cache / "out", *parts, "--eval_data", str(data if evaluates_media else cache))
    assert len(found) == 7
    # Six steps on float32 sums in another order.
    assert found == pytest.approx(expected, rel=1e-6)
    assert found[0] == pytest.approx(expected[0], abs=1e-6)
    # The connectors and experts did learn.
    assert found[-2] < found[0] - 0.1


def recipe_of(base: Path, cache: Path) -> list[str]:
    given = ["--model_name_or_path", base, "--train_data", cache, "--output_dir", cache / "out"]
    return [*map(str, given), *WORDS]


def test_a_run_that_trains_a_tower_is_refused(base: Path, cache: Path) -> None:
    words = recipe_of(base, cache)
    with pytest.raises(ValueError, match="data.train_data holds cached features of the audio_tower, which this run"):
        run_training(read_recipe(None, words))
    with pytest.raises(ValueError, match="data.train_data holds cached features of the vision_tower"):
        run_training(read_recipe(None, [*words, "--use_lora", "true", "--towers", "vision"]))
    assert not (cache / "out" / "config.json").exists()


def test_another_tower_or_processor_is_named_with_both_hashes(
    base: Path, cache: Path, model: ChorusForConditionalGeneration
) -> None:
    facts = json.loads((cache / "features.json").read_text())
    words = [*recipe_of(base, cache), "--freeze", "towers"]
    with torch.no_grad():
        next(model.model.vision_tower.parameters()).view(-1)[0] += 1
    model.save_pretrained(base)
    old = facts["towers"]["image"][:12]
    with pytest.raises(
        ValueError, match=rf"features of the vision_tower {old} of 'base', the vision_tower here is \w+"
    ):
        run_training(read_recipe(None, words))
    facts["processor"] = "0" * 64
    (cache / "features.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match=r"features of the processor 000000000000 of 'base', the processor here is \w"):
        run_training(read_recipe(None, words))


def test_a_new_model_has_made_no_features(base: Path, cache: Path) -> None:
    words = [word if word != str(base) else str(base / "config.json") for word in recipe_of(base, cache)]
    words[0] = "--config"
    with pytest.raises(ValueError, match="holds cached features, which new towers have not made"):
        run_training(read_recipe(None, words))


def test_stages_are_checked_before_the_first_one_starts(base: Path, data: Path, cache: Path) -> None:
    def run(first: list[str], **second: Any) -> None:
        stages = [{"name": "one", "train": first}, {"name": "two", **second}]
        sections = {"data": {"train_data": str(data)}, "stages": stages}
        (data / "recipe.yaml").write_text(yaml.safe_dump(sections))
        words = [*WORDS, "--model_name_or_path", str(base), "--output_dir", str(data / "out")]
        run_stages(read_stages(data / "recipe.yaml", words))

    with pytest.raises(ValueError, match="stage 'two': .*vision_tower, which this run trains"):
        run(["connectors"], train=["vision_tower"], data={"train_data": str(cache)})
    with pytest.raises(ValueError, match="stage 'two': .*audio_tower, which an earlier stage trains"):
        run(["towers"], train=["connectors"], data={"train_data": str(cache)})
    assert not (data / "out").exists()


def test_masked_features_are_not_predicted_from_a_cache(cache: Path) -> None:
    with pytest.raises(
        ValueError, match="masked_image_weight=1.0: the 6 rows are cached features; take rows with media"
    ):
        check_served(ObjectiveArguments(masked_image_weight=1.0), load_rows(cache), "the 6 rows")
