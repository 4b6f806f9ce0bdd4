"""Dead media, silent routers and slow functions are found, each by its own check."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from chorus_moe import ChorusConfig, ChorusForConditionalGeneration
from chorus_moe.modeling import modeling_heads as modeling_head
from chorus_moe.modeling.modeling_base import ChorusPreTrainedModel
from chorus_moe.modeling.moe_banks import ChorusExperts
from chorus_moe.surgery.processor import processor_from_config
from chorus_moe.training.doctor.inputs import Patient
from chorus_moe.training.doctor.parity import batch_mates
from chorus_moe.training.doctor.signals import fast_paths, gradients, modalities
from tests.conftest import tiny_config
from tests.training.conftest import failing, found_by, make_patient


def without_input(module: nn.Module) -> None:
    """Make a module's output the same whatever comes in."""
    module.register_forward_hook(lambda module, inputs, output: torch.zeros_like(output))


@pytest.mark.parametrize(
    ("path", "modality", "part"),
    [
        ("vision_connector.projector.up_proj", "image", "vision_connector gives the same tokens"),
        ("audio_connector.projector.down_proj", "audio", "audio_connector gives the same tokens"),
        ("vision_tower.timm_model.norm", "image", "vision_tower gives the same output"),
        ("audio_tower.encoder.layers.0.final_layer_norm", "audio", "audio_tower gives the same output"),
    ],
)
def test_a_dead_part_between_medium_and_word_is_named(patient: Patient, path: str, modality: str, part: str) -> None:
    without_input(patient.base.model.get_submodule(path))
    found = failing(patient, modalities, batch_mates)
    assert found.keys() == {"modalities"}
    assert f"another {modality} changes nothing: {part}" in found["modalities"]


def test_a_decoder_that_does_not_read_a_medium_is_named(patient: Patient, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = patient.base.model
    embed, merge = inner.get_input_embeddings(), inner._merge

    def forget(embeds: Any, input_ids: Any, modality_BS: Any, features: Any) -> Any:
        merge(embeds, input_ids, modality_BS, features)
        return embed(inner._text_ids(input_ids))

    monkeypatch.setattr(inner, "_merge", forget)
    assert "another image changes nothing: the decoder does not read" in failing(patient, modalities)["modalities"]


@pytest.mark.parametrize("kind", ["k_proj", "v_proj"])
def test_a_cross_modal_layer_that_drops_a_modality_is_named(patient: Patient, kind: str) -> None:
    without_input(getattr(patient.decoder.layers[2].self_attn, kind)["image"])
    found = failing(patient, modalities)["modalities"]
    assert found == f"the words do not read layer 2, {kind}.image of cross-modal attention"


def test_a_router_outside_the_graph_is_named(patient: Patient, monkeypatch: pytest.MonkeyPatch) -> None:
    router = patient.decoder.layers[1].mlp.banks["common"].router
    score = router.score
    monkeypatch.setattr(router, "score", lambda states: score(states).detach())
    found = failing(patient, gradients, modalities, batch_mates)
    assert found == {"gradients": "no gradient: layer 1 common router"}


def test_experts_outside_the_graph_are_named(patient: Patient) -> None:
    experts = patient.decoder.layers[2].mlp.banks["text"].experts
    experts.register_forward_hook(lambda module, inputs, output: output.detach())
    assert "no gradient: layer 2 text experts" in failing(patient, gradients)["gradients"]


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_balance_loss_that_is_not_there_is_found(
    patient: Patient, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    monkeypatch.setattr(modeling_head, "balance_loss", lambda *args: torch.tensor(value))
    assert failing(patient, gradients)["gradients"] == f"aux_loss is {value} in training"


@pytest.mark.parametrize("value", [0.0, float("inf")])
def test_a_z_loss_is_looked_for_where_it_is_asked_for(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    monkeypatch.setattr(modeling_head, "z_loss", lambda *args: torch.tensor(value))
    asked = make_patient(tokenizer, router_z_loss_coef=1e-3)
    assert failing(asked, gradients)["gradients"] == f"z_loss is {value} in training"
    assert not failing(make_patient(tokenizer, router_z_loss_coef=0.0), gradients)


def test_media_banks_of_the_last_layer_are_a_warning(tokenizer: PreTrainedTokenizerFast) -> None:
    finding = found_by(make_patient(tokenizer, expert_banks="uniform"), gradients)["gradients"]
    assert finding.verdict == "warning"
    assert "do not reach: layer 2 audio router, layer 2 audio experts, layer 2 image router" in finding.explanation
    assert "give these banks `layers` without it" in finding.cure


def test_banks_without_a_tower_are_a_warning(tokenizer: PreTrainedTokenizerFast) -> None:
    text = tiny_config(vocab_size=len(tokenizer)).text_config
    model = ChorusForConditionalGeneration(ChorusConfig(text_config=text.to_dict())).eval()
    patient = Patient(model, processor_from_config(model.config, tokenizer))
    found = found_by(patient, gradients, modalities)
    assert found["gradients"].verdict == "warning"
    assert "no tower of this model makes tokens for: layer 1 audio router" in found["gradients"].explanation
    assert found["modalities"].verdict == "skipped"


@pytest.mark.parametrize(("coefficient", "verdict"), [(0.01, "warning"), (0.0, "failed")])
def test_a_router_that_only_the_balance_loss_trains_is_no_failure_while_there_is_one(
    tokenizer: PreTrainedTokenizerFast, coefficient: float, verdict: str
) -> None:
    patient = make_patient(tokenizer, num_experts_per_tok=1, router_aux_loss_coef=coefficient)
    assert found_by(patient, gradients)["gradients"].verdict == verdict


def test_experts_that_run_eager_whatever_was_asked_for_are_found(
    patient: Patient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ChorusExperts, "forward", ChorusExperts.forward.__wrapped__)
    found = failing(patient, fast_paths, batch_mates)
    assert found.keys() == {"fast-paths"}
    assert "banks.common.experts ran eager, the configuration says cpu_mm" in found["fast-paths"]


def test_experts_that_transformers_does_not_find_are_found(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ChorusPreTrainedModel, "_can_set_experts_implementation", classmethod(lambda cls: False))
    monkeypatch.setattr(ChorusPreTrainedModel, "get_correct_experts_implementation", lambda *args: "eager")
    found = failing(make_patient(tokenizer), fast_paths)["fast-paths"]
    assert "ran eager, the configuration says eager" in found


def test_attention_that_runs_another_function_is_found(patient: Patient, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = patient.decoder.layers[0].self_attn
    slow.config = type(slow.config).from_dict(slow.config.to_dict())
    slow.config._attn_implementation = "eager"
    assert failing(patient, fast_paths)["fast-paths"] == "layers.0.self_attn ran eager, the configuration says sdpa"


@pytest.mark.parametrize(
    ("setter", "name", "text"),
    [
        ("set_attn_implementation", "eager", "layers.0.self_attn ran eager attention"),
        ("set_experts_implementation", "grouped_mm", "experts ran grouped_mm on the CPU"),
    ],
)
def test_a_slower_function_that_was_asked_for_is_a_warning(patient: Patient, setter: str, name: str, text: str) -> None:
    getattr(patient.decoder, setter)(name)
    finding = found_by(patient, fast_paths)["fast-paths"]
    assert finding.verdict == "warning"
    assert text in finding.explanation
