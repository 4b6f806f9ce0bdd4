"""A recipe trains the contrastive head on pairs, evaluates it and goes on; what does not go with it is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from chorus_moe import ChorusConfig, ChorusForContrastive
from chorus_moe.training import cli
from chorus_moe.training.contrast.setup import check_head
from chorus_moe.training.recipe import build_recipe, read_recipe
from chorus_moe.training.stages import check_stages, read_stages
from chorus_moe.training.train import run_training
from tests.fresh_process import PROGRAM, run_ranks
from tests.training.contrast.conftest import TEXTS, make_pair
from tests.training.test_data import write_jsonl


@pytest.fixture
def recipe(config: ChorusConfig, tmp_path: Path) -> Path:
    """A recipe that builds and trains a tiny contrastive model on files."""
    rows = [{"image": f"{index}.png", "text": TEXTS[index]} for index in range(6)]
    for index in range(6):
        make_pair(index)["image"].save(tmp_path / f"{index}.png")
    write_jsonl(tmp_path / "train.jsonl", rows)
    write_jsonl(tmp_path / "test.jsonl", rows)
    values = config.to_diff_dict()
    for key in ("transformers_version", "image_token_id", "audio_token_id"):
        values.pop(key, None)
    values["text_config"] |= {"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0}
    values["text_config"].pop("vocab_size")
    (tmp_path / "tiny.json").write_text(json.dumps(values))
    training = {
        "output_dir": str(tmp_path / "out"), "per_device_train_batch_size": 4, "max_steps": 2, "save_steps": 1,
        "learning_rate": 1e-2, "report_to": "none", "use_cpu": True, "disable_tqdm": True,
    }  # fmt: skip
    sections = {
        "model": {"config": str(tmp_path / "tiny.json"), "tokenizer_vocab_size": 280, "head": "contrastive"},
        "data": {"train_data": str(tmp_path), "eval_data": str(tmp_path)},
        "objectives": {"contrastive_loss": "sigmoid", "contrastive_temperature": 0.5},
        "training": training,
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(sections))
    return path


def invoke(*words: object) -> dict[str, Any]:
    result = CliRunner().invoke(cli.app, [str(word) for word in (*words, "--json")], catch_exceptions=False)
    return json.loads(result.stdout)


def test_a_recipe_trains_a_head_that_retrieves_and_classifies(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    metrics = run_training(read_recipe(recipe, ["--learning_rate", "1e-7"]))
    assert metrics["eval_loss"] > 0
    model = ChorusForContrastive.from_pretrained(out)
    assert model.config.contrastive_loss == "sigmoid"
    assert model.logit_scale.exp().item() == pytest.approx(2.0, abs=1e-4)
    assert "pipeline_tag: feature-extraction" in (out / "README.md").read_text()

    words = ("evaluate", "--model", out, "--data", tmp_path)
    found = invoke(*words, "--task", "retrieval", "--k", 1, "--k", 4)
    assert found["num_rows"] == 6
    assert found["text_to_image"] == {"num_queries": 4, "num_candidates": 6} | {
        name: found["text_to_image"][name] for name in ("recall@1", "recall@4")
    }
    assert found["image_to_text"]["recall@4"] == 1.0
    found = invoke(*words, "--task", "zero_shot", "--labels", "three, four,five,four five")
    assert 0 <= found["image"]["accuracy"] <= 1

    # The saved model goes on, with its own loss, and resumes at the same weights.
    sections = yaml.safe_load(recipe.read_text())
    sections |= {"model": {"model_name_or_path": str(out), "head": "contrastive"}, "objectives": {}}
    recipe.write_text(yaml.safe_dump(sections))
    second = ["--output_dir", str(tmp_path / "second")]
    run_training(read_recipe(recipe, second))
    whole = ChorusForContrastive.from_pretrained(tmp_path / "second").state_dict()
    assert "logit_bias" in whole
    words = [*second, "--resume_from_checkpoint", str(tmp_path / "second" / "checkpoint-1")]
    run_training(read_recipe(recipe, [*words, "--overwrite_output_dir", "true"]))
    resumed = ChorusForContrastive.from_pretrained(tmp_path / "second").state_dict()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.slow
def test_two_processes_train_as_one_with_the_whole_batch(recipe: Path, tmp_path: Path) -> None:
    """The whole way of the Trainer: batches dealt out, gathered, and averaged."""
    settings = ["--optim", "sgd", "--learning_rate", "0.1", "--save_strategy", "no", "--max_steps", "3"]
    # The order of rows is that of the process.
    settings += ["--train_sampling_strategy", "sequential", "--max_grad_norm", "0"]
    run_training(read_recipe(recipe, [*settings, "--per_device_train_batch_size", "6"]))
    command = ["train", str(recipe), *settings, "--per_device_train_batch_size", "3"]
    for done in run_ranks(PROGRAM, [*command, "--output_dir", str(tmp_path / "two")], cwd=tmp_path):
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (ChorusForContrastive.from_pretrained(tmp_path / name).state_dict() for name in ("out", "two"))
    for name, tensor in one.items():
        # Three steps of sums in another order.
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-5)


def test_contrast_beside_labelled_tokens_needs_a_second_row(tmp_path: Path) -> None:
    values = {"max_steps": 1, "output_dir": str(tmp_path), "per_device_train_batch_size": 1}
    recipe = build_recipe({"objectives": {"contrast_weight": 0.5}, "training": values}, "test", [])
    with pytest.raises(
        ValueError, match=r"contrast_weight=0.5 tells each pair .* per_device_train_batch_size=1 has no"
    ):
        check_head(recipe)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--head", "contrast"], "unknown head 'contrast'; did you mean 'contrastive'"),
        (["--contrastive_loss", "infonse"], "unknown contrastive_loss 'infonse'"),
        (["--contrastive_temperature", "0"], "contrastive_temperature must be positive, 0.01 or more, found 0.0"),
        (["--contrastive_temperature", "-1"], "must be positive"),
        (["--contrastive_temperature", "nan"], "must be positive"),
        (["--per_device_train_batch_size", "1"], "per_device_train_batch_size=1 has no other"),
        (["--keep_skills", "0.1"], "guards.keep_skills is about labelled tokens"),
        (["--label_smoothing_factor", "0.1"], "training.label_smoothing_factor is about labelled tokens"),
        (["--next_token_weight", "0.5"], "objectives.next_token_weight is about labelled tokens"),
        (["--contrast_weight", "0.5"], "objectives.contrast_weight is about labelled tokens"),
        (["--head", "generation"], "objectives.contrastive_loss is for model.head: contrastive"),
    ],
    ids=lambda value: value[0].removeprefix("--") if isinstance(value, list) else "",
)
def test_what_does_not_go_with_the_head_is_refused(recipe: Path, words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_training(read_recipe(recipe, words))


def test_a_new_head_must_be_trained_and_a_lost_one_is_not_drawn_anew(
    recipe: Path, tmp_path: Path, model: Any, contrastive: ChorusForContrastive
) -> None:
    model.save_pretrained(tmp_path / "generative")
    contrastive.save_pretrained(tmp_path / "contrastive")
    sections = yaml.safe_load(recipe.read_text())
    sections["model"] = {"model_name_or_path": str(tmp_path / "generative"), "head": "contrastive"}
    recipe.write_text(yaml.safe_dump(sections))
    with pytest.raises(ValueError, match=r"train=\['connectors'\] leaves the contrastive head, which is new"):
        check_head(read_recipe(recipe, ["--train", "connectors"]))
    with pytest.raises(ValueError, match="an adapter cannot save a new one whole"):
        check_head(read_recipe(recipe, ["--use_lora", "true"]))
    check_head(read_recipe(recipe, ["--train", "connectors", "head"]))
    other = ["--model_name_or_path", str(tmp_path / "contrastive")]
    check_head(read_recipe(recipe, [*other, "--train", "connectors"]))
    sections["objectives"], sections["model"]["head"] = {}, "generation"
    recipe.write_text(yaml.safe_dump(sections))
    with pytest.raises(ValueError, match="saved as ChorusForContrastive, without the layer that predicts tokens"):
        check_head(read_recipe(recipe, other))


def test_stages_train_one_head_on_pairs(recipe: Path) -> None:
    sections = yaml.safe_load(recipe.read_text())
    sections["stages"] = [{"name": "first", "train": ["head", "connectors"]}, {"name": "second", "train": ["all"]}]
    recipe.write_text(yaml.safe_dump(sections))
    check_stages(read_stages(recipe))
    sections["stages"][1]["model"] = {"head": "generation"}
    recipe.write_text(yaml.safe_dump(sections))
    with pytest.raises(ValueError, match="'first' trains contrastive, 'second' trains generation"):
        check_stages(read_stages(recipe))
