"""A checkpoint that does not fit is refused by name; one that fits below another head or an adapter is loaded."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForMultimodalLM, AutoModelForSequenceClassification

from chorus_moe import (
    ChorusAudioModel,
    ChorusForConditionalGeneration,
    ChorusForContrastive,
    ChorusForSequenceClassification,
    ChorusModel,
)
from chorus_moe.modeling.modeling_base import MAX_NAMES, CheckpointError
from tests.conftest import tiny_config

EXPERTS = "model.language_model.layers.1.mlp.banks.image.experts.gate_up_proj"
# One tensor of each part of a generation model.
TENSORS = [
    EXPERTS,
    "model.language_model.embed_tokens.weight",
    "model.language_model.layers.1.mlp.bank_gate.weight",
    "model.vision_tower.timm_model.patch_embed.proj.weight",
    "model.audio_connector.projector.up_proj.weight",
    "lm_head.weight",
]
HEADS = [ChorusModel, ChorusForConditionalGeneration, ChorusForSequenceClassification, ChorusForContrastive]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    ChorusForConditionalGeneration(tiny_config()).save_pretrained(tmp_path)
    return tmp_path


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Damage the weights of a saved model."""
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("name", TENSORS)
def test_a_missing_tensor_is_refused_by_name(folder: Path, name: str) -> None:
    rewrite(folder, lambda state: state.pop(name))
    with pytest.raises(CheckpointError, match=rf"does not fit \w+: 1 missing tensor: {re.escape(name)}\. "):
        AutoModelForMultimodalLM.from_pretrained(folder)


@pytest.mark.parametrize("name", ["model.language_model.layers.7.mlp.up_proj.weight", "model.extra", "head.weight"])
def test_an_unexpected_tensor_is_refused_by_name(folder: Path, name: str) -> None:
    rewrite(folder, lambda state: state.update({name: torch.zeros(2)}))
    with pytest.raises(CheckpointError, match=f"1 unexpected tensor: {re.escape(name)}"):
        AutoModelForMultimodalLM.from_pretrained(folder)


def test_a_tensor_of_another_shape_is_refused_with_both_shapes(folder: Path) -> None:
    rewrite(folder, lambda state: state.update({EXPERTS: torch.zeros(4, 62, 64)}))
    shapes = re.escape(f"1 mismatched tensor: {EXPERTS} (4, 62, 64), expected (4, 64, 64)")
    with pytest.raises(CheckpointError, match=shapes):
        AutoModelForMultimodalLM.from_pretrained(folder)


def test_a_mismatch_that_the_caller_ignores_starts_anew(folder: Path) -> None:
    rewrite(folder, lambda state: state.update({EXPERTS: torch.zeros(4, 62, 64)}))
    loaded = AutoModelForMultimodalLM.from_pretrained(folder, ignore_mismatched_sizes=True)
    assert loaded.get_parameter(EXPERTS).std() > 0


def test_a_missing_tensor_is_refused_also_when_mismatches_are_ignored(folder: Path) -> None:
    rewrite(folder, lambda state: state.pop(EXPERTS))
    with pytest.raises(CheckpointError, match="missing"):
        AutoModelForMultimodalLM.from_pretrained(folder, ignore_mismatched_sizes=True)


EXIT, GATE = "exits.0.norm.weight", "model.language_model.layers.1.skip_gate.bias"


@pytest.mark.parametrize(
    ("lost", "advice"),
    [
        ([EXIT], r"Load it with its own configuration and call add_exits\. Pass"),
        ([GATE], r"Load it with its own configuration and call add_skip_gates\. Pass"),
        ([EXIT, GATE], r"Load it with its own configuration and call add_exits and add_skip_gates\. Pass"),
        ([EXIT, GATE, EXPERTS], rf"{re.escape(EXPERTS)}, {re.escape(GATE)}\. Pass output_loading_info"),
    ],
)
def test_a_checkpoint_that_lacks_only_exits_or_gates_is_told_of_the_operations(
    tmp_path: Path, lost: list[str], advice: str
) -> None:
    config = tiny_config(exit_layers=[1], skip_budget=0.3)
    ChorusForSequenceClassification(config).save_pretrained(tmp_path)
    rewrite(tmp_path, lambda state: [state.pop(name) for name in lost])
    with pytest.raises(CheckpointError, match=advice):
        ChorusForSequenceClassification.from_pretrained(tmp_path)


def test_many_faults_are_counted_and_the_first_named(folder: Path) -> None:
    rewrite(folder, lambda state: [state.pop(name) for name in list(state) if ".banks.image.experts." in name])
    with pytest.raises(CheckpointError, match=r"4 missing tensors: model\.language_model.*down_proj, "):
        AutoModelForMultimodalLM.from_pretrained(folder)
    rewrite(folder, lambda state: [state.pop(name) for name in list(state) if ".banks." in name])
    with pytest.raises(CheckpointError, match=rf"24 missing tensors: (.+, ){{{MAX_NAMES}}}and {24 - MAX_NAMES} more"):
        AutoModelForMultimodalLM.from_pretrained(folder)


def test_a_caller_who_asks_for_the_report_gets_the_model(folder: Path) -> None:
    rewrite(folder, lambda state: state.pop(EXPERTS))
    loaded, info = AutoModelForMultimodalLM.from_pretrained(folder, output_loading_info=True)
    assert set(info["missing_keys"]) == {EXPERTS}
    assert loaded.get_parameter(EXPERTS).std() > 0


def test_a_state_dict_in_memory_is_checked_and_an_empty_one_asks_for_new_weights() -> None:
    config = tiny_config()
    state = ChorusModel(config).state_dict()
    del state["language_model.norm.weight"]
    with pytest.raises(CheckpointError, match=r"the state dict does not fit .*: language_model\.norm\.weight"):
        ChorusModel.from_pretrained(None, config=config, state_dict=state)
    assert ChorusModel.from_pretrained(None, config=config, state_dict={}).language_model.norm.weight.eq(1).all()


@pytest.mark.parametrize("target", HEADS)
@pytest.mark.parametrize("source", HEADS)
def test_every_head_opens_the_checkpoint_of_every_other(tmp_path: Path, source: type, target: type) -> None:
    saved = source(tiny_config())
    saved.save_pretrained(tmp_path)
    loaded = target.from_pretrained(tmp_path)
    for name, tensor in saved.base_model.state_dict().items():
        assert torch.equal(tensor, loaded.base_model.state_dict()[name]), name


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForSequenceClassification])
def test_another_head_is_refused_a_base_model_with_a_hole(folder: Path, auto: type) -> None:
    rewrite(folder, lambda state: state.pop(EXPERTS))
    with pytest.raises(CheckpointError, match=r"1 missing tensor: \S*layers\.1\.mlp\.banks\.image\.experts"):
        auto.from_pretrained(folder)


def test_a_bare_model_is_refused_a_checkpoint_with_another_tower(folder: Path) -> None:
    config = tiny_config()
    config.vision_config = config.image_token_id = None
    with pytest.raises(CheckpointError, match=r"unexpected tensors: \S*vision_connector"):
        ChorusModel.from_pretrained(folder, config=config)


def test_an_encoder_of_its_own_is_checked(tmp_path: Path) -> None:
    encoder = ChorusAudioModel(tiny_config().audio_config)
    encoder.save_pretrained(tmp_path)
    AutoModel.from_pretrained(tmp_path)
    name = next(iter(encoder.state_dict()))
    rewrite(tmp_path, lambda state: state.pop(name))
    with pytest.raises(CheckpointError, match=re.escape(name)):
        AutoModel.from_pretrained(tmp_path)


def test_tied_embeddings_may_be_saved_once(tmp_path: Path) -> None:
    config = tiny_config(tie_word_embeddings=True)
    config.tie_word_embeddings = True
    ChorusForConditionalGeneration(config).save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = AutoModelForMultimodalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    rewrite(tmp_path, lambda state: state.pop("model.language_model.embed_tokens.weight"))
    with pytest.raises(CheckpointError, match="embed_tokens"):
        AutoModelForMultimodalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("options", [{"device_map": "cpu"}, {"dtype": torch.bfloat16}, {"low_cpu_mem_usage": True}])
def test_a_map_of_devices_and_a_type_of_number_change_nothing(folder: Path, options: dict) -> None:
    AutoModelForMultimodalLM.from_pretrained(folder, **options)
    rewrite(folder, lambda state: state.pop(EXPERTS))
    with pytest.raises(CheckpointError, match=re.escape(EXPERTS)):
        AutoModelForMultimodalLM.from_pretrained(folder, **options)


def test_an_adapter_is_loaded_and_the_model_below_it_is_checked(folder: Path, tmp_path: Path) -> None:
    base = AutoModelForMultimodalLM.from_pretrained(folder)
    adapter = LoraConfig(target_modules=["q_proj"], target_parameters=["banks.image.experts.gate_up_proj"])
    get_peft_model(base, adapter).save_pretrained(tmp_path / "adapter")
    AutoModelForMultimodalLM.from_pretrained(tmp_path / "adapter")
    PeftModel.from_pretrained(AutoModelForMultimodalLM.from_pretrained(folder), tmp_path / "adapter")
    rewrite(folder, lambda state: state.pop(EXPERTS))
    with pytest.raises(CheckpointError, match=re.escape(EXPERTS)):
        AutoModelForMultimodalLM.from_pretrained(tmp_path / "adapter")
