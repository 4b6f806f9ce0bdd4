"""The command line: rows of another project, a run that is killed, its rest, scores, the merged export."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.journeys.journey import Content, Journey
from tests.journeys.strangers import picture, sharegpt_rows, sound, text

RECIPE = """
model:
  model_name_or_path: model
data:
  train_data: train.jsonl
lora:
  banks: [all]
  attention: true
  dense: true
  connectors: true
  router: train
training:
  output_dir: whole
  max_steps: 60
  per_device_train_batch_size: 8
  learning_rate: 2e-2
  save_steps: 20
  logging_steps: 60
  report_to: none
"""
# Files of kinds that were not in training.
QUESTIONS: list[Content] = [
    [picture("green.webp"), text("which colour?")],
    [picture("yellow.webp"), text("which colour?")],
    [sound("low.flac"), text("low or high?")],
    [sound("high.flac"), text("low or high?")],
]
ANSWERS = ["green", "yellow", "low", "high"]


@pytest.mark.slow
@pytest.mark.timeout(1800)  # some ten processes in a row, each of which imports torch
def test_a_killed_run_ends_as_one_that_was_not(journey: Journey) -> None:
    journey.write_rows("train.jsonl", sharegpt_rows(("png", "jpg"), ("wav", "ogg", "mp3", "m4a")))
    journey.write_rows("test.jsonl", sharegpt_rows(("webp",), ("flac",)))
    journey.write("recipe.yaml", RECIPE)
    parts = ["--text", "parents/text", "--vision", "parents/vision", "--audio", "parents/audio"]
    journey.command("compose", *parts, "--num-experts", 2, "--out", "model")

    journey.command("train", "recipe.yaml")

    again = ["train", "recipe.yaml", "--output_dir", "killed"]
    second = journey.folder / "killed" / "checkpoint-40"
    journey.killed(*again, when=second.exists)
    journey.command(*again, "--resume_from_checkpoint", "auto")
    whole, resumed = (load_file(journey.folder / name / "adapter_model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(resumed.pop(name), tensor) for name, tensor in whole.items()) and not resumed

    scores = json.loads(
        journey.command("evaluate", "--model", "killed", "--data", "test.jsonl", "--max-new-tokens", 8, "--json")
    )
    assert scores["accuracy"] == 1.0 and scores["num_rows"] == 6
    assert journey.ask("model", QUESTIONS, adapter="killed") == ANSWERS
    said = journey.command("generate", "--model", "killed", "--image", "pictures/blue.webp", "--text", "which colour?")
    assert said.strip() == "blue"

    journey.command("export", "killed", "exported")
    assert journey.ask("exported", QUESTIONS, without_package=True) == ANSWERS
