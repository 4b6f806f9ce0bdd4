"""Parts are frozen and trained by name."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from chorus_moe import (
    ChorusConfig,
    ChorusForConditionalGeneration,
    ChorusForContrastive,
    ChorusForSequenceClassification,
)
from chorus_moe.modeling.modeling_text import ChorusTextModel
from chorus_moe.surgery import freeze, unfreeze
from chorus_moe.surgery.parts import bank_tensor, layers_named, parameters_in, parts_of
from tests.conftest import tiny_config


def make(**text) -> ChorusForConditionalGeneration:
    torch.manual_seed(0)
    return ChorusForConditionalGeneration(tiny_config(**text)).eval()


def trained(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


LAYERS = "model.language_model.layers"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("router:text", {f"{LAYERS}.{i}.mlp.banks.text.router.weight" for i in (1, 2)}),
        ("bank_gates", {f"{LAYERS}.{i}.mlp.bank_gate.weight" for i in (1, 2)}),
        ("dense", {f"{LAYERS}.0.mlp.{n}_proj.weight" for n in ("gate", "up", "down")}),
        ("embeddings", {"model.language_model.embed_tokens.weight"}),
        ("head", {"lm_head.weight"}),
    ],
)
def test_a_part_is_just_its_parameters(name: str, expected: set[str]):
    model = make()
    freeze(model, "all")
    unfreeze(model, name)
    assert trained(model) == expected


@pytest.mark.parametrize(
    ("name", "same"),
    [
        ("banks.image", ["image"]),
        ("banks", ["text", "image", "audio", "common"]),
        ("routers", ["router:text", "router:image", "router:audio", "router:common"]),
        ("towers", ["vision_tower", "audio_tower"]),
        ("layers:0-2", ["layers:0", "layers:1", "layers:2"]),
        ("layers:top34%", ["layers:2"]),
        ("layers:bottom66%", ["layers:0", "layers:1"]),
    ],
)
def test_a_part_of_several_is_the_parts_together(name: str, same: list[str]):
    model = make()
    freeze(model, "all")
    unfreeze(model, name)
    expected = {n for part in parameters_in(model, same, "test").values() for n in part}
    assert trained(model) == {f"model.{n}" for n in expected} != set()


@pytest.mark.parametrize("is_causal", [True, False])
def test_global_tokens_are_a_part_wherever_they_stand(is_causal: bool):
    windows = {"num_global_tokens": 2, "layer_types": ["sliding_attention"] * 3, "sliding_window": 8}
    make_one = ChorusForConditionalGeneration if is_causal else ChorusForSequenceClassification
    model = make_one(tiny_config(**windows, is_causal=is_causal, cross_modal_layers=[]))
    freeze(model, "all")
    unfreeze(model, "global_tokens")
    expected = {n for n, _ in model.named_parameters() if ".global_tokens." in n}
    assert trained(model) == expected != set()


def test_memory_tokens_are_a_part():
    windows = {"num_memory_tokens": 2, "layer_types": ["hybrid_sliding", "full_attention", "hybrid_sliding"]}
    model = ChorusForConditionalGeneration(tiny_config(**windows, sliding_window=8))
    freeze(model, "all")
    unfreeze(model, "memory_tokens")
    layers = [f"model.language_model.layers.{layer}.self_attn.memory_tokens" for layer in (0, 2)]
    assert trained(model) == {f"{layer}.{name}" for layer in layers for name in ("write", "gate")}


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 30, 48])
def test_top_and_bottom_shares_make_up_the_whole(count: int):
    for percent in (1, 12.5, 20, 50, 80, 99):
        top = layers_named(f"layers:top{percent}%", count)
        assert top and top[-1] == count - 1
        assert abs(len(top) - count * percent / 100) <= 1
        bottom = range(count - len(top))
        if bottom:
            assert layers_named(f"layers:bottom{100 - percent}%", count) == bottom
    assert layers_named("layers:top20%", 30) == range(24, 30)


@pytest.mark.parametrize(
    ("share", "count", "expected"),
    [("top50%", 3, range(1, 3)), ("bottom50%", 3, range(1)), ("top49%", 3, range(2, 3)), ("top100%", 48, range(48)),
     ("top1%", 48, range(47, 48)), ("bottom99%", 48, range(47)), ("top12.5%", 4, range(3, 4))],
)  # fmt: skip
def test_half_a_layer_is_rounded_up(share: str, count: int, expected: range):
    assert layers_named(f"layers:{share}", count) == expected


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("layers:0-3", "freeze: 'layers:0-3' names layers 0 to 3; the model has layers 0 to 2"),
        ("layers:0-11", "freeze: 'layers:0-11' names layers 0 to 11; the model has layers 0 to 2"),
        ("layers:3", "freeze: 'layers:3' names layers? 3"),
        ("layers:2-1", "freeze: 'layers:2-1' names no layer"),
        ("layers:top120%", "freeze: 'layers:top120%': expected layers:3, layers:0-11, layers:top20%"),
        ("layers:top0%", "names no layer"),
        ("layers:", "expected layers:3"),
    ],
)
def test_layers_that_are_not_there_are_refused(name: str, message: str):
    with pytest.raises(ValueError, match=message):
        freeze(make(), name)


EXITS = {f"exits.{i}.{part}.weight" for i in (0, 1) for part in ("norm", "score")}
GATES = {f"{LAYERS}.{i}.skip_gate.{name}" for i in (1, 2) for name in ("weight", "bias")}


@pytest.mark.parametrize(
    ("name", "expected"), [("head", EXITS | {"score.weight"}), ("exits", EXITS), ("skip_gates", GATES)]
)
def test_the_head_of_a_classifier_includes_its_exits(name: str, expected: set[str]):
    model = ChorusForSequenceClassification(tiny_config(exit_layers=[1, 2], skip_budget=0.3))
    freeze(model, "all")
    unfreeze(model, name)
    assert trained(model) == expected


@pytest.mark.parametrize(
    ("name", "inside"),
    [
        ("text", ".mlp.banks.text."),
        ("experts:image", ".mlp.banks.image.experts."),
        ("vision_tower", "vision_tower."),
        ("audio_connector", "audio_connector."),
        ("cross_modal", "layers.2.self_attn."),
        ("shared_experts", ".mlp.shared_experts."),
    ],
)
def test_a_frozen_part_rests_and_the_rest_is_trained(name: str, inside: str):
    model = make()
    freeze(model, name)
    names = {n for n, _ in model.named_parameters()}
    assert names - trained(model) == {n for n in names if inside in n} != set()


def test_the_report_counts_what_is_trained():
    model = make()
    report = freeze(model, "vision_tower", "text")
    total = sum(p.numel() for p in model.parameters())
    left = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (report.trainable_before, report.trainable_after) == (total, left)
    assert f"trainable: {total:,} -> {left:,}" in str(report)


@pytest.mark.parametrize("head", [ChorusForSequenceClassification, ChorusForContrastive])
def test_every_head_has_the_same_parts(head: type):
    assert parts_of(head(tiny_config())).keys() == parts_of(make()).keys()


def test_the_parts_of_a_decoder_alone_are_those_of_the_decoder():
    decoder = ChorusTextModel(tiny_config().text_config)
    freeze(decoder, "all")
    unfreeze(decoder, "router:text")
    assert trained(decoder) == {f"layers.{i}.mlp.banks.text.router.weight" for i in (1, 2)}


def test_all_parts_together_are_the_whole_model():
    model = make()
    parts = parts_of(model)
    whole = parts.pop("all")
    assert set().union(*parts.values()) == set(whole)


def test_a_frozen_tower_with_batch_norm_keeps_its_statistics_at_once():
    config = tiny_config().to_dict()
    config["vision_config"] = {"architecture": "resnet10t", "model_args": {"channels": [8, 8, 8, 8]}, "image_size": 32}
    model = ChorusForConditionalGeneration(ChorusConfig(**config)).train()
    freeze(model, "vision_tower")
    before = {name: value.clone() for name, value in model.model.vision_tower.named_buffers()}
    model.get_image_features(torch.randn(2, 3, 32, 32))
    assert all(torch.equal(value, before[name]) for name, value in model.model.vision_tower.named_buffers())


@pytest.mark.parametrize(
    ("name", "nearest"), [("txt", "text"), ("router:txt", "router:text"), ("visiontower", "vision_tower")]
)
def test_an_unknown_part_is_refused_with_the_nearest_name(name: str, nearest: str):
    model = make()
    with pytest.raises(ValueError, match=f"freeze: unknown part '{name}'; did you mean '{nearest}"):
        freeze(model, "text", name)
    assert len(trained(model)) == len(list(model.named_parameters()))


def test_adapters_refuse_it():
    adapted = get_peft_model(make(), LoraConfig(target_modules=["o_proj"]))
    with pytest.raises(ValueError, match="freeze: 3 modules carry adapters"):
        freeze(adapted, "all")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.language_model.layers.12.mlp.banks.text.router.weight", (12, "text", "router.weight")),
        ("layers.0.mlp.banks.common.experts.3.up_proj.weight", (0, "common", "experts.3.up_proj.weight")),
        ("base_model.model.model.language_model.layers.1.mlp.banks.a_b.gate.weight", (1, "a_b", "gate.weight")),
        ("model.language_model.layers.1.mlp.bank_gate.weight", None),
        ("model.language_model.layers.1.self_attn.q_proj.weight", None),
    ],
)
def test_a_name_says_which_bank_a_tensor_belongs_to(name: str, expected: tuple[int, str, str] | None):
    assert bank_tensor(name) == expected


def test_every_parameter_of_a_bank_is_read_and_no_other():
    model = make()
    for name, _ in model.named_parameters():
        assert (bank_tensor(name) is not None) == (".banks." in name)
