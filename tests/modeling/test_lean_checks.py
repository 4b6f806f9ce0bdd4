"""What a lean step may pass by, and what it must leave to the modules."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from chorus_moe import ChorusForConditionalGeneration
from chorus_moe.modeling.attention import Attention
from chorus_moe.modeling.experts import MixtureOfBanks
from chorus_moe.modeling.lean_checks import can_decode
from chorus_moe.modeling.lean_decoding import LeanDecoder
from chorus_moe.modeling.lean_layers import LeanBanks
from tests.conftest import tiny_config
from tests.modeling.test_lean_decoding import ATOL, CASES, TOKENS, decode, make_cache, make_model, prompt


@pytest.mark.parametrize("case", CASES)
def test_no_router_keeps_a_sparse_layer_from_being_passed_by(case: str):
    model = make_model(**CASES[case])
    for layer, lean in zip(model.model.language_model.layers, LeanDecoder(model).layers, strict=True):
        assert isinstance(lean[-1], LeanBanks) == isinstance(layer.mlp, MixtureOfBanks)


def change_forward(model: ChorusForConditionalGeneration) -> None:
    layer = model.model.language_model.layers[1]
    layer.self_attn.forward = layer.self_attn.forward


CHANGES = {
    "hook": lambda model: model.model.language_model.layers[1].self_attn.o_proj.register_forward_hook(lambda *_: None),
    "hook of the whole": lambda model: model.model.register_forward_pre_hook(lambda *_: None),
    "forward of one module": change_forward,
    "training": lambda model: model.train(),
    "another dtype": lambda model: model.model.language_model.layers[1].self_attn.o_proj.double(),
    "eager attention": lambda model: model.set_attn_implementation("eager"),
    "unknown option": lambda model: setattr(model.model.language_model.layers[1].self_attn, "sharpness", 2.0),
    "unknown child": lambda model: model.model.language_model.add_module("exit_head", nn.Identity()),
    "low rank adapter": lambda model: get_peft_model(model, LoraConfig(target_modules=["q_proj"])),
    "parametrization": lambda model: nn.utils.parametrizations.weight_norm(
        model.model.language_model.layers[0].mlp.up_proj
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_module_is_not_passed_by(change: str):
    model = make_model()
    assert can_decode(model)
    CHANGES[change](model)
    assert not can_decode(model)


def test_a_replaced_method_is_not_passed_by(monkeypatch: pytest.MonkeyPatch):
    model = make_model()
    forward = Attention.forward
    monkeypatch.setattr(Attention, "forward", lambda *args, **kwargs: forward(*args, **kwargs))
    assert not can_decode(model)


@pytest.mark.parametrize(
    ("text", "is_lean"),
    [
        ({}, True),
        ({"norm_placement": "post"}, False),
        ({"use_qk_norm": True}, True),
        ({"use_qk_norm": True, "qk_norm_scope": "projection"}, False),
        ({"mlp_bias": True}, False),
        ({"attention_output_bias": True, "no_rope_layers": [0, 1, 1]}, True),
    ],
)
def test_layers_of_another_form_are_left_to_the_modules(text: dict[str, Any], is_lean: bool):
    assert can_decode(ChorusForConditionalGeneration(tiny_config(**text)).eval()) == is_lean


def test_the_head_is_called_as_a_module_where_it_is_more_than_a_product():
    model = make_model()
    calls: list[int] = []
    plain = decode(model, prompt(model), make_cache("dynamic", model), lean=True)
    model.lm_head.register_forward_hook(lambda _, inputs, output: calls.append(1) or 2.0 * output)
    found = decode(model, prompt(model), make_cache("dynamic", model), lean=True)
    torch.testing.assert_close(found, 2.0 * plain, rtol=0, atol=2 * ATOL[torch.float32])
    assert len(calls) == len(TOKENS) + 1  # and the prefill


def test_a_head_with_a_bias_adds_it():
    model = make_model()
    model.lm_head.bias = nn.Parameter(torch.linspace(-1, 1, model.lm_head.out_features))
    expected = decode(model, prompt(model), make_cache("dynamic", model), lean=False)
    found = decode(model, prompt(model), make_cache("dynamic", model), lean=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=ATOL[torch.float32])
