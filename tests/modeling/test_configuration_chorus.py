"""What no model could be built from is refused before anything is allocated; what is saved is what is loaded."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import AutoConfig

from chorus_moe import (
    ChorusAudioConfig,
    ChorusConfig,
    ChorusForConditionalGeneration,
    ChorusTextConfig,
    ChorusVisionConfig,
)
from chorus_moe.modeling.configuration_services import SERVICES
from chorus_moe.surgery.vision_probe import probe_vision
from tests.conftest import tiny_config

TEXT = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
AUDIO: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hop_lenght": 10}, "unknown key 'hop_lenght'; did you mean 'hop_length'"),
        ({"hidden_size": 33}, "hidden_size=33 is not a multiple of num_attention_heads=2"),
        ({"subsampling": 3}, "subsampling=3 must be a power of two"),
        ({"conv_kernel_size": 30}, "conv_kernel_size=30 must be odd"),
        ({"max_seconds": 0.0}, "max_seconds=0.0 is outside 1e-06..86400"),
        ({"num_mel_bins": 10**9}, "num_mel_bins=1000000000 is outside"),
    ],
)
def test_an_audio_tower_that_cannot_be_built_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message):
        ChorusAudioConfig(**AUDIO | values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"arhitecture": "vit"}, "unknown key 'arhitecture'; did you mean 'architecture'"),
        ({"architecture": "vit_tiny_patch16_225"}, "did you mean vit_tiny_patch16_224"),
        ({"architecture": "hf-hub:someone/model"}, "is not a plain timm name"),
        ({"image_size": 10**9}, "image_size=1000000000 is outside"),
        ({"model_args": {"pretrained": True}}, "model_args may not hold 'pretrained'"),
    ],
)
def test_a_vision_tower_that_cannot_be_built_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message):
        ChorusVisionConfig(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"imagetoken_id": 3}, "unknown key 'imagetoken_id'; did you mean 'image_token_id'"),
        ({"image_token_id": 128}, "image_token_id=128 is outside the vocabulary of 128 tokens"),
        ({"image_token_id": 4}, "image_token_id and audio_token_id are both 4"),
        ({"audio_token_id": None}, "audio_token_id is None but the model has a tower for audio"),
        ({"projection_dim": 0}, "projection_dim=0 is outside"),
    ],
)
def test_a_model_that_cannot_be_built_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message):
        ChorusConfig(**tiny_config().to_dict() | values)


def test_a_configuration_survives_saving_exactly(tmp_path: Path) -> None:
    config = tiny_config(expert_banks={"text": {"layers": [1]}, "common": {"norm_topk_prob": False}})
    config.save_pretrained(tmp_path)
    loaded = ChorusConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/config.json").read_text() == (tmp_path / "config.json").read_text()


def test_sub_configurations_are_objects_after_loading(tmp_path: Path) -> None:
    tiny_config().save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    kinds = [type(part) for part in (loaded.text_config, loaded.vision_config, loaded.audio_config)]
    assert kinds == [ChorusTextConfig, ChorusVisionConfig, ChorusAudioConfig]


def test_the_probe_is_saved_and_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config()
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["vision_config"]
    assert (saved["hidden_size"], saved["grid_size"], saved["num_tokens"]) == (32, [4, 4], 16)
    probed = []

    def spy(config: ChorusVisionConfig) -> Any:
        probed.append(config.model_args)
        return probe_vision(config)

    monkeypatch.setitem(SERVICES, "probe_vision", spy)
    assert ChorusConfig.from_pretrained(tmp_path).vision_config.num_image_tokens == 4
    assert config.vision_config.model_args not in probed


def test_a_model_may_leave_a_modality_out(tmp_path: Path) -> None:
    config = ChorusConfig(text_config=TEXT)
    config.save_pretrained(tmp_path)
    loaded = ChorusConfig.from_pretrained(tmp_path)
    assert loaded.modalities == ["text"]
    assert loaded.vision_config is None
    assert loaded.audio_config is None


def test_audio_tokens_round_up() -> None:
    config = ChorusAudioConfig(**AUDIO, subsampling=4, pool_size=2)
    assert [config.num_audio_tokens(frames) for frames in (1, 8, 9, 16)] == [1, 1, 2, 2]


def test_image_tokens_are_counted_after_pooling() -> None:
    config = tiny_config().vision_config
    assert (config.num_tokens, config.pool_size, config.num_image_tokens) == (16, 2, 4)


def test_a_tied_head_is_tied_wherever_it_is_asked_for(tmp_path: Path) -> None:
    values = tiny_config(tie_word_embeddings=True)
    model = ChorusForConditionalGeneration(values)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    loaded = ChorusForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    # A checkpoint from before the field was read holds two tables, and both are loaded.
    untied = ChorusForConditionalGeneration(tiny_config())
    untied.config.text_config.tie_word_embeddings = True
    untied.save_pretrained(tmp_path / "old")
    old = ChorusForConditionalGeneration.from_pretrained(tmp_path / "old")
    assert torch.equal(old.lm_head.weight, untied.lm_head.weight)
    assert not torch.equal(old.lm_head.weight, old.get_input_embeddings().weight)


@pytest.mark.parametrize("part", ["text_config", "vision_config", "audio_config", None])
def test_labels_without_end_are_refused_in_every_part(part: str | None) -> None:
    """A `config.json` of some bytes would fill the memory with names."""
    values = tiny_config().to_dict()
    (values if part is None else values[part])["num_labels"] = 10**9
    with pytest.raises(ValueError, match="num_labels=1000000000 is outside"):
        ChorusConfig(**values)


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("text_config", "rms_norm_eps", float("nan")),
        ("text_config", "router_aux_loss_coef", -float("inf")),
        ("vision_config", "initializer_range", float("nan")),
        ("vision_config", "model_args", {"drop_rate": float("nan")}),
        ("audio_config", "max_seconds", float("nan")),
        ("audio_config", "dropout", float("inf")),
    ],
)
def test_numbers_that_are_none_are_refused_in_every_part(part: str, key: str, value: Any) -> None:
    values = tiny_config().to_dict()
    values[part][key] = value
    with pytest.raises(ValueError, match=rf"{key}.*=(nan|-?inf) is not a finite number"):
        ChorusConfig(**values)


@pytest.mark.parametrize(("key", "value"), [("num_tokens", 10**12), ("hidden_size", 10**9), ("num_tokens", 0)])
def test_a_saved_probe_has_limits(key: str, value: int) -> None:
    values = tiny_config().to_dict()
    values["vision_config"][key] = value
    with pytest.raises(ValueError, match=rf"{key}={value} is outside 1"):
        ChorusConfig(**values)


def test_a_whole_number_is_a_coefficient_and_true_is_none(tmp_path: Path) -> None:
    """Of every number that need not be whole: as written in JSON or YAML, where `1` is no float."""
    parts = {ChorusTextConfig: TEXT, ChorusVisionConfig: {}, ChorusAudioConfig: AUDIO, ChorusConfig: {}}
    numbers = [(kind, item.name) for kind in parts for item in fields(kind) if "float" in str(item.type)]
    own = {(ChorusTextConfig, "exit_loss_coef"): {"exit_layers": [1]}}
    own[ChorusConfig, "exit_thresholds"] = {"text_config": TEXT | {"exit_layers": [1]}}
    assert len(numbers) >= 13
    for kind, name in numbers:
        several = {"exit_thresholds": [], "expert_width_shares": [0.5]}.get(name)
        for value in (1, 1.0):
            given = value if several is None else [*several, value]
            config = kind(**parts[kind] | own.get((kind, name), {}) | {name: given})
            config.save_pretrained(tmp_path)
            assert getattr(kind.from_pretrained(tmp_path), name) == given, name
        with pytest.raises(StrictDataclassFieldValidationError, match=name):
            kind(**parts[kind] | {name: True if several is None else [*several, True]})
