"""A model in 8 or 4 bits: by group, saved and loaded, below adapters, and what it cannot be asked for."""

import os
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from chorus_moe import ChorusForConditionalGeneration
from chorus_moe.fastpaths.quantized_weights import Quantized, stored_weight
from chorus_moe.surgery import (
    ChorusQuantizationConfig,
    add_bank,
    bytes_report,
    dequantize,
    export_experts,
    fuse_experts,
    merge_experts,
    prune_experts,
    quantization_report,
    quantize,
    save_bank,
    unfuse_experts,
)
from chorus_moe.training.lora import lora_config
from tests.conftest import tiny_batch, tiny_config
from tests.fresh_process import run_fresh

FORMATS: dict[str, Any] = {
    "int8": "int8",
    "int4": "int4",
    "int8 in groups": {"bits": 8, "group": 16},
    "int4 with offsets": {"bits": 4, "group": 32, "symmetric": False},
    "by group": {"experts": "int4", "attention": "int8", "image": "none", "vision_tower": "int8"},
}


@pytest.fixture(scope="module")
def original() -> ChorusForConditionalGeneration:
    torch.manual_seed(0)
    return ChorusForConditionalGeneration(tiny_config()).eval()


@pytest.fixture
def model(original: ChorusForConditionalGeneration) -> ChorusForConditionalGeneration:
    return deepcopy(original)


@torch.no_grad()
def logits_of(model: nn.Module) -> torch.Tensor:
    return model(**tiny_batch(tiny_config())).logits


def stored(model: nn.Module, name: str) -> int | None:
    """Bits of a weight; None where it is not quantised."""
    path, _, key = name.rpartition(".")
    found = stored_weight(model.get_submodule(path), key)
    return found.bits if isinstance(found, Quantized) else None


LAYER = "model.language_model.layers.1."


def test_groups_and_banks_are_quantised_by_name_and_nothing_else(model: ChorusForConditionalGeneration) -> None:
    quantize(model, {"image": "none", "experts": "int4", "attention": "int8"}, verbose=False)
    assert stored(model, LAYER + "mlp.banks.text.experts.gate_up_proj") == 4
    # A bank overrides "experts", although it was named before it.
    assert stored(model, LAYER + "mlp.banks.image.experts.gate_up_proj") is None
    layers = model.model.language_model.layers
    kinds = {type(layer.self_attn.o_proj).__name__ for layer in layers}
    assert kinds == {"Linear", "ParametrizedQuantizedLinear"}
    assert stored(model, "lm_head.weight") is None
    # By which transformers' Trainer, PEFT and saving know such a model.
    assert model.is_quantized and model.quantization_method == "chorus"
    assert model.config.quantization_config is model.hf_quantizer.quantization_config
    dequantize(model)
    assert not any(hasattr(owner, "quantization_config") for owner in (model.config, model))
    assert not getattr(model, "is_quantized", False)


def test_one_format_means_all_but_towers_routers_norms_and_gates(model: ChorusForConditionalGeneration) -> None:
    quantize(model, "int8", verbose=False)
    groups = bytes_report(model).groups
    whole = {name for name, group in groups.items() if "int8" not in group.numbers}
    assert whole == {"vision_tower", "audio_tower", "routers", "bank_gates", "norms"}
    assert {name for name, group in groups.items() if name.startswith("experts:")}
    # Biases of connectors are what they were.
    assert groups["connectors"].numbers.keys() == {"int8", "float32"}


def test_saved_models_of_every_format_give_the_same_bits_in_a_fresh_process(
    original: ChorusForConditionalGeneration, tmp_path: Path
) -> None:
    plain, batch = logits_of(original), tiny_batch(tiny_config())
    for name, groups in FORMATS.items():
        model = deepcopy(original)
        quantize(model, groups, verbose=False)
        found = logits_of(model)
        assert not torch.equal(found, plain)
        model.save_pretrained(tmp_path / name)
        torch.save({"inputs": batch, "logits": found}, tmp_path / name / "expected.pt")
    program = """
from pathlib import Path
import torch
from transformers import AutoModelForMultimodalLM
import chorus_moe
for folder in sorted(Path().iterdir()):
    model = AutoModelForMultimodalLM.from_pretrained(folder)
    saved = torch.load(folder / "expected.pt", weights_only=True)
    with torch.no_grad():
        same = torch.equal(model(**saved["inputs"]).logits, saved["logits"])
    print(f"{folder}: {model.config.quantization_config.quant_method} {same}")
"""
    # As many threads as here: another number sums in another order.
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = run_fresh(program, cwd=tmp_path, environment=os.environ | threads)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{name}: chorus True" for name in sorted(FORMATS)]
    # The tables of bytes, where they do not mix with a program's own output.
    assert done.stderr.count("stored as") == len(FORMATS)


def test_loading_can_quantise(model: ChorusForConditionalGeneration, tmp_path: Path, capsys: Any) -> None:
    model.save_pretrained(tmp_path)
    quantize(model, {"experts": "int4"}, verbose=False)
    asked = ChorusQuantizationConfig({"experts": "int4"})
    loaded = ChorusForConditionalGeneration.from_pretrained(tmp_path, quantization_config=asked)
    assert torch.equal(logits_of(loaded), logits_of(model))
    assert "experts:text" in capsys.readouterr().err
    # What it is now, not what was asked for: so it can be saved.
    assert loaded.config.quantization_config.weights == model.config.quantization_config.weights


def test_bytes_are_those_of_the_file(model: ChorusForConditionalGeneration, tmp_path: Path) -> None:
    report = quantize(model, "int4", verbose=False)
    assert report.parameters_after == report.parameters_before
    model.save_pretrained(tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    counted = bytes_report(model).bytes
    # The file has a header with every name, and nothing else.
    assert counted < size < counted + 60_000
    reached = bytes_report(model).groups["experts:text"]
    # Half a byte a weight, and a scale of four bytes for each 64 or 32 of them.
    assert 0.5 + 4 / 64 <= reached.bytes / reached.total <= 0.5 + 4 / 32


def test_a_largest_group_that_is_not_reached_is_named(
    model: ChorusForConditionalGeneration, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(quantization_report.logger, "warning", said.append)
    quantize(model, {"attention": "int8"}, verbose=False)
    assert "'experts:" in said[0]
    assert bytes_report(model).missed is not None
    quantize(model, {"experts": "int8"}, verbose=False)
    assert len(said) == 1


@pytest.mark.parametrize("undo", [dequantize, ChorusForConditionalGeneration.dequantize], ids=["ours", "transformers'"])
def test_dequantised_it_is_an_ordinary_model(
    undo: Callable[[Any], object], model: ChorusForConditionalGeneration, tmp_path: Path
) -> None:
    quantize(model, "int4", verbose=False)
    expected = logits_of(model)
    undo(model)
    # The same weights; products of whole numbers and of floats sum in another order.
    torch.testing.assert_close(logits_of(model), expected, atol=1e-5, rtol=1e-4)
    assert not hasattr(model.config, "quantization_config")
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(ChorusForConditionalGeneration.from_pretrained(tmp_path)), logits_of(model))
    unfuse_experts(model)


def test_tied_tables_are_separated(tmp_path: Path) -> None:
    config = tiny_config()
    config.tie_word_embeddings = True
    model = ChorusForConditionalGeneration(config).eval()
    quantize(model, {"head": "int8"}, verbose=False)
    assert stored(model, "lm_head.weight") == 8
    assert stored(model, "model.language_model.embed_tokens.weight") is None
    model.save_pretrained(tmp_path)
    loaded = ChorusForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(logits_of(loaded), logits_of(model))


def test_linear_experts_are_quantised_too(model: ChorusForConditionalGeneration) -> None:
    unfuse_experts(model)
    quantize(model, {"text": "int8"}, verbose=False)
    assert stored(model, LAYER + "mlp.banks.text.experts.0.gate_proj.weight") == 8
    assert stored(model, LAYER + "mlp.banks.common.experts.0.gate_proj.weight") is None


def test_adapters_train_on_quantised_banks_and_merge_when_these_are_dequantised(
    model: ChorusForConditionalGeneration, tmp_path: Path
) -> None:
    quantize(model, "int4", verbose=False)
    below = deepcopy(model)
    config = lora_config(model, banks="all", attention=True, verbose=False)
    adapted, batch = get_peft_model(model, config), tiny_batch(tiny_config())
    start = adapted(**batch).loss
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert any("experts" in name for name in trained)
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    for _ in range(3):
        adapted(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert adapted(**batch).loss < start
    expected = logits_of(adapted.eval())
    # Nothing of a forward stays on the weights.
    assert torch.equal(logits_of(adapted), expected)
    adapted.save_pretrained(tmp_path)
    assert torch.equal(logits_of(PeftModel.from_pretrained(deepcopy(below), tmp_path).eval()), expected)
    with pytest.raises(RuntimeError, match="dequantize"):
        deepcopy(adapted).merge_and_unload()
    # Below the adapter: to merge it, and back again to go on with it.
    dequantize(adapted)
    torch.testing.assert_close(logits_of(adapted), expected, atol=1e-5, rtol=1e-4)
    merged = deepcopy(adapted).merge_and_unload()
    torch.testing.assert_close(logits_of(merged), expected, atol=1e-5, rtol=1e-4)
    assert not hasattr(merged.config, "quantization_config")
    quantize(adapted, "int4", verbose=False)
    assert stored(adapted.get_base_model(), "lm_head.weight") == 4
    torch.testing.assert_close(logits_of(adapted), expected, atol=1e-4, rtol=1e-3)


REFUSED: dict[str, tuple[Any, str]] = {
    "group": ({"expert": "int8"}, "unknown group 'expert'; did you mean 'experts'"),
    "format": ({"experts": "int3"}, "'experts': unknown format 'int3'; did you mean 'int8'"),
    "bits": ({"experts": {"bits": 3}}, "'experts': bits=3; choose 8 or 4"),
    "setting": ({"experts": {"bits": 4, "size": 32}}, "'experts': unknown setting 'size'"),
    "size": ({"experts": {"bits": 4, "group": 7}}, "'experts': group=7"),
    "rows": ({"attention": "int8", "text": {"bits": 4, "group": 48}}, "rows of 64 weights, which groups of 48 do not"),
    "kind": ({"experts": 8}, "'experts': expected int8, int4, none or a mapping"),
    "nothing": ({"experts": "none"}, "nothing is named"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_nobody_has_is_refused_before_anything_changes(model: ChorusForConditionalGeneration, name: str) -> None:
    groups, said = REFUSED[name]
    before = deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=said):
        quantize(model, groups, verbose=False)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not hasattr(model.config, "quantization_config")


OPERATIONS: dict[str, Callable[[Any, Path], Any]] = {
    "unfuse_experts": lambda model, path: unfuse_experts(model),
    "fuse_experts": lambda model, path: fuse_experts(model),
    "prune_experts": lambda model, path: prune_experts(model, {"text": 2}, {}),
    "merge_experts": lambda model, path: merge_experts(model, {"text": 2}, {}),
    "save_bank": lambda model, path: save_bank(model, "text", path / "text.safetensors"),
    "export_experts": lambda model, path: export_experts(model, path),
    "add_bank": lambda model, path: add_bank(model, "legal"),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_on_weights_refuse_a_quantised_model(
    model: ChorusForConditionalGeneration, name: str, tmp_path: Path
) -> None:
    quantize(model, {"text": "int8"}, verbose=False)
    names = model.state_dict().keys()
    with pytest.raises(ValueError, match=f"{name}: .*quantised; call dequantize"):
        OPERATIONS[name](model, tmp_path)
    assert model.state_dict().keys() == names
    assert not list(tmp_path.iterdir())


def test_it_is_quantised_once(model: ChorusForConditionalGeneration) -> None:
    quantize(model, {"text": "int8"}, verbose=False)
    with pytest.raises(ValueError, match=r"text.experts.* is quantised already"):
        quantize(model, {"experts": "int4"}, verbose=False)
    quantize(model, {"experts": "int4", "text": "none"}, verbose=False)
    assert stored(model, LAYER + "mlp.banks.text.experts.down_proj") == 8
    assert stored(model, LAYER + "mlp.banks.common.experts.down_proj") == 4
