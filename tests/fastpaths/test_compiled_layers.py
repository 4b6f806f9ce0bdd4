"""Layers alike are compiled once, for one operation of a step's graph or as its regions, and do what the modules do."""

from copy import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch._dynamo.utils import compilation_time_metrics
from transformers import StaticCache

from chorus_moe.fastpaths.compiled_layers import CompiledLayers, are_alike, kinds_of
from tests.fastpaths.test_compiled_decoding import WINDOWS, check, make, text

ALIKE: dict[str, Any] = {"num_hidden_layers": 3, "cross_modal_layers": [], "mlp_layer_types": ["sparse"] * 3}
# One kind of layer, which is given other tensors where it has a window, and what a caller may ask of it.
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "plain": ({}, {}, 1),
    "budget": ({"expert_banks": {"common": {}}}, {"expert_budget": {"text": 1}}, 1),
    "windows": (
        {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 6},
        {},
        2,
    ),
    "a gate that nothing passes": ({"skip_layers": [0, 1, 2], "skip_budget": 0.5}, {"skip_threshold": 1.0}, 1),
    "shares of width": ({"expert_banks": {"common": {}}, "expert_width_shares": [0.5, 1.0]}, {}, 1),
}


# Each model is traced for some seconds.
SLOW = ("budget", "shares of width")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in MODELS])
def test_one_operation_for_all_layers(name: str) -> None:
    settings, options, kinds = MODELS[name]
    decoding = check(make(**ALIKE | settings), text(), **options)
    for graph in decoding.graphs.values():
        assert len(graph.layers.functions) == kinds  # type: ignore[attr-defined]
        assert sorted(graph.layers.calls) == [0, 1, 2]  # type: ignore[attr-defined]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "budget", "windows"])
def test_a_region_a_layer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where Dynamo traces."""
    settings, options, kinds = MODELS[name]
    monkeypatch.setattr("chorus_moe.fastpaths.compiled_decoding._is_traced", lambda config, inputs: False)
    before = len(compilation_time_metrics.get("invoke_subgraph_trace", ()))
    decoding = check(make(**ALIKE | settings), text(), **options)
    assert len(compilation_time_metrics["invoke_subgraph_trace"]) - before == kinds
    assert not any(graph.layers.functions for graph in decoding.graphs.values())  # type: ignore[attr-defined]


def test_layers_that_differ_are_told_apart():
    windows = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 6}
    model = make(**ALIKE | {"mlp_layer_types": ["sparse", "sparse", "dense"]} | windows)
    assert kinds_of(model) == (0, 1, 2)
    model = make(**ALIKE)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "o_proj"], init_lora_weights=False)).eval()
    assert kinds_of(model) == (0, 0, 0)
    adapted.base_model.model.model.language_model.layers[1].self_attn.o_proj.scaling["default"] = 0.5
    assert kinds_of(model) == (0, 1, 0)
    model.model.language_model.layers[2].float64 = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    assert kinds_of(model) == (0, 1, 2)


def layers_of(model: Any) -> CompiledLayers:
    return CompiledLayers(model, lambda function: function)


def test_the_decoder_that_is_traced_leaves_the_model_as_it_is():
    """Other threads run the model meanwhile."""
    model = make()
    decoder, before = model.model.language_model, dict(vars(model.model.language_model))
    with torch.no_grad():
        expected = model(**text()).logits
        layers = layers_of(model)
        for traced in (layers.in_regions(), layers.in_one_operation(copy(layers.without_layers))):
            assert len(traced.layers) == 1 and traced.norm is decoder.norm
        assert vars(decoder) == before and len(decoder.layers) == 2
        assert torch.equal(model(**text()).logits, expected)


def test_layers_are_not_shared_where_a_cache_counts_in_python():
    model = make(**WINDOWS)
    assert not are_alike(StaticCache(config=model.config.text_config, max_cache_len=16))
    assert are_alike(StaticCache(config=make().config.text_config, max_cache_len=16))
