"""Formats and groups of weights: what is read, which weights are whose, and what the configuration says of them."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from chorus_moe import ChorusForConditionalGeneration
from chorus_moe.fastpaths.quantized_weights import QuantizedLinear, quantized, store_quantized, stored_weight
from chorus_moe.surgery import quantize
from chorus_moe.surgery.quantization_formats import (
    WeightFormat,
    apply_formats,
    below_adapter,
    described,
    groups_of,
    is_stored,
    plan_described,
    plan_formats,
    read_format,
    restore_weights,
    weights_of,
)
from tests.conftest import tiny_config


def make(**text: Any) -> ChorusForConditionalGeneration:
    with torch.device("meta"):
        return ChorusForConditionalGeneration(tiny_config(**text))


@pytest.fixture(scope="module")
def whole() -> ChorusForConditionalGeneration:
    return make()


@pytest.mark.parametrize(
    ("chosen", "width", "expected"),
    [
        (WeightFormat(8), 7, 7),
        (WeightFormat(8, 16), 64, 16),
        (WeightFormat(4), 128, 64),
        (WeightFormat(4), 64, 64),
        (WeightFormat(4), 96, 32),
        (WeightFormat(4), 48, 16),
        (WeightFormat(4, 48), 96, 48),
        (WeightFormat(4, 2), 96, 2),
    ],
)
def test_groups_divide_the_row(chosen: WeightFormat, width: int, expected: int) -> None:
    assert chosen.group_of(width, "w") == expected


@pytest.mark.parametrize(
    ("chosen", "width", "sizes"),
    [(WeightFormat(4), 24, "64 or 32 or 16"), (WeightFormat(4, 48), 64, "48"), (WeightFormat(8, 48), 64, "48")],
)
def test_rows_that_no_group_divides_are_refused_with_both_numbers(chosen: WeightFormat, width: int, sizes: str) -> None:
    with pytest.raises(ValueError, match=f"quantize: w has rows of {width} weights, which groups of {sizes} do not"):
        chosen.group_of(width, "w")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("int8", WeightFormat(8, None, True)),
        ("int4", WeightFormat(4, None, True)),
        ("none", None),
        ({"bits": 8}, WeightFormat(8)),
        ({"bits": 4, "group": 2}, WeightFormat(4, 2)),
        ({"bits": 4, "group": None, "symmetric": False}, WeightFormat(4, None, False)),
        (WeightFormat(4, 32, False), WeightFormat(4, 32, False)),
    ],
)
def test_formats_are_names_or_mappings(given: object, expected: WeightFormat | None) -> None:
    assert read_format(given, "experts") == expected


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("int3", r"unknown format 'int3'; did you mean 'int8'.*choose from \['int8', 'int4', 'none'\]"),
        (8, "expected int8, int4, none or a mapping such as {bits: 4}; found 8"),
        ({"bit": 4}, "unknown setting 'bit'; did you mean 'bits'"),
        ({}, "bits=None; choose 8 or 4"),
        ({"bits": 6}, "bits=6; choose 8 or 4"),
        ({"bits": 4.0}, "bits=4.0; choose 8 or 4"),
        ({"bits": 4, "group": 0}, "group=0; expected an even number, or None"),
        ({"bits": 4, "group": 1}, "group=1; expected an even"),
        ({"bits": 4, "group": 7}, "group=7; expected an even"),
        ({"bits": 4, "group": -2}, "group=-2; expected an even"),
        ({"bits": 4, "group": 32.0}, "group=32.0; expected an even"),
        ({"bits": 4, "symmetric": 1}, "symmetric=1; expected true or false"),
        (WeightFormat(3), "bits=3"),
    ],
)
def test_other_formats_are_refused_by_group(given: object, said: str) -> None:
    with pytest.raises(ValueError, match=f"^quantize: 'experts': .*{said}"):
        read_format(given, "experts")


def test_weights_are_matrices_and_stacks_by_their_names_below_the_head(whole: ChorusForConditionalGeneration) -> None:
    found = weights_of(whole)
    matrices = {
        f"{path}.weight".removeprefix("model.")
        for path, module in whole.named_modules()
        if type(module) in (nn.Linear, nn.Embedding)
    }
    stacks = {
        name.removeprefix("model.") for name, _ in whole.named_parameters() if name.endswith(("up_proj", "down_proj"))
    }
    assert found.keys() == matrices | stacks and stacks
    for name, (module, key) in found.items():
        assert name.endswith(f".{key}") and isinstance(getattr(module, key), nn.Parameter)
    # The decoder alone has the names of the whole model.
    decoder = weights_of(whole.model.language_model)
    assert decoder.keys() == {name for name in found if name.startswith("language_model.")}


class OwnLinear(nn.Linear):
    pass


def wrapped(**modules: nn.Module) -> Any:
    model: Any = nn.Module()
    model.config = SimpleNamespace(text_config=None)
    for path, module in modules.items():
        target, *steps = model, *path.split("__")
        for step in steps[:-1]:
            if not hasattr(target, step):
                target.add_module(step, nn.Module())
            target = getattr(target, step)
        target.add_module(steps[-1], module)
    return model


def test_an_adapters_own_weights_and_those_of_other_classes_are_left() -> None:
    linear = nn.Linear(4, 4)
    model = wrapped(
        a__base_layer=linear,
        a__lora_A__default=nn.Linear(4, 2),
        b__modules_to_save__default=nn.Linear(4, 4),
        c=OwnLinear(4, 4),
        d=nn.LayerNorm(4),
    )
    assert {name: weight.module for name, weight in weights_of(model).items()} == {"a.weight": linear}
    adapted = SimpleNamespace(get_base_model=lambda: model)
    assert below_adapter(adapted) is model and below_adapter(model) is model  # type: ignore[arg-type]


def test_what_is_stored_is_known_from_other_parametrizations() -> None:
    linear, other = nn.Linear(4, 4), nn.Linear(4, 4)
    assert not is_stored(linear, "weight")
    store_quantized(linear, {"weight": quantized(linear.weight, 8, 4, True)})
    parametrize.register_parametrization(other, "weight", nn.Identity())
    assert is_stored(linear, "weight") and not is_stored(linear, "bias") and not is_stored(other, "weight")
    assert isinstance(linear, QuantizedLinear)
    assert weights_of(wrapped(a=linear, b=other)).keys() == {"a.weight"}


def test_groups_are_those_that_the_model_has_with_banks_last(whole: ChorusForConditionalGeneration) -> None:
    found = groups_of(whole)
    assert list(found) == [
        "experts", "attention", "cross_modal", "shared_experts", "dense", "connectors", "head", "embeddings", "towers",
        "vision_tower", "audio_tower", "audio", "common", "image", "text",
    ]  # fmt: skip
    assert found["head"].keys() == {"lm_head.weight"}
    assert found["experts"].keys() == set().union(*(found[bank] for bank in ("text", "image", "audio", "common")))
    assert found["towers"].keys() == found["vision_tower"].keys() | found["audio_tower"].keys()
    assert not any("router" in name or "gate." in name for group in found.values() for name in group)


def test_a_dense_model_has_no_experts() -> None:
    found = groups_of(make(mlp_layer_types=["dense"] * 3, expert_banks={}))
    assert "experts" not in found and "shared_experts" not in found and "dense" in found


def bits_of(plan: dict[str, WeightFormat]) -> dict[str, int]:
    return {name: chosen.bits for name, chosen in plan.items()}


@pytest.mark.parametrize("given", ["int8", {"bits": 8, "group": 16}])
def test_one_format_is_for_all_but_towers(whole: ChorusForConditionalGeneration, given: Any) -> None:
    plan, groups = plan_formats(whole, given), groups_of(whole)
    assert plan.keys() == weights_of(whole).keys() & set().union(*list(groups.values())[:8])
    assert not plan.keys() & groups["towers"].keys()
    assert {chosen.group for chosen in plan.values()} == {None if given == "int8" else 16}


def test_what_is_more_special_wins_in_any_order(whole: ChorusForConditionalGeneration) -> None:
    asked: Any = {"image": "none", "vision_tower": "int4", "text": "int8", "towers": "int8", "experts": "int4"}
    found, groups = plan_formats(whole, asked), groups_of(whole)
    assert set(bits_of(found).values()) == {4, 8}
    for name, bits in (("text", 8), ("audio", 4), ("common", 4), ("vision_tower", 4), ("audio_tower", 8)):
        assert {found[weight].bits for weight in groups[name]} == {bits}, name
    assert not found.keys() & groups["image"].keys()


def test_groups_that_the_model_lacks_and_plans_of_nothing_are_refused(whole: ChorusForConditionalGeneration) -> None:
    with pytest.raises(ValueError, match="quantize: unknown group 'expert'; did you mean 'experts'"):
        plan_formats(whole, {"expert": "int8"})
    for asked in ({}, {"experts": "none"}, "none"):
        with pytest.raises(ValueError, match=r"quantize: nothing is named that could be quantised; .*'experts', 'att"):
            plan_formats(whole, asked)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"lm_head.weight has rows of 64 weights, which groups of 48 do not"):
        plan_formats(whole, {"head": {"bits": 8, "group": 48}})


def test_a_weight_is_quantised_once_and_by_one(whole: ChorusForConditionalGeneration) -> None:
    model = make()
    apply_formats(model, plan_formats(model, {"head": "int8"}))
    with pytest.raises(ValueError, match=r"lm_head.weight is quantised already; call dequantize\(model\) first"):
        plan_formats(model, {"head": "int4"})
    plan_formats(model, {"embeddings": "int8"})
    other = make()
    other.lm_head.weight = nn.Parameter(torch.zeros(128, 64, dtype=torch.int8, device="meta"), requires_grad=False)
    with pytest.raises(ValueError, match="lm_head.weight is torch.int8, quantised by something else"):
        plan_formats(other, {"head": "int8"})


def test_a_plan_is_carried_out_as_it_says_and_undone() -> None:
    torch.manual_seed(0)
    model = ChorusForConditionalGeneration(tiny_config())
    plan = plan_formats(model, {"experts": {"bits": 4, "group": 16, "symmetric": False}, "head": "int8"})
    # At 4 bits the row of 64 is one group.
    plan["language_model.embed_tokens.weight"] = WeightFormat(4)
    apply_formats(model, plan)
    weights = weights_of(model)
    for name, weight in weights.items():
        assert is_stored(*weight) == (name in plan)
        if name in plan:
            stored: Any = stored_weight(*weight)
            asked = plan[name]
            assert stored.bits == asked.bits and (stored.offset is None) == asked.symmetric
            assert stored.scale.shape[-1] == stored.shape[-1] // asked.group_of(stored.shape[-1], name)
    modules = {id(weights[name].module) for name in plan}
    assert restore_weights(model) == len(modules)
    assert not any(is_stored(*weight) for weight in weights_of(model).values())
    assert restore_weights(model) == 0


@pytest.mark.parametrize("groups", [{"head": "int8"}, {"embeddings": "int8"}])
def test_a_shared_table_is_separated_where_one_of_it_is_quantised(groups: Any) -> None:
    config = tiny_config()
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    model = ChorusForConditionalGeneration(config)
    before = model.lm_head.weight.detach().clone()
    model.lm_head.weight.requires_grad_(False)
    quantize(model, {"attention": "int8"}, verbose=False)
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    quantize(model, groups, verbose=False)
    assert is_stored(model.lm_head, "weight") == ("head" in groups)
    assert not model.config.tie_word_embeddings and not model.config.text_config.tie_word_embeddings
    assert not model.all_tied_weights_keys
    own = model.model.language_model.embed_tokens.weight if "head" in groups else model.lm_head.weight
    assert torch.equal(own.detach(), before) and not own.requires_grad


def test_what_is_quantised_is_described_by_patterns_and_read_again() -> None:
    model = make()
    banks = {"text": "int4", "common": {"bits": 8, "group": 16}}
    asked: Any = banks | {"attention": {"bits": 4, "symmetric": False}, "head": "int8"}
    plan = plan_formats(model, asked)
    # One layer of the attention is another: its names stand for themselves.
    odd = next(name for name in plan if name.endswith("self_attn.o_proj.weight"))
    plan[odd] = WeightFormat(8)
    apply_formats(model, plan)
    said = described(model)
    assert said["lm_head.weight"] == {"bits": 8, "group": None, "symmetric": True}
    stack = "language_model.layers.*.mlp.banks.{}.experts.down_proj"
    assert said[stack.format("text")] == {"bits": 4, "group": 32, "symmetric": True}
    assert said[stack.format("common")] == {"bits": 8, "group": 16, "symmetric": True}
    assert said[odd] == {"bits": 8, "group": None, "symmetric": True}
    assert not any("image" in name or "audio" in name for name in said)
    again = plan_described(make(), said)
    assert bits_of(again) == bits_of(plan)
    assert {name: chosen.symmetric for name, chosen in again.items()} == {n: c.symmetric for n, c in plan.items()}


def test_an_own_name_goes_before_the_pattern_and_none_is_left_out() -> None:
    model = make()
    pattern, own = (f"language_model.layers.{layer}.mlp.banks.text.experts.down_proj" for layer in ("*", "1"))
    layers = [name for name in weights_of(model) if "banks.text.experts.down_proj" in name]
    found = plan_described(model, {pattern: "int8", own: "int4"})
    assert bits_of(found) == {name: 4 if name == own else 8 for name in layers} and own in layers
    assert plan_described(model, {pattern: "none"}) == {}
