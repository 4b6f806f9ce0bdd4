"""Rules of a plan for adapters; that they learn what one process learns is in `test_spread.py`."""

from typing import Any

import pytest
from peft import get_peft_model

from chorus_moe import ChorusForConditionalGeneration
from chorus_moe.training.lora import lora_config
from chorus_moe.training.scale.adapters import expand_with_adapters
from tests.conftest import tiny_config

LAYER = "model.language_model.layers"


def adapted(**groups: Any) -> Any:
    model = ChorusForConditionalGeneration(tiny_config())
    options = {name: value for name, value in groups.items() if name == "use_dora"}
    asked = {name: value for name, value in groups.items() if name != "use_dora"}
    return get_peft_model(model, lora_config(model, verbose=False, **asked, **options)).base_model.model


def test_a_lora_follows_the_layer_it_is_on() -> None:
    model = adapted(attention=True)
    plan = expand_with_adapters(model, model.tp_plan)
    columns, rows = f"{LAYER}.0.self_attn.q_proj", f"{LAYER}.0.self_attn.o_proj"
    assert plan[f"{columns}.base_layer.weight"] == plan[f"{columns}.lora_B.default.weight"] == "chorus_colwise"
    assert plan[f"{rows}.base_layer.weight"] == plan[f"{rows}.lora_A.default.weight"] == "rowwise"
    assert not [name for name in plan if ".q_proj.lora_A" in name or ".o_proj.lora_B" in name]
    assert columns not in plan and rows not in plan


def test_what_is_whole_on_each_process_may_have_any_adapter() -> None:
    model = adapted(connectors=True, router="train", use_dora=True)
    plan = expand_with_adapters(model, model.tp_plan)
    assert plan and not [name for name in plan if "connector" in name or "router" in name]
    assert expand_with_adapters(model, model.ep_plan)


@pytest.mark.parametrize(
    ("groups", "plan", "module"),
    [
        ({"banks": "all"}, "tp_plan", r"banks\.\w+\.experts"),
        ({"banks": ["image"]}, "ep_plan", "banks.image.experts"),
        ({"attention": True, "use_dora": True}, "tp_plan", "self_attn.q_proj"),
    ],
)
def test_an_adapter_that_cannot_be_shared_is_named(groups: dict[str, Any], plan: str, module: str) -> None:
    model = adapted(**groups)
    with pytest.raises(ValueError, match=rf"parallel: {LAYER}\.\d\..*{module} is shared .* the adapter on it"):
        expand_with_adapters(model, getattr(model, plan))
