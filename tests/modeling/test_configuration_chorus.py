"""What no model could be built from is refused before anything is allocated; what is saved is what is loaded."""

import json
import time
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
BANK: dict[str, Any] = {"num_experts": 4}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hiden_size": 64}, "unknown key 'hiden_size'; did you mean 'hidden_size'"),
        ({"expert_bank": {}}, "unknown key 'expert_bank'; did you mean 'expert_banks'"),
        ({"hidden_size": 65}, "hidden_size=65 is not a multiple of num_attention_heads=4"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 is not a multiple of num_key_value_heads=3"),
        ({"head_dim": 15}, "even rotary dimension, but got `head_dim`=15"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0 is outside"),
        ({"num_attention_heads": 0}, "num_attention_heads=0 is outside"),
        ({"num_key_value_heads": 0}, "num_key_value_heads=0 is outside"),
        ({"router_aux_loss_coef": -0.1}, "router_aux_loss_coef=-0.1 is outside 0..inf"),
        ({"layer_types": ["full_attention"]}, r"num_hidden_layers` \(3\) must be equal to .* `layer_types` \(1\)"),
        ({"mlp_layer_types": ["dense"] * 4}, r"num_hidden_layers` \(3\) must be equal to .* `mlp_layer_types` \(4\)"),
        ({"mlp_layer_types": ["dense", "moe", "dense"]}, "mlp_layer_types` entries must be in .* got .*'moe'"),
        ({"layer_types": ["chunked_attention"] * 3}, "unknown layer_types 'chunked_attention'"),
        ({"layer_types": ["sliding_attention"] * 3}, "sliding_window is None"),
        ({"qk_norm_scope": "heads"}, "unknown qk_norm_scope 'heads'; did you mean 'head'"),
        ({"norm_placement": "posts"}, "unknown norm_placement 'posts'; did you mean 'post'"),
        ({"no_rope_layers": [1, 0]}, "no_rope_layers has 2 entries for num_hidden_layers=3"),
        ({"sliding_window": 0}, "sliding_window=0 is outside 1"),
        ({"num_global_tokens": 4}, "num_global_tokens=4 serve windows, but no layer"),
        ({"num_global_tokens": -1}, "num_global_tokens=-1 is outside 0"),
        ({"chunk_size_feed_forward": -8}, "chunk_size_feed_forward=-8 is outside 0"),
        ({"exit_layers": [3]}, r"exit_layers=3 is outside 1\.\.2 of 3 layers"),
        ({"exit_layers": [0]}, r"exit_layers=0 is outside 1\.\.2"),
        ({"exit_loss_coef": 1.0}, "exit_loss_coef=1.0 without exit_layers"),
        ({"exit_layers": [1], "exit_loss_coef": -1.0}, "exit_loss_coef=-1.0 is outside 0..inf"),
        ({"skip_budget": 1.5}, r"skip_budget=1.5 is outside 0\.\.1"),
        ({"skip_budget": -0.1}, r"skip_budget=-0.1 is outside 0\.\.1"),
        ({"skip_layers": [1]}, r"skip_layers=\[1\] without a skip_budget"),
        ({"skip_budget": 0.3, "skip_layers": []}, "skip_budget=0.3 without any layer to skip"),
        ({"skip_budget": 0.3, "skip_layers": [3]}, "skip_layers names layer 3 of 3"),
        ({"cross_modal_layers": [3]}, "cross_modal_layers names layer 3 of 3"),
        ({"expert_banks": {"text": {"layers": [1]}}}, "sparse layer 2 holds no expert bank"),
        ({"expert_banks": {"image": {"modality": ["image"]}}}, "unknown key 'modality'; did you mean 'modalities'"),
        ({"expert_banks": {"x": {"modalities": ["smell"]}}}, "expert bank 'x': unknown modality 'smell'"),
        ({"expert_banks": {"x": {"modalities": []}}}, "`modalities` is empty"),
        ({"expert_banks": {"x": {"modalities": ["text", "text"]}}}, "names one twice"),
        ({"expert_banks": {"x": BANK | {"num_experts_per_tok": 5}}}, "num_experts_per_tok=5 must be .* num_experts=4"),
        ({"expert_banks": {"x": {"num_experts_per_tok": 0}}}, "num_experts_per_tok=0 must be between 1"),
        ({"expert_banks": {"x": {"router": "hash"}}}, "unknown router 'hash'"),
        ({"expert_banks": {"x": {"layers": [0]}}}, r"layer 0 is not a sparse layer; the sparse layers are \[1, 2\]"),
        ({"expert_banks": {"x.y": {}}}, "must be a Python identifier"),
        ({"expert_banks": {"x": {"intermediate_size": 0}}}, "intermediate_size=0 is outside 1"),
        ({"expert_banks": {f"bank{i}": {} for i in range(1_025)}}, "1025 expert_banks, at most 1024"),
        ({"num_labels": 10**9}, r"num_labels=1000000000 is outside 1\.\.1048576"),
        ({"num_labels": 0}, "num_labels=0 is outside 1"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan is not a finite number"),
        ({"router_aux_loss_coef": float("nan")}, "router_aux_loss_coef=nan is not a finite number"),
        ({"initializer_range": float("inf")}, "initializer_range=inf is not a finite number"),
        ({"rope_parameters": {"rope_theta": float("nan")}}, r"rope_parameters\['rope_theta'\]=nan is not a finite"),
    ],
)
def test_a_decoder_that_cannot_be_built_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message):
        ChorusTextConfig(**TEXT | values)


@pytest.mark.parametrize(
    "name",
    [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "moe_intermediate_size",
        "shared_expert_intermediate_size",
        "num_experts",
    ],
)
def test_absurd_sizes_are_refused_at_once(name: str) -> None:
    start = time.monotonic()
    with pytest.raises(Exception, match=f"{name.removeprefix('moe_')}.*={10**9}"):
        ChorusTextConfig(**TEXT | {name: 10**9})
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("name", ["num_experts", "intermediate_size"])
def test_absurd_sizes_of_a_bank_are_refused(name: str) -> None:
    with pytest.raises(Exception, match=f"expert bank 'x': {name}={10**9}"):
        ChorusTextConfig(**TEXT, expert_banks={"x": {name: 10**9}})


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


def test_default_banks_are_one_a_modality_and_one_for_all() -> None:
    banks = {bank.name: bank for bank in ChorusTextConfig(**TEXT).banks}
    assert {name: bank.modalities for name, bank in banks.items() if name != "common"} == {
        "text": ["text"],
        "image": ["image"],
        "audio": ["audio"],
    }
    assert banks["common"].modalities == ["text", "image", "audio"]


def test_the_order_in_which_banks_are_given_changes_nothing() -> None:
    # A config.json is written with sorted keys, and the gate has one column a bank.
    first = ChorusTextConfig(**TEXT, expert_banks={"text": {}, "image": {}, "common": {}})
    second = ChorusTextConfig(**TEXT, expert_banks={"common": {}, "image": {}, "text": {}})
    assert [bank.name for bank in first.banks] == [bank.name for bank in second.banks]


def test_sizes_that_a_bank_leaves_out_come_from_the_decoder() -> None:
    config = ChorusTextConfig(**TEXT, num_experts=6, expert_banks={"text": {"num_experts": 2}, "common": {}})
    assert {bank.name: bank.num_experts for bank in config.banks} == {"common": 6, "text": 2}


def test_cross_modal_layers_are_the_full_attention_ones_of_a_sliding_model() -> None:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    assert ChorusTextConfig(**TEXT, layer_types=kinds, sliding_window=8).cross_modal_layers == [1]
    assert ChorusTextConfig(**TEXT).cross_modal_layers == [2]


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
