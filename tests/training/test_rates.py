"""Each parameter learns at the rate of its part and its layer, in every optimizer."""

import pytest
import torch
from peft import get_peft_model
from transformers import PreTrainedTokenizerFast

from chorus_moe.surgery import freeze
from chorus_moe.training.lora import lora_config
from chorus_moe.training.rates import Rates, split_groups
from tests.training.conftest import make_model


def test_rates_follow_parts_and_depth_and_keep_all_other_settings(tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_model(tokenizer)
    rates = Rates({"banks": 0.3, "banks.image": 0.5, "connectors": 0.7}, layer_decay=0.5)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.2}, {"params": rest, "weight_decay": 0.0}], 1.0
    )
    split_groups(optimizer, model, rates.of_parameters(model, 1.0))
    found = {name: group["lr"] for group in optimizer.param_groups for name in group["param_names"]}
    assert len(found) == len(list(model.parameters()))
    layers = "language_model.layers"
    assert found[f"{layers}.2.mlp.banks.text.router.weight"] == 0.3
    assert found[f"{layers}.1.mlp.banks.text.router.weight"] == 0.3 * 0.5
    assert found[f"{layers}.1.mlp.banks.image.router.weight"] == 0.5 * 0.5
    assert found[f"{layers}.0.mlp.up_proj.weight"] == 0.25
    assert found["language_model.embed_tokens.weight"] == 0.125
    assert found["language_model.norm.weight"] == 1.0
    assert {rate for name, rate in found.items() if "_connector." in name} == {0.7}
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert all(decays[id(p)] == 0.2 for p in decayed) and all(decays[id(p)] == 0.0 for p in rest)


def test_an_adapter_learns_at_the_rates_of_the_parts_that_it_is_on(tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_model(tokenizer)
    adapted = get_peft_model(model, lora_config(model, banks=["image"], cross_modal=True, whole=["connectors"]))
    rates = Rates({"banks.image": 2.0, "connectors": 3.0}).of_parameters(adapted, 1.0)
    names = {name: rates[id(p)] for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(names) == len(rates)
    for name, rate in names.items():
        assert rate == (2.0 if ".banks.image." in name else 3.0 if "_connector." in name else 1.0), name


def test_a_part_that_rests_has_no_rate(tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_model(tokenizer)
    freeze(model, "towers")
    with pytest.raises(ValueError, match="learning_rates: nothing of 'towers' is trained"):
        Rates({"towers": 1.0}).of_parameters(model, 1.0)
    with pytest.raises(ValueError, match="layer_decay=0 must be above 0"):
        Rates({}, 0).of_parameters(model, 1.0)
