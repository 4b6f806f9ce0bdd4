"""An adapter that does not reach what it names is found, whatever PEFT let pass."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from chorus_moe.training.doctor.adapters import WEIGHTS, adapters
from chorus_moe.training.doctor.inputs import Patient
from chorus_moe.training.doctor.parity import batch_mates, cache
from chorus_moe.training.lora import lora_config
from tests.training.conftest import failing, found_by, make_patient

ATTENTION = "language_model.layers.0.self_attn"


def adapt(patient: Patient, config: LoraConfig) -> Patient:
    return Patient(get_peft_model(patient.model, config).eval(), patient.processor)


def adapt_groups(patient: Patient, **groups: Any) -> Patient:
    return adapt(patient, lora_config(patient.model, **groups, init_lora_weights=False, verbose=False))


def test_a_model_without_an_adapter_is_passed_over(patient: Patient) -> None:
    assert found_by(patient, adapters)["adapters"].verdict == "skipped"


@pytest.mark.parametrize(
    "groups", [{"banks": ["common"], "router": "train"}, {"attention": True, "cross_modal": True, "connectors": True}]
)
def test_a_healthy_adapter_passes(patient: Patient, groups: dict[str, Any]) -> None:
    finding = found_by(adapt_groups(patient, **groups), adapters)["adapters"]
    assert finding.verdict == "ok", finding.explanation


def test_an_untrained_adapter_is_a_warning(patient: Patient) -> None:
    untrained = adapt(patient, lora_config(patient.model, dense=True, verbose=False))
    finding = found_by(untrained, adapters)["adapters"]
    assert finding.verdict == "warning"
    assert finding.explanation.endswith("it changes nothing as it stands")


def test_a_target_that_exists_but_is_never_called_is_found(patient: Patient) -> None:
    # torch's MultiheadAttention reads the weight of its output projection and never calls it.
    config = LoraConfig(target_modules=["ffn1.sequential.1", "self_attn.out_proj"], init_lora_weights=False)
    adapted = adapt(patient, config)
    found = failing(adapted, adapters, batch_mates, cache)
    assert found == {"adapters": "model.audio_tower.encoder.layers.0.self_attn.out_proj gets no gradient"}


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"target_modules": [f"{ATTENTION}.q_proj", "querry_proj"]}, "querry_proj"),
        ({"target_parameters": ["banks.text.experts.down_proj", "banks.txt.experts.down_proj"]}, "banks.txt"),
        ({"target_modules": [f"{ATTENTION}.q_proj"], "modules_to_save": ["bank_gat"]}, "bank_gat"),
    ],
)
def test_a_name_that_matches_nothing_is_found(patient: Patient, options: dict[str, Any], name: str) -> None:
    adapted = adapt(patient, LoraConfig(init_lora_weights=False, **options))
    found = failing(adapted, adapters)["adapters"]
    assert name in found and found.endswith("matches nothing")


def test_a_bank_that_no_answer_reaches_is_a_warning(tokenizer: PreTrainedTokenizerFast) -> None:
    adapted = adapt_groups(make_patient(tokenizer, expert_banks="uniform"), banks={"image": [1, 2]})
    finding = found_by(adapted, adapters)["adapters"]
    assert finding.verdict == "warning"
    assert finding.explanation.endswith("do not reach model.language_model.layers.2.mlp.banks.image.experts")


@pytest.fixture
def saved(patient: Patient, tmp_path: Path) -> Path:
    patient.model.save_pretrained(tmp_path / "base")
    adapt_groups(patient, dense=True).model.save_pretrained(tmp_path / "adapter")
    return tmp_path


def load(folder: Path, patient: Patient) -> Patient:
    base = type(patient.base).from_pretrained(folder / "base")
    model = PeftModel.from_pretrained(base, folder / "adapter").eval()
    return Patient(model, patient.processor, str(folder / "adapter"))


def test_an_adapter_as_it_was_saved_passes(saved: Path, patient: Patient) -> None:
    assert failing(load(saved, patient), adapters) == {}


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
def test_an_adapter_whose_tensors_did_not_load_is_found(saved: Path, patient: Patient) -> None:
    state = load_file(saved / "adapter" / WEIGHTS)
    (saved / "adapter" / WEIGHTS).unlink()
    moved = {name.replace("layers.0", "layers.9"): tensor for name, tensor in state.items()}
    save_file(moved, saved / "adapter" / WEIGHTS, metadata={"format": "pt"})
    found = failing(load(saved, patient), adapters)["adapters"]
    assert "layers.0.mlp.down_proj.lora_A.weight is not in the adapter's file" in found
    assert "of the adapter's file is not in the model" in found or "and 7 more" in found


def test_an_adapter_that_merges_into_something_else_is_found(patient: Patient, monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = adapt_groups(patient, attention=True)
    delta = Linear.get_delta_weight
    monkeypatch.setattr(Linear, "get_delta_weight", lambda self, adapter: 2 * delta(self, adapter))
    assert "merged and unmerged" in failing(adapted, adapters)["adapters"]


def test_an_adapter_whose_output_is_dropped_is_found(patient: Patient) -> None:
    adapted = adapt_groups(patient, attention=[0])
    adapted.decoder.layers[0].self_attn.register_forward_hook(
        lambda module, inputs, output: (torch.zeros_like(output[0]), *output[1:])
    )
    assert "layers.0.self_attn.q_proj gets no gradient" in failing(adapted, adapters)["adapters"]
