"""Parents, model and base are names on a Hub: compose, push, train an adapter on what was pushed, export, ask."""

import pytest
from huggingface_hub import HfApi, ModelCard

from tests.fake_hub import FakeHub
from tests.journeys.journey import Content, Journey
from tests.journeys.strangers import picture, sharegpt_rows, sound, text

RECIPE = """
model:
  model_name_or_path: tester/composed
data:
  train_data: train.jsonl
lora:
  banks: [all]
  connectors: true
training:
  output_dir: adapter
  max_steps: 2
  per_device_train_batch_size: 2
  report_to: none
"""
QUESTIONS: list[Content] = ["what is it?", [picture("red.png"), text("which colour?")], [sound("low.wav"), text("?")]]
PARENTS = {f"--{part}": f"tester/{part}" for part in ("text", "vision", "audio")}


@pytest.mark.slow
@pytest.mark.timeout(1800)  # some ten processes in a row, each of which imports torch
def test_names_on_the_hub(journey: Journey, fake_hub: FakeHub) -> None:
    commits = {}
    for name in PARENTS.values():
        HfApi().create_repo(name)
        HfApi().upload_folder(repo_id=name, folder_path=journey.folder / "parents" / name.split("/")[1])
        commits[name] = fake_hub.repositories[name].head

    parts = [word for pair in PARENTS.items() for word in pair]
    journey.command("compose", *parts, "--num-experts", 2, "--out", "model")
    card = ModelCard.load(journey.folder / "model" / "README.md")
    assert card.data.base_model == list(PARENTS.values())
    assert all(f"| {name} | {commit} |" in card.text for name, commit in commits.items())

    journey.script("push.py", model="model", repository="tester/composed")
    pushed = ModelCard(fake_hub.files("tester/composed")["README.md"].decode())
    assert pushed.data.base_model == list(PARENTS.values()) and "tester/vision" in pushed.text

    journey.write_rows("train.jsonl", sharegpt_rows(("png",), ("wav",)))
    journey.write("recipe.yaml", RECIPE)
    journey.command("train", "recipe.yaml")
    assert ModelCard.load(journey.folder / "adapter" / "README.md").data.base_model == "tester/composed"

    journey.command("export", "adapter", "exported")
    assert ModelCard.load(journey.folder / "exported" / "README.md").data.base_model == "tester/composed"
    assert journey.ask("exported", QUESTIONS) == journey.ask("tester/composed", QUESTIONS, adapter="adapter")
