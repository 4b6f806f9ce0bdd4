"""Lost numbers, a processor of another model, copies that differ and exports that do not load are found."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import PreTrainedTokenizerFast

from chorus_moe.modeling.modeling_base import ChorusPreTrainedModel
from chorus_moe.modeling.moe_banks import BankGate
from chorus_moe.training import hub
from chorus_moe.training.doctor.files import batch_padding, chat_template, hub_export, processor, reload, tensors
from chorus_moe.training.doctor.inputs import Patient
from chorus_moe.training.doctor.parity import batch_mates, padding_side
from chorus_moe.training.lora import lora_config
from tests.training.conftest import failing, found_by, make_patient


def test_a_nan_is_found_and_named(patient: Patient) -> None:
    patient.decoder.layers[1].mlp.banks["text"].experts.down_proj.data[3, 0, 0] = torch.nan
    name = "model.language_model.layers.1.mlp.banks.text.experts.down_proj"
    assert failing(patient, tensors, processor) == {"tensors": f"{name} holds NaN or infinity"}


@pytest.mark.parametrize(("module", "buffer"), [("layers.1.mlp.bank_gate", "is_open"), ("rotary_emb", "inv_freq")])
def test_a_wrong_buffer_is_found_and_named(patient: Patient, module: str, buffer: str) -> None:
    found = getattr(patient.decoder.get_submodule(module), buffer)
    found.copy_(~found if found.dtype == torch.bool else found * 2)
    assert failing(patient, tensors)["tensors"] == f"buffer {module}.{buffer} is not what the configuration gives"


def test_a_weight_of_zeros_is_a_warning(patient: Patient) -> None:
    nn.init.zeros_(patient.decoder.layers[0].self_attn.o_proj.weight)
    finding = found_by(patient, tensors)["tensors"]
    assert finding.verdict == "warning"
    assert "layers.0.self_attn.o_proj.weight is zero all over" in finding.explanation


@pytest.mark.parametrize(
    ("part", "name", "value", "text"),
    [
        ("feature_extractor", "sampling_rate", 8_000, "sampling_rate: processor 8000, model 16000"),
        ("feature_extractor", "hop_length", 80, "hop_length: processor 80, model 160"),
        ("image_processor", "size", {"height": 24, "width": 24}, r"image size: processor (24, 24), model (32, 32)"),
        ("processor", "num_image_tokens", 3, "tokens of an image: processor 3, model 4"),
        ("processor", "frames_per_token", None, "takes audio: processor False, model True"),
        ("processor", "audio_token_id", 7, "audio_token_id: processor 7, model 4"),
    ],
)
def test_a_processor_of_another_model_is_found(patient: Patient, part: str, name: str, value: Any, text: str) -> None:
    setattr(patient.processor if part == "processor" else getattr(patient.processor, part), name, value)
    found = failing(patient, tensors, processor)
    assert found.keys() == {"processor"}
    assert text in found["processor"]


def test_padding_on_the_right_is_found(patient: Patient) -> None:
    assert not failing(patient, batch_padding)
    patient.processor.tokenizer.padding_side = "right"
    found = failing(patient, batch_padding, batch_mates)
    assert found.keys() == {"batch-padding"}
    assert "the processor pads on the right" in found["batch-padding"]
    assert "its saved copy pads on the right" in found["batch-padding"]


def test_a_side_that_is_lost_on_saving_is_found(patient: Patient) -> None:
    patient.processor.tokenizer.init_kwargs["padding_side"] = "right"
    save = patient.processor.tokenizer.save_pretrained

    def forgetful(*args: Any, **kwargs: Any) -> Any:
        side, patient.processor.tokenizer.padding_side = patient.processor.tokenizer.padding_side, "right"
        files = save(*args, **kwargs)
        patient.processor.tokenizer.padding_side = side
        return files

    patient.processor.tokenizer.save_pretrained = forgetful
    assert failing(patient, batch_padding)["batch-padding"].startswith("its saved copy pads on the right")


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ("{%- generation -%}", "", "not the answer"),
        ("{{- '<image>' -}}", "", "image placeholders for 1 images"),
        ("{{- '<audio>' -}}", "", "audio placeholders for 1 clips"),
    ],
)
def test_a_template_without_marks_or_media_is_found(patient: Patient, old: str, new: str, text: str) -> None:
    assert not failing(patient, chat_template)
    template = patient.processor.chat_template.replace(old, new).replace(old.replace(" gen", " endgen"), new)
    patient.processor.chat_template = template
    assert text in failing(patient, chat_template)["chat-template"]


def test_answers_that_end_where_generation_does_not_are_a_warning(patient: Patient) -> None:
    patient.base.generation_config.eos_token_id = [1]
    finding = found_by(patient, chat_template)["chat-template"]
    assert finding.verdict == "warning"
    assert "answers end with '</s>', generation at [1]" in finding.explanation


def test_tokens_without_an_embedding_are_found(patient: Patient) -> None:
    rows = patient.text_config.vocab_size
    patient.base.resize_token_embeddings(rows - 10)
    text = f"input embeddings have {rows - 10} rows for the {rows} tokens of the tokenizer"
    assert text in failing(patient, processor)["processor"]


def test_a_connector_that_yields_other_tokens_than_placeholders_is_found(patient: Patient) -> None:
    patient.base.model.vision_connector.register_forward_hook(lambda module, inputs, output: output[:, 1:])
    assert "found 4 image placeholders for 3 image tokens" in failing(patient, processor)["processor"]


def test_another_end_of_text_is_a_warning(patient: Patient) -> None:
    patient.base.generation_config.eos_token_id = [9]
    finding = found_by(patient, processor)["processor"]
    assert finding.verdict == "warning"
    assert "generation ends at [9], the tokenizer's end is 2" in finding.explanation


def test_a_buffer_that_loading_does_not_rebuild_is_found(patient: Patient, monkeypatch: pytest.MonkeyPatch) -> None:
    rebuild = ChorusPreTrainedModel._init_weights

    def forget(self: Any, module: nn.Module) -> None:
        if not isinstance(module, BankGate):
            rebuild(self, module)

    monkeypatch.setattr(ChorusPreTrainedModel, "_init_weights", forget)
    found = failing(patient, reload, batch_mates, tensors)
    assert found.keys() == {"reload"}
    assert "layers.1.mlp.bank_gate.is_open differs" in found["reload"]


def test_a_part_that_was_put_in_by_hand_is_found(patient: Patient) -> None:
    patient.decoder.layers[0].extra = nn.Linear(2, 2)
    found = failing(patient, reload, batch_mates)
    assert found.keys() == {"reload"}
    assert "CheckpointError" in found["reload"] and "extra.weight" in found["reload"]


def test_an_output_that_saving_changes_is_found(patient: Patient) -> None:
    scale = 1.5
    patient.decoder.norm.register_forward_hook(lambda module, inputs, output: output * scale)
    assert "the logits differ by" in failing(patient, reload)["reload"]


@pytest.mark.parametrize("is_adapted", [False, True])
def test_a_healthy_model_comes_back_bit_for_bit(tokenizer: PreTrainedTokenizerFast, is_adapted: bool) -> None:
    patient = make_patient(tokenizer)
    if is_adapted:
        chosen = lora_config(patient.model, banks=["common"], router="train", init_lora_weights=False, verbose=False)
        patient = Patient(get_peft_model(patient.model, chosen).eval(), patient.processor)
    finding = found_by(patient, reload)["reload"]
    assert (finding.verdict, finding.measured) == ("ok", 0)


@pytest.mark.slow
def test_an_export_that_lacks_a_file_is_found(patient: Patient, monkeypatch: pytest.MonkeyPatch) -> None:
    copy_code = hub.copy_code

    def forget(folder: Path, processor: Any = None) -> list[Path]:
        files = copy_code(folder, processor)
        (folder / "norms.py").unlink()
        return files

    monkeypatch.setattr(hub, "copy_code", forget)
    found = failing(patient, hub_export, padding_side)
    assert found.keys() == {"hub-export"}
    assert "norms" in found["hub-export"]


@pytest.mark.slow
def test_an_export_with_other_weights_is_found(patient: Patient, monkeypatch: pytest.MonkeyPatch) -> None:
    export = hub.export_for_hub

    def spoil(model: Any, processor: Any, folder: Path) -> Path:
        weight = model.lm_head.weight
        before = weight.detach().clone()
        with torch.no_grad():
            weight.mul_(1.001)
            export(model, processor, folder)
            weight.copy_(before)
        return folder

    monkeypatch.setattr("chorus_moe.training.doctor.files.export_for_hub", spoil)
    finding = found_by(patient, hub_export)["hub-export"]
    assert finding.verdict == "failed"
    assert finding.measured == pytest.approx(1e-3, rel=0.01)
