"""A recipe with privacy, from end to end: what it spends stands in the card, the metrics and its folder."""

import json
from pathlib import Path

import pytest
import yaml
from transformers import AutoProcessor

from chorus_moe.training.loading import load_model
from chorus_moe.training.recipe import read_recipe
from chorus_moe.training.train import run_training
from tests.training.privacy.conftest import REASON
from tests.training.test_train import recipe  # noqa: F401  a fixture


def test_a_recipe_trains_an_adapter_privately_and_says_so(
    recipe: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    pytest.importorskip("opacus", reason=REASON)
    run_training(read_recipe(recipe, ["--max_steps", "1", "--save_strategy", "no"]))
    sections = yaml.safe_load(recipe.read_text())
    sections["model"] = {"model_name_or_path": str(tmp_path / "out")}
    sections["lora"] = {"banks": ["text"], "cross_modal": True, "lora_rank": 2}
    sections["privacy"] = {"epsilon_per_update": 0.5, "mechanism": "laplace", "delta": 1e-3, "max_grad_norm": 0.5}
    sections["training"] |= {"max_steps": 2, "save_steps": 1, "logging_steps": 1, "per_device_train_batch_size": 1}
    recipe.write_text(yaml.safe_dump(sections))
    private = tmp_path / "private"
    metrics = run_training(read_recipe(recipe, ["--output_dir", str(private)]))
    assert metrics["epsilon"] > 0 and "train_loss" not in metrics and metrics["eval_loss"] > 0
    card = (private / "README.md").read_text()
    spent = f"| epsilon {metrics['epsilon']:.4g} at delta 0.001 | spent by this run |"
    assert spent in card and "starts from |" in card
    assert (
        "| 2 updates | each row with probability" in card and "clipped to L1 norm 0.5, Laplace noise of scale 1" in card
    )
    assert f"| epsilon | {metrics['epsilon']:.4g} |" in card
    assert json.loads((private / "all_results.json").read_text())["epsilon"] == metrics["epsilon"]
    assert json.loads((private / "privacy.json").read_text())["epsilon"] == metrics["epsilon"]
    history = json.loads((private / "trainer_state.json").read_text())["log_history"]
    assert not [entry for entry in history if "loss" in entry or "token_accuracy" in entry]
    load_model(private)
    AutoProcessor.from_pretrained(private)

    # A second run, on the merged model: what the first has spent is not forgotten.
    load_model(private, merge=True)[0].save_pretrained(private / "merged")
    AutoProcessor.from_pretrained(private).save_pretrained(private / "merged")
    words = ["--model_name_or_path", str(private / "merged"), "--output_dir", str(tmp_path / "second")]
    run_training(read_recipe(recipe, [*words, "--max_steps", "1", "--save_strategy", "no"]))
    card = (tmp_path / "second" / "README.md").read_text()
    assert "| spent by the model that it starts from |" in card
    assert f"| epsilon {metrics['epsilon'] * 1.5:.4g} at delta 0.002 | for a row that is in the data of both |" in card
