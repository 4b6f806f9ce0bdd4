"""Which rule of a parallel plan stands for which module: written out, and every rule finds a module of the model."""

import re
from typing import Any

import pytest
from torch import nn
from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES
from transformers.distributed.tensor_parallel import ColwiseParallel

from chorus_moe import ChorusTextConfig
from chorus_moe.modeling.attention import ModalityProjection
from chorus_moe.modeling.configuration_parallel import expert_parallel_plan, tensor_parallel_plan
from chorus_moe.modeling.modeling_text import ChorusTextModel

SIZES: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8,
    "modalities": ["text", "image"],
}  # fmt: skip
WINDOWS = {"layer_types": ["sliding_attention", "full_attention", "full_attention"], "sliding_window": 4}
MEMORY = {"layer_types": ["hybrid_sliding", "full_attention", "full_attention"], "sliding_window": 4}
ATTENTION = "layers.*.self_attn."
OUTPUT = {f"{ATTENTION}o_proj": "rowwise"}


def plain(*names: str) -> dict[str, str]:
    return {f"{ATTENTION}{name}": "chorus_colwise" for name in names}


def apart(*names: str) -> dict[str, str]:
    return {f"{ATTENTION}{name}.{modality}": "colwise" for name in names for modality in ("text", "image")}


def gated(prefix: str) -> dict[str, str]:
    return {f"layers.*.mlp.{prefix}{name}": style for name, style in GATED.items()}


GATED = {"gate_proj": "colwise", "up_proj": "colwise", "down_proj": "rowwise"}
QKV = ("q_proj", "k_proj", "v_proj")
MIXED = OUTPUT | plain(*QKV) | apart("k_proj", "v_proj")
GLOBAL = "layers.*.self_attn.global_tokens"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, MIXED),
        ({"cross_modal_layers": []}, OUTPUT | plain(*QKV)),
        ({"cross_modal_layers": [0, 1, 2]}, OUTPUT | plain("q_proj") | apart("k_proj", "v_proj")),
        ({"cross_modal_layers": [2, 2, 1]}, MIXED),
        ({"share_cross_modal_query": False}, OUTPUT | plain(*QKV) | apart(*QKV)),
        ({"share_cross_modal_query": False, "cross_modal_layers": [0, 1, 2]}, OUTPUT | apart(*QKV)),
        ({"use_qk_norm": True}, MIXED),
        ({"use_qk_norm": True, "qk_norm_scope": "projection"}, {}),
        ({"qk_norm_scope": "projection"}, MIXED),
        (MEMORY | {"num_memory_tokens": 2}, {}),
        (
            WINDOWS | {"num_global_tokens": 2},
            MIXED | {GLOBAL: "local_params", f"{GLOBAL}.key": "colwise", f"{GLOBAL}.value": "colwise"},
        ),
        (WINDOWS | {"num_global_tokens": 2, "is_causal": False}, MIXED),
    ],
)
def test_heads_are_spread_over_ranks(values: dict[str, Any], expected: dict[str, str]):
    plan = tensor_parallel_plan(ChorusTextConfig(**SIZES | values))
    assert {name: style for name, style in plan.items() if ".self_attn." in name} == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, gated("") | gated("shared_experts.")),
        ({"shared_expert_intermediate_size": 0}, gated("")),
        ({"mlp_layer_types": ["sparse"] * 3}, gated("shared_experts.")),
        ({"mlp_layer_types": ["dense"] * 3}, gated("")),
    ],
)
def test_the_widths_of_feed_forwards_are_spread_over_ranks(values: dict[str, Any], expected: dict[str, str]):
    plan = tensor_parallel_plan(ChorusTextConfig(**SIZES | values))
    assert {name: style for name, style in plan.items() if ".mlp." in name and ".banks." not in name} == expected


SPLIT = {"gate_up_proj": "packed_colwise", "down_proj": "rowwise", "": "moe_tp_experts"}
DISPATCHED = {"gate_up_proj": "grouped_gemm", "down_proj": "grouped_gemm", "": "ep_dispatch_experts"}


@pytest.mark.parametrize(("plan", "styles"), [(tensor_parallel_plan, SPLIT), (expert_parallel_plan, DISPATCHED)])
@pytest.mark.parametrize(
    ("values", "stacks"),
    [
        ({"expert_banks": {"text": {}, "common": {}}}, ["text.experts", "common.experts"]),
        # One bank in one layer, one in the other, and one of two feed-forwards.
        (
            {"expert_banks": {"text": {"layers": [1]}, "common": {"layers": [2], "expert_depth": 2}}},
            ["text.experts", "common.experts", "common.deeper_experts.*"],
        ),
        ({"expert_banks": {"common": {"expert_depth": 2}}, "mlp_layer_types": ["dense"] * 3}, []),
        ({"experts_layout": "linear"}, []),
    ],
)
def test_experts_are_spread_over_ranks(plan: Any, styles: dict[str, str], values: dict[str, Any], stacks: list[str]):
    rules = plan(ChorusTextConfig(**SIZES | values))
    names = {f"layers.*.mlp.banks.{stack}.{name}".rstrip("."): s for stack in stacks for name, s in styles.items()}
    assert {name: style for name, style in rules.items() if ".banks." in name} == names


def test_whole_experts_are_all_that_is_dispatched():
    assert all(".banks." in name for name in expert_parallel_plan(ChorusTextConfig(**SIZES)))


@pytest.mark.parametrize(
    "values", [{}, WINDOWS | {"num_global_tokens": 2}, {"expert_banks": {"a": {"expert_depth": 3}}}]
)
def test_every_rule_finds_a_module_and_has_a_style(values: dict[str, Any]):
    config = ChorusTextConfig(**SIZES | values)
    model = ChorusTextModel(config)
    names = [name for name, _ in [*model.named_modules(), *model.named_parameters()]]
    for name, style in (config.base_model_tp_plan | config.base_model_ep_plan).items():
        pattern = re.escape(name).replace(r"\*", r"\d+")
        assert style in ALL_PARALLEL_STYLES and any(re.fullmatch(pattern, found) for found in names), name
    assert config.base_model_tp_plan == tensor_parallel_plan(config)
    assert config.base_model_ep_plan == expert_parallel_plan(config)


def test_a_dictionary_of_projections_keeps_its_forward(monkeypatch: pytest.MonkeyPatch):
    mesh, installed = object(), []
    monkeypatch.setattr(ColwiseParallel, "install_forward", lambda self, *given: installed.append(given) or "new")
    style, linear = ALL_PARALLEL_STYLES["chorus_colwise"], nn.Linear(2, 2)
    projection = ModalityProjection(2, 2, False, ["text"])
    assert style.install_forward(projection, mesh) is projection and not installed
    assert style.install_forward(linear, mesh) == "new" and installed == [(linear, mesh)]
