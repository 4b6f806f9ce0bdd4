"""What a compiled step was made from, and whether a look sees each change of it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from chorus_moe.fastpaths.module_settings import Snapshot, settings_of, signature_of
from tests.fastpaths.test_compiled_layers import make


def test_functions_are_told_apart_and_equal_hooks_are_not():
    def hook(module: Any, inputs: Any, names: list[str]) -> None: ...

    assert settings_of(F.silu) != settings_of(F.relu)
    assert settings_of({1: partial(hook, names=["a"])}) == settings_of({2: partial(hook, names=["a"])})
    assert settings_of({1: partial(hook, names=["a"])}) != settings_of({1: partial(hook, names=["b"])})
    assert settings_of({"first": 1}) != settings_of({"second": 1})


def hook(*args: Any) -> None: ...


def attention(model: Any) -> Any:
    return model.model.language_model.layers[1].self_attn


def replace_a_weight(model: Any) -> None:
    model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight)[:-1])


CHANGES: dict[str, Callable[[Any], Any]] = {
    "a hook": lambda model: attention(model).register_forward_hook(hook),
    "another module": lambda model: setattr(model.model.language_model, "norm", torch.nn.Identity()),
    "another forward": lambda model: setattr(attention(model), "forward", hook),
    "a layer less": lambda model: model.model.language_model.layers.pop(-1),
    "another weight": replace_a_weight,
    "another dtype in the same weights": lambda model: model.lm_head.bfloat16(),
    "a weight that trains": lambda model: model.lm_head.weight.requires_grad_(),
    "another class": lambda model: parametrizations.weight_norm(model.lm_head),
    "a number": lambda model: setattr(attention(model), "scaling", 0.5),
    "an adapter's number": lambda model: attention(model).q_proj.scaling.update(default=0.5),
    "an adapter's choice": lambda model: attention(model).q_proj._active_adapter.append("another"),
    "an adapter's configuration": lambda model: setattr(model.peft_config["default"], "r", 5),
    "a setting": lambda model: setattr(model.config.text_config, "num_experts_per_tok", 1),
    "a setting of a bank": lambda model: model.config.text_config.expert_banks["common"].update(closed=True),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_each_change_is_seen(change: Callable[[Any], Any]) -> None:
    model = make()
    get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    snapshot, signature = Snapshot(model), signature_of(model)
    assert snapshot.is_current()
    change(model)
    assert not snapshot.is_current()
    assert signature_of(model) != signature


def test_values_of_weights_are_no_change() -> None:
    model = make()
    snapshot, signature = Snapshot(model), signature_of(model)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
        attention(model).q_proj.weight.data = torch.zeros_like(attention(model).q_proj.weight)
    assert snapshot.is_current()
    # A tensor in another's place is looked at again, and is no change.
    model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
    assert not snapshot.is_current()
    assert signature_of(model) == signature
