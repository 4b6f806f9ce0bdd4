"""Compression from a folder to a folder: sizes that were foretold, refusals before work, and a run that goes on."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForMultimodalLM, AutoProcessor, PreTrainedTokenizerFast

from chorus_moe.modeling.configuration_chorus import ChorusConfig
from chorus_moe.surgery.processor import processor_from_config
from chorus_moe.training.compression import compress as module
from chorus_moe.training.compression import measure as figures
from chorus_moe.training.compression.compress import compress, prepare
from chorus_moe.training.compression.measure import weight_bytes
from chorus_moe.training.compression.plan import CompressionRecipe, Distil, Merge, Prune, Quantize
from chorus_moe.training.compression.target import default_plans, sizes_of
from tests.training.conftest import make_model
from tests.training.test_data import PLAIN, write_jsonl

INT8 = Quantize({"experts": "int8"})


@pytest.fixture(autouse=True)
def short_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "TIMED_TOKENS", 2)
    monkeypatch.setattr(figures, "TIMED_ANSWERS", 1)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, trained_tokenizer: PreTrainedTokenizerFast) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    model = make_model(trained_tokenizer)
    model.save_pretrained(folder)
    processor_from_config(model.config, trained_tokenizer).save_pretrained(folder)
    write_jsonl(folder / "rows.jsonl", [{"messages": PLAIN, "task": "greet"}] * 2)
    return folder


def recipe(source: Path, out: Path, **values: Any) -> CompressionRecipe:
    rows = str(source / "rows.jsonl")
    given: dict[str, Any] = {"data": {"train_data": rows, "eval_data": rows}, "max_new_tokens": 2} | values
    return CompressionRecipe(model=str(source), output_dir=str(out), **given)


def test_every_step_ends_with_the_bytes_that_were_foretold(source: Path, tmp_path: Path) -> None:
    training = {"max_steps": 1, "per_device_train_batch_size": 2, "use_cpu": True}
    steps = (
        Prune(experts={"text": 2}, dense={"experts:text": 16, "layers": 1.0}),
        Merge(banks={"common": 2}),
        Distil({"training": training}),
        INT8,
    )
    work = prepare(recipe(source, tmp_path / "small", steps=steps))
    rows = compress(work, "cpu")
    assert [row.step for row in rows] == ["start", "1 prune", "2 merge", "3 distil", "4 quantize"]
    # Headers differ by padding and by the names of the numbers.
    for row, foretold in zip(rows, (work.outlook.before, *work.outlook.after), strict=True):
        assert row.bytes == pytest.approx(foretold, rel=5e-3)
    assert rows[-1].bytes == weight_bytes(tmp_path / "small")
    assert rows[-1].by_task.keys() == {"greet"} and rows[-1].by_medium.keys() == {"text"}
    assert rows[-1].tokens_per_second > 0 and rows[0].memory > rows[-1].memory
    model = AutoModelForMultimodalLM.from_pretrained(tmp_path / "small")
    assert model.config.text_config.expert_banks["common"]["num_experts"] == 2
    AutoProcessor.from_pretrained(tmp_path / "small")
    written = json.loads((tmp_path / "small" / "compression.json").read_text())
    assert [row["step"] for row in written["rows"]] == [row.step for row in rows]
    card = (tmp_path / "small" / "README.md").read_text()
    assert "| 4 quantize |" in card and "| task greet |" in card and str(source) not in card
    assert not (tmp_path / "small" / "_steps").exists()


def test_a_run_that_was_interrupted_goes_on_after_the_last_whole_step(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "small"
    asked = recipe(source, out, steps=(Prune(experts={"text": 2}), INT8), keep_steps=True)
    done = []

    def fail(step: Any, *args: Any) -> Any:
        done.append(step.name)
        if len(done) == 2:
            raise KeyboardInterrupt
        return apply(step, *args)

    apply = module.apply
    monkeypatch.setattr(module, "apply", fail)
    with pytest.raises(KeyboardInterrupt):
        compress(prepare(asked), "cpu")
    assert not (out / "config.json").exists() and not (out / "model.safetensors").exists()
    with pytest.raises(ValueError, match="differs in steps"):
        prepare(recipe(source, out, steps=(INT8,)))
    rows = compress(prepare(asked), "cpu")
    assert done == ["prune", "quantize", "quantize"]
    assert len(rows) == 3 and (out / "_steps" / "1_prune" / "config.json").is_file()
    whole, small = (AutoModelForMultimodalLM.from_pretrained(path) for path in (out / "_steps" / "1_prune", out))
    ids = torch.tensor([[5, 6, 7]])
    assert torch.allclose(whole(input_ids=ids).logits, small(input_ids=ids).logits, atol=0.05)


@pytest.mark.parametrize("share", [0.5, 0.27])
def test_a_target_alone_makes_a_plan_that_reaches_it(source: Path, tmp_path: Path, share: float) -> None:
    work = prepare(recipe(source, tmp_path / "small", target_bytes=share))
    assert work.outlook.bytes <= share * work.outlook.before
    assert work.recipe.steps[-1].name == "quantize"
    assert not (tmp_path / "small").exists()


def test_default_plans_fit_the_model_and_begin_with_the_mildest(source: Path) -> None:
    config = ChorusConfig.from_pretrained(source)
    sizes = [sizes_of(steps, config)[-1] for steps in default_plans(config, has_rows=True)]
    assert sizes[0] == max(sizes) and sizes[-1] == min(sizes)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"target_bytes": 1000}, r"smallest default plan has [\d,]+ bytes; the target is 1,000"),
        ({"target_bytes": 10**9}, "nothing to do"),
        ({"target_bytes": 1000, "steps": (INT8,)}, r"the steps come to [\d,]+ bytes; the target is 1,000"),
        ({"steps": (Quantize({"expert": "int8"}),)}, "step 1 .quantize.: .*'expert'"),
        ({"steps": (Quantize({"experts": "int3"}),)}, "int3"),
        ({"steps": (INT8, Prune(experts={"text": 2}))}, "step 2 .prune.: .*quantised"),
        ({"steps": (INT8, Distil())}, "put distil before quantize"),
        ({"steps": (Prune(experts={"texts": 2}),)}, "'texts'"),
        ({"steps": (Prune(dense={"head": 2}),)}, "'head'"),
        ({"steps": (Merge(banks={"text": 9}),)}, "cannot keep 9"),
        ({"steps": (Distil({"distillation": {"distillation_temperature": 0.0}}),)}, "distillation_temperature"),
        ({"steps": (Prune(experts={"text": 2}),), "data": {}}, "prune needs training rows"),
    ],
)
def test_what_cannot_be_done_is_refused_before_work(
    source: Path, tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        prepare(recipe(source, tmp_path / "small", **values))
    assert not (tmp_path / "small").exists()


def test_a_device_on_which_a_distil_step_does_not_train_is_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chorus_moe.training.compression.compress.find_device", lambda name: torch.device(name))
    work = prepare(recipe(source, tmp_path / "small", steps=(Distil(),)))
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES=1 and leave --device out"):
        compress(work, "cuda:1")
    assert not (tmp_path / "small").exists()


def test_a_folder_with_a_model_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds a model"):
        prepare(recipe(source, tmp_path, steps=(INT8,)))
    with pytest.raises(ValueError, match="is the model itself"):
        prepare(recipe(source, source, steps=(INT8,)))
