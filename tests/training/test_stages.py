"""Stages run one after the other, go on where they stopped, and are refused before any work."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForMultimodalLM
from transformers.utils import is_bitsandbytes_available

from chorus_moe import ChorusForConditionalGeneration, ChorusProcessor
from chorus_moe.surgery import bytes_report, dequantize, quantize
from chorus_moe.training import readiness
from chorus_moe.training.checkpoints import numbered_checkpoints
from chorus_moe.training.data import load_rows
from chorus_moe.training.loading import load_model
from chorus_moe.training.stages import read_stages, run_stages, shipped_recipes
from chorus_moe.training.train import load_or_build
from tests.fresh_process import PROGRAM, kill, run_ranks
from tests.training.test_data import write_splits
from tests.training.test_train import assert_equal

AUTO = ["--resume_from_checkpoint", "auto"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_splits(tmp_path)
    return tmp_path


@pytest.fixture
def base(model: ChorusForConditionalGeneration, processor: ChorusProcessor, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def sections_of(base: Path, data: Path) -> dict[str, Any]:
    training = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "learning_rate": "1e-2", "save_steps": 2}
    training |= {"max_steps": 4, "per_device_train_batch_size": 2, "output_dir": str(data / "out")}
    stages = [
        {"name": "connectors", "train": ["connectors"]},
        {"name": "experts", "train": ["connectors"], "lora": {"banks": ["image"], "lora_rank": 2}},
        {"name": "top", "train": ["layers:top34%"], "learning_rates": {"banks.image": 1e-3}, "layer_decay": 0.9},
    ]
    model = {"model_name_or_path": str(base)}
    return {"model": model, "data": {"train_data": str(data)}, "training": training, "stages": stages}


def write(path: Path, sections: Any) -> Path:
    path.write_text(yaml.safe_dump(sections), encoding="utf-8")
    return path


@pytest.fixture
def recipe(base: Path, data: Path) -> Path:
    return write(data / "recipe.yaml", sections_of(base, data))


def test_each_stage_trains_its_parts_from_the_weights_of_the_one_before(
    recipe: Path, base: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = run_stages(read_stages(recipe))
    out = data / "out"
    folders = [base, out / "stages" / "connectors", out / "stages" / "experts" / "merged", out]
    weights = [AutoModelForMultimodalLM.from_pretrained(folder).state_dict() for folder in folders]
    changed = [
        {name for name in old if not old[name].equal(new[name])}
        for old, new in zip(weights[:-1], weights[1:], strict=True)
    ]
    assert all("_connector." in name for name in changed[0]) and changed[0]
    assert {mark for mark in ("_connector.", ".banks.image.experts.") if any(mark in name for name in changed[1])} == {
        "_connector.",
        ".banks.image.experts.",
    }
    assert not [name for name in changed[1] if "_connector." not in name and ".banks.image.experts." not in name]
    assert changed[2] and all(".layers.2." in name for name in changed[2])
    card = (out / "README.md").read_text()
    assert "| connectors | connectors | " in card
    assert "| experts | connectors, banks as LoRA | " in card
    assert "| top | layers:top34% | " in card

    # All finished: nothing is trained again.
    capsys.readouterr()
    assert run_stages(read_stages(recipe, AUTO)) == json.loads(json.dumps(metrics))
    assert capsys.readouterr().err.count(" is finished") == 3
    with pytest.raises(
        ValueError, match=r"stage 'connectors' is finished, with training.learning_rate=0.01; now it is"
    ):
        run_stages(read_stages(recipe, [*AUTO, "--connectors.learning_rate", "1e-3"]))
    with pytest.raises(ValueError, match="holds stages of an earlier run; continue it with"):
        run_stages(read_stages(recipe))


@pytest.mark.slow
def test_a_run_killed_in_a_stage_ends_at_the_same_bits(recipe: Path, data: Path) -> None:
    words = [*AUTO, "--max_steps", "8", "--save_steps", "2", "--norm_ratio", "20", "--optim", "schedule_free_adamw"]
    words += ["--lr_scheduler_type", "constant"]
    killed, whole = data / "killed", data / "whole"
    second = killed / "stages" / "experts"
    command = ["train", str(recipe), *words, "--output_dir", str(killed)]
    kill(command, cwd=data, when=lambda: bool(numbered_checkpoints(second)))
    assert (killed / "stages" / "connectors" / "stage.json").is_file()
    assert not (second / "stage.json").exists()
    done = (killed / "stages" / "connectors" / "model.safetensors").stat().st_mtime_ns
    run_stages(read_stages(recipe, [*words, "--output_dir", str(killed)]))
    run_stages(read_stages(recipe, [*words, "--output_dir", str(whole)]))
    assert (killed / "stages" / "connectors" / "model.safetensors").stat().st_mtime_ns == done
    assert_equal(*(AutoModelForMultimodalLM.from_pretrained(folder) for folder in (killed, whole)))


@pytest.mark.slow
def test_two_processes_go_through_the_stages_together(recipe: Path, data: Path) -> None:
    run_stages(read_stages(recipe, ["--per_device_train_batch_size", "4", "--output_dir", str(data / "one")]))
    # Something to remove: each process finds it, one removes it.
    (data / "two" / "stages" / "connectors").mkdir(parents=True)
    words = ["--output_dir", str(data / "two"), "--overwrite_output_dir", "true"]
    for done in run_ranks(PROGRAM, ["train", str(recipe), *words], cwd=data):
        assert done.returncode == 0, done.stderr[-3000:]
    records = [
        [json.loads((data / name / "stages" / stage / "stage.json").read_text()) for name in ("one", "two")]
        for stage in ("connectors", "experts", "top")
    ]
    # Balance losses are those of each process's own rows, so the losses differ in the third digit.
    for one, two in records:
        assert two["metrics"]["train_loss"] == pytest.approx(one["metrics"]["train_loss"], abs=0.02)
        assert {**two, "metrics": None} == {**one, "metrics": None, "asked": two["asked"]}
    one, two = (load_file(data / name / "stages" / "connectors" / "model.safetensors") for name in ("one", "two"))
    # Four steps of 1e-2 each, by gradients that differ in rounding and in what balance adds.
    assert max(float((tensor - two[name]).abs().max()) for name, tensor in one.items()) < 2e-3


BAD = [
    ({"train": ["conectors"]}, r"stage 'two': unfreeze: unknown part 'conectors'; did you mean 'connectors'"),
    ({"train": []}, r"stage 'two': nothing is trained: train=\[\]"),
    ({"train": ["image"], "freeze": ["banks"]}, r"stage 'two': nothing is trained: train=\['image'\]"),
    ({"train": ["layers:9"]}, "stage 'two': unfreeze: 'layers:9' names layers 9 to 9; the model has layers 0 to 2"),
    ({"train": ["head"], "lora": {"banks": ["imagine"]}}, "stage 'two': no expert bank is named 'imagine'"),
    ({"train": ["head"], "data": {"train_data": "nowhere/at/all"}}, "no data at 'nowhere/at/all'"),
    ({"train": ["image"], "learning_rates": {"connectors": 1}}, "learning_rates: nothing of 'connectors' is trained"),
    ({"train": ["image"], "learning_rates": {"image": -1}}, "expected a positive number for 'image', found -1"),
    ({"train": ["image"], "layer_decay": 2}, "layer_decay=2.0 must be above 0 and at most 1"),
    ({"trian": ["image"]}, "stage 'two': unknown name 'trian'; did you mean 'train'"),
    ({"train": ["image"], "freeze": ["all"], "lora": {"banks": ["image"]}}, r"freeze=\['all'\] beside a LoRA"),
    ({"train": ["image"], "model": {"load_in_4bit": True}}, "load_in_4bit needs a lora section"),
]


@pytest.mark.parametrize(("stage", "message"), BAD)
def test_a_stage_that_cannot_run_is_refused_before_the_first_one_starts(
    stage: dict[str, Any], message: str, base: Path, data: Path
) -> None:
    sections = sections_of(base, data)
    sections["stages"] = [sections["stages"][0], {"name": "two", **stage}]
    path = write(data / "recipe.yaml", sections)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run_stages(read_stages(path))
    assert not (data / "out").exists()


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([], "stages must be a list of at least one stage"),
        ([{"train": ["head"]}], "stage 0 needs a name"),
        ([{"name": "../x"}], "stage 0 needs a name"),
        ([{"name": "a"}, {"name": "a"}], "two stages are called 'a'"),
        ([{"name": "a", "data": 3}], "stage 'a': section 'data' must be a mapping, found 3"),
    ],
)
def test_stages_have_names_of_their_own(stages: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_stages(write(tmp_path / "recipe.yaml", {"stages": stages}))


def test_an_override_reaches_all_stages_or_one(recipe: Path) -> None:
    stages = read_stages(recipe, ["--max_steps", "7", "--top.max_steps=9", "--experts.lora_rank", "3"])
    assert [stage.recipe.training.max_steps for stage in stages] == [7, 7, 9]
    assert stages[1].recipe.lora.lora_rank == 3
    with pytest.raises(ValueError, match="--tip.max_steps: no stage is called 'tip'; did you mean 'top'"):
        read_stages(recipe, ["--tip.max_steps", "1"])


SMALL = ["--use_cpu", "true", "--disable_tqdm", "true", "--max_steps", "1", "--per_device_train_batch_size", "2"]


needs_bitsandbytes = pytest.mark.skipif(not is_bitsandbytes_available(), reason="bitsandbytes is not installed")


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_a_shipped_recipe_runs_on_small_data(
    name: str, base: Path, data: Path, model: ChorusForConditionalGeneration, processor: ChorusProcessor
) -> None:
    words = ["--model_name_or_path", str(base), "--train_data", str(data), "--output_dir", str(data / "out"), *SMALL]
    if name == "long_text":
        from tests.training.conftest import make_model

        windows = {"num_global_tokens": 2, "layer_types": ["sliding_attention"] * 3, "sliding_window": 8}
        make_model(processor.tokenizer, **windows, cross_modal_layers=[]).save_pretrained(base)
    stages = read_stages(shipped_recipes()[name], words)
    run_stages(stages)
    loaded, _ = load_model(data / "out")
    if name == "new_domain_bank":
        assert "domain" in loaded.config.text_config.expert_banks


def test_qlora_trains_quantised_banks_and_merges_into_them(base: Path, data: Path) -> None:
    words = ["--model_name_or_path", str(base), "--train_data", str(data), "--output_dir", str(data / "out"), *SMALL]
    [stage] = read_stages(shipped_recipes()["qlora"], [*words, "--max_steps", "4", "--learning_rate", "1e-2"])
    model, _ = load_or_build(stage.recipe, load_rows(data))
    groups = bytes_report(model).groups
    assert all("int4" in groups[f"experts:{name}"].numbers for name in ("text", "image", "audio", "common"))
    assert "int8" in groups["attention"].numbers
    run_stages([stage])
    history = json.loads((data / "out" / "trainer_state.json").read_text())["log_history"]
    assert math.isfinite(history[-1]["train_loss"])
    adapter = load_file(data / "out" / "adapter_model.safetensors")
    # The adapter has moved from where LoRA starts, at zero, in banks as well.
    assert all(
        tensor.any() for name, tensor in adapter.items() if "q_proj.lora_B" in name or "text.experts.lora_B" in name
    )
    assert any("text.experts.lora_B" in name for name in adapter)
    # On weights as they were, and on those that it was trained on: merged, it gives what it gave.
    loaded, _ = load_model(data / "out")
    quantize(loaded, stage.recipe.quantization.groups, verbose=False)
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        expected = loaded(input_ids=ids).logits
        dequantize(loaded)
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-4)
    load_model(data / "out", merge=True)


FOUR_BITS = ["--quantize", "none", "--load_in_4bit", "true", "--learning_rate", "1e-2"]


@needs_bitsandbytes
def test_an_adapter_trains_on_the_four_bits_of_bitsandbytes(base: Path, data: Path) -> None:
    words = ["--model_name_or_path", str(base), "--train_data", str(data), "--output_dir", str(data / "out"), *SMALL]
    [stage] = read_stages(
        shipped_recipes()["qlora"], [*words, "--max_steps", "4", "--learning_rate", "1e-2", *FOUR_BITS]
    )
    model, _ = load_or_build(stage.recipe, load_rows(data))
    projections = {name: module for name, module in model.named_modules() if name.endswith("q_proj.base_layer")}
    assert projections
    assert all(module.weight.quant_state.quant_type == "nf4" for module in projections.values())
    # Two weights a byte.
    shapes = {name.rpartition(".q_proj")[2]: module.weight.shape for name, module in projections.items()}
    assert set(shapes.values()) == {(64 * 64 // 2, 1)}
    run_stages([stage])
    history = json.loads((data / "out" / "trainer_state.json").read_text())["log_history"]
    assert math.isfinite(history[-1]["train_loss"])
    # The adapter has moved from where LoRA starts, at zero, and goes onto the weights as they were.
    adapter = load_file(data / "out" / "adapter_model.safetensors")
    assert all(tensor.any() for name, tensor in adapter.items() if "q_proj.lora_B" in name)
    load_model(data / "out", merge=True)


def test_four_bits_without_bitsandbytes_are_refused(base: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readiness, "is_bitsandbytes_available", lambda: False)
    words = ["--model_name_or_path", str(base), "--train_data", str(data), "--output_dir", str(data / "out"), *SMALL]
    with pytest.raises(ImportError, match=r"bitsandbytes is not installed; pip install 'chorus-moe\[qlora\]'"):
        run_stages(read_stages(shipped_recipes()["qlora"], [*words, *FOUR_BITS]))


def test_variables_fill_a_recipe_in(tmp_path: Path) -> None:
    stages = read_stages(shipped_recipes()["new_modality"], ["--bank=image", "--encoder", "vision", "--max_steps", "2"])
    assert stages[1].recipe.parts.train == ["vision_connector", "banks.image"]
    assert stages[1].recipe.training.max_steps == 2
    wrong = write(tmp_path / "recipe.yaml", {"variables": {"bank": "a"}, "parts": {"train": ["${bnak}"]}})
    with pytest.raises(ValueError, match=r"\$\{bnak\} is no variable; did you mean 'bank'"):
        read_stages(wrong)
