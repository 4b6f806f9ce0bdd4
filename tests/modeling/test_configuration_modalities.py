"""A model has parts for the modalities of its configuration, and one saved before that rule keeps its tensors."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from chorus_moe import MODALITY_IDS, ChorusConfig, ChorusForConditionalGeneration, ChorusTextConfig
from chorus_moe.modeling.configuration_modalities import ENCODED_MODALITIES
from chorus_moe.modeling.modeling_text import ChorusTextModel
from chorus_moe.surgery.parameters import parameter_report
from tests.conftest import tiny_config

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 8,
}
BANK = {"intermediate_size": 8, "num_experts": 2, "num_experts_per_tok": 1, "router": "softmax", "balance": "switch"}
# What commit 43f942f wrote for `ChorusConfig(text_config=SIZES)`, without the fields that hold their defaults.
SAVED_BEFORE = {
    "audio_config": None,
    "image_token_id": None,
    "model_type": "chorus",
    "text_config": {
        **SIZES,
        "cross_modal_layers": [1],
        "expert_banks": {
            "audio": BANK | {"layers": None, "modalities": ["audio"]},
            "common": BANK | {"layers": None, "modalities": ["text", "image", "audio"]},
            "image": BANK | {"layers": None, "modalities": ["image"]},
            "text": BANK | {"layers": None, "modalities": ["text"]},
        },
        "head_dim": 8,
        "mlp_layer_types": ["dense", "sparse"],
        "model_type": "chorus_text",
        "num_key_value_heads": 2,
    },
    "transformers_version": "5.23.0",
    "vision_config": None,
}
KEYS = {f"{kind}.{name}" for kind in ("k_proj", "v_proj") for name in ("text", "image", "audio")}


def config_with(*modalities: str, **text: Any) -> ChorusConfig:
    """A newly written configuration, which does not say what its decoder takes."""
    whole = tiny_config()
    fields = [
        field for name in modalities for field in (ENCODED_MODALITIES[name].config, ENCODED_MODALITIES[name].token_id)
    ]
    return ChorusConfig(text_config=SIZES | text, **{field: getattr(whole, field) for field in fields})


def projections(model: torch.nn.Module) -> set[str]:
    parts = [name.split(".") for name, _ in model.named_parameters() if "k_proj." in name or "v_proj." in name]
    return {".".join(part[-3:-1]) for part in parts} & KEYS


@pytest.mark.parametrize(
    ("modalities", "preset"),
    [
        ((), "uniform"),
        (("image",), "uniform"),
        (("audio",), "uniform"),
        (("image", "audio"), "uniform"),
        (("image",), "specific_then_common"),
    ],
)
def test_a_new_model_has_parts_for_its_modalities_alone(modalities: tuple[str, ...], preset: str):
    config = config_with(*modalities, expert_banks=preset, num_hidden_layers=3)
    expected = ["text", *modalities]
    assert config.text_config.modalities == config.modalities == expected
    assert sorted(config.text_config.expert_banks) == sorted([*expected, "common"])
    assert config.text_config.expert_banks["common"]["modalities"] == expected
    model = ChorusForConditionalGeneration(config)
    assert projections(model) == {f"{kind}.{name}" for kind in ("k_proj", "v_proj") for name in expected}
    plan = config.text_config.base_model_tp_plan
    assert {name.rpartition(".")[2] for name in plan if ".k_proj." in name} == set(expected)


def test_every_parameter_of_a_text_model_but_idle_experts_works_on_text():
    report = parameter_report(config_with())
    idle = sum(bank["total"] - bank["active"] for bank in report.banks.values())
    assert report.active == {"text": report.total - idle - SIZES["vocab_size"] * SIZES["hidden_size"]}


def test_a_configuration_that_was_saved_before_keeps_all_parts(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(SAVED_BEFORE))
    config = ChorusConfig.from_pretrained(tmp_path)
    assert config.text_config.modalities == list(MODALITY_IDS)
    torch.manual_seed(0)
    model = ChorusForConditionalGeneration(config).eval()
    assert projections(model) == KEYS
    assert sorted(model.model.language_model.layers[1].mlp.banks) == ["audio", "common", "image", "text"]
    model.save_pretrained(tmp_path)
    # The weights load also beside the configuration as it was.
    (tmp_path / "config.json").write_text(json.dumps(SAVED_BEFORE))
    loaded, info = ChorusForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_new_configuration_says_so_when_it_is_saved(tmp_path: Path):
    config = config_with("image")
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["text_config"]["modalities"] == ["text", "image"]
    assert ChorusConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


def test_a_decoder_alone_takes_all_modalities():
    config = ChorusTextConfig(**SIZES)
    assert config.modalities == list(MODALITY_IDS)
    assert projections(ChorusTextModel(config)) == KEYS


def test_the_order_in_which_modalities_are_named_does_not_matter():
    assert ChorusTextConfig(**SIZES, modalities=["audio", "text"]).modalities == ["text", "audio"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"modalities": ["text", "sound"]}, "unknown modality 'sound'"),
        ({"modalities": ["image"]}, r"modalities=\['image'\] lacks 'text'"),
        ({"expert_banks": {"text": {}, "audio": {}}}, r"bank 'audio': it takes \['audio'\] but the model has \['text'"),
        ({"modalities": ["text"]}, r"an encoder for 'image' but the modalities of its text_config are \['text'\]"),
    ],
)
def test_what_contradicts_itself_is_refused(settings: dict[str, Any], message: str):
    with pytest.raises(Exception, match=message):  # `@strict` wraps what a validator raises
        config_with("image", **settings)


def test_a_bank_of_another_model_may_name_more_modalities():
    model = ChorusForConditionalGeneration(config_with(expert_banks={"common": {"modalities": list(MODALITY_IDS)}}))
    assert model(input_ids=torch.arange(8)[None]).logits.isfinite().all()


def test_tokens_of_a_modality_that_the_model_lacks_are_refused():
    model = ChorusForConditionalGeneration(config_with("image")).eval()
    kinds = torch.tensor([[0, 3, 3]])
    message = r"holds \[3\] in 2 of 3 tokens; this model knows {'text': 0, 'image': 1} and was built without audio"
    with pytest.raises(ValueError, match=message):
        model.model.language_model(input_ids=torch.arange(3)[None], mm_token_type_ids=kinds)


def test_gradients_reach_all_of_a_text_model():
    torch.manual_seed(0)
    model = ChorusForConditionalGeneration(config_with()).train()
    ids = torch.randint(64, (4, 32))
    model(input_ids=ids, labels=ids).loss.backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
