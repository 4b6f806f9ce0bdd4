"""Pieces of a planned model against the parameters of the model itself."""

from collections import Counter
from typing import Any

import pytest
import torch

from benchmarks.same_bits import TEXT
from chorus_moe import ChorusConfig, ChorusForConditionalGeneration
from chorus_moe.training.scale.layout import Layout
from chorus_moe.training.scale.plan_model import TRAINED, PlannedModel, Weight, plain_name
from tests.conftest import tiny_config


def parameters_of(config: ChorusConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {n: tuple(p.shape) for n, p in ChorusForConditionalGeneration(config).named_parameters()}


def generic(name: str) -> str:
    """Every number of a layer as `*`."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def test_every_parameter_has_its_piece() -> None:
    config = tiny_config()
    planned, named = PlannedModel(config), parameters_of(config)
    marks = {
        "image": ("vision_tower.", "vision_connector."),
        "audio": ("audio_tower.", "audio_connector."),
        "embeddings": ("embed_tokens",),
        **{str(layer): (f"language_model.layers.{layer}.",) for layer in range(3)},
    }
    pieces: dict[str, Counter[Any]] = {name: Counter() for name in (*marks, "head")}
    for name, shape in named.items():
        piece = next((key for key, found in marks.items() if any(mark in name for mark in found)), "head")
        pieces[piece][generic(name), shape] += 1
    found = [Counter((generic(w.name), w.shape) for w in unit) for unit in planned.units]
    assert found == list(pieces.values()) and all(found)
    assert (len(planned.encoders), len(planned.layers)) == (2, 3)
    assert planned.units == (*planned.encoders, planned.embeddings, *planned.layers, planned.head)
    assert planned.size == sum(torch.Size(shape).numel() for shape in named.values())
    assert all(weight.is_trained for unit in planned.units for weight in unit)
    assert {p.device.type for p in planned.model.parameters()} == {"meta"}


def test_layers_of_one_kind_are_counted_once() -> None:
    planned = PlannedModel(tiny_config(num_hidden_layers=5, cross_modal_layers=[4]))
    assert sorted(planned.kinds.values()) == [1, 1, 1, 1, 1, 1, 3]
    assert planned.kinds[planned.layers[1]] == 3 and planned.layers[1] == planned.layers[3]
    assert set(planned.names.values()) == {weight.name for unit in planned.units for weight in unit}
    assert not any(".layers.0." in name or ".layers.1." in name for name in planned.names.values())


@pytest.mark.parametrize(
    ("text", "piece"),
    [({"num_global_tokens": 2, "is_causal": False}, "embeddings"), ({"num_global_tokens": 2}, "layers")],
)
def test_tokens_in_front_belong_to_the_embeddings(text: dict[str, Any], piece: str) -> None:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    planned = PlannedModel(tiny_config(layer_types=kinds, sliding_window=4, **text))
    units = [planned.embeddings] if piece == "embeddings" else planned.layers
    others = [unit for unit in planned.units if unit not in units]
    assert any("global_tokens" in weight.name for unit in units for weight in unit)
    assert not any("global_tokens" in weight.name for unit in others for weight in unit)


def test_a_text_model_has_no_encoders() -> None:
    config = ChorusConfig(text_config=TEXT)
    for train in TRAINED:
        planned = PlannedModel(config, train)
        assert planned.encoders == () and len(planned.units) == 5
        assert any(weight.is_trained for unit in planned.units for weight in unit)


def test_tied_tables_are_counted_once() -> None:
    config = tiny_config()
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    planned = PlannedModel(config)
    assert planned.size == sum(torch.Size(shape).numel() for shape in parameters_of(config).values())
    assert not any("lm_head" in weight.name for weight in planned.head)


def trained(planned: PlannedModel) -> set[str]:
    return {weight.name for unit in planned.units for weight in unit if weight.is_trained}


def test_without_towers_all_else_is_trained() -> None:
    config = tiny_config()
    planned, everything = PlannedModel(config, "frozen_towers"), trained(PlannedModel(config))
    towers = {name for name in everything if "vision_tower." in name or "audio_tower." in name}
    assert towers and trained(planned) == everything - towers


def test_a_lora_alone_is_trained_and_lies_with_its_weight() -> None:
    config = tiny_config()
    planned, whole = PlannedModel(config, "lora"), PlannedModel(config)
    found = trained(planned)
    assert found and all(".lora_" in name for name in found)
    assert planned.size > whole.size
    own = [tuple(weight for weight in unit if ".lora_" not in weight.name) for unit in planned.units]
    assert [[w.name for w in unit] for unit in own] == [[w.name for w in unit] for unit in whole.units]
    # Banks of layers 1 and 2, cross-modal attention in the last.
    assert [any(weight.is_trained for weight in unit) for unit in planned.layers] == [False, True, True]


def test_an_unknown_way_to_train_is_refused() -> None:
    with pytest.raises(ValueError, match="plan: unknown way to train 'loras'; did you mean 'lora'"):
        PlannedModel(tiny_config(), "loras")


def test_what_a_layout_is_checked_against_is_what_the_configuration_says() -> None:
    banks = {"text": {"num_experts": [4, 8]}, "common": {"num_experts": 8, "num_experts_per_tok": 3}}
    config = tiny_config(expert_banks=banks)
    planned, text = PlannedModel(config), config.text_config
    found = planned.checked
    for name in ("num_attention_heads", "num_key_value_heads", "experts_layout", "num_memory_tokens",
                 "num_global_tokens", "is_causal"):  # fmt: skip
        assert getattr(found, name) == getattr(text, name)
    assert found.get_text_config() is found
    assert {(bank.name, bank.num_experts) for bank in found.banks} == {("text", 4), ("text", 8), ("common", 8)}
    assert len(found.banks) == 3
    assert [[bank.name for bank in banks] for banks in planned.banks] == [["common", "text"]] * 2


@pytest.mark.parametrize(
    ("train", "layout", "said"),
    [
        ("whole", Layout(fsdp=2, expert=2), None),
        ("whole", Layout(fsdp=2, tensor=2), None),
        ("whole", Layout(tensor=4), "parallel.tensor=4 does not divide num_key_value_heads=2"),
        ("whole", Layout(fsdp=8, expert=8), "parallel.expert=8 does not divide the 4 experts"),
        # LoRA on experts does not follow them to other devices.
        ("lora", Layout(fsdp=2), None),
        ("lora", Layout(fsdp=2, expert=2), "the adapter on it"),
    ],
)
def test_a_layout_that_the_model_cannot_have_is_refused(train: str, layout: Layout, said: str | None) -> None:
    found = PlannedModel(tiny_config(), train).refusal(layout)
    assert (found is None) if said is None else said in str(found)


def test_shares_follow_the_plans_of_the_model() -> None:
    planned = PlannedModel(tiny_config())
    shares = planned.shares(layout := Layout(fsdp=2, tensor=2, expert=2))
    assert shares.layout is layout
    assert (shares.tensor_plan, shares.expert_plan) == planned.plans
    assert planned.plans == (planned.head_model.tp_plan, planned.head_model.ep_plan)


def test_sizes_and_names() -> None:
    assert Weight("w", (2, 3, 4), True).size == 24 and Weight("scalar", (), True).size == 1
    assert plain_name("base_model.model.model.a.base_layer.weight") == "model.a.weight"
    assert plain_name("base_model.model.a.lora_A.default.weight") == "a.lora_A.default.weight"
    assert plain_name("model.base_model.model.a") == "model.base_model.model.a"
