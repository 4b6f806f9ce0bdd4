"""Stacked experts, linear ones, and checkpoints with one tensor an expert hold the same numbers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from torch import nn

from chorus_moe import ChorusForConditionalGeneration, ChorusProcessor
from chorus_moe.modeling.moe_banks import ChorusExperts, LinearExperts
from chorus_moe.surgery import export_experts, fuse_experts, parameter_report, prune_experts, unfuse_experts
from chorus_moe.surgery.processor import processor_from_config
from chorus_moe.surgery.tokenizer import build_tokenizer
from tests.conftest import tiny_batch, tiny_config

BANKS = {
    "text": {"num_experts": [3, 5]},
    "image": {"layers": [2], "intermediate_size": 16},
    "common": {"expert_depth": 2},
}


def make(**text: Any) -> ChorusForConditionalGeneration:
    torch.manual_seed(0)
    return ChorusForConditionalGeneration(tiny_config(expert_banks=BANKS, **text)).eval()


def assert_same(first: nn.Module, second: nn.Module) -> None:
    left, right = first.state_dict(), second.state_dict()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**tiny_batch(model.config)).logits


@pytest.mark.parametrize("implementation", ["cpu_mm", "eager"])
def test_linear_experts_give_the_same_logits(implementation: str) -> None:
    model = make()
    model.set_experts_implementation(implementation)
    before = logits_of(model)
    unfuse_experts(model)
    assert not any(isinstance(module, ChorusExperts) for module in model.modules())
    # Float32 sums in another order, at logits below 1.
    torch.testing.assert_close(logits_of(model), before, rtol=0, atol=1e-5)


def test_there_and_back_is_the_same_bits() -> None:
    model, twin = make(), make()
    there, back = unfuse_experts(model), fuse_experts(model)
    assert there.parameters_before == there.parameters_after == back.parameters_after
    assert_same(model, twin)
    assert torch.equal(logits_of(model), logits_of(twin))
    assert model.config.to_dict() == twin.config.to_dict()


def test_gradients_of_both_layouts_are_equal() -> None:
    stacked, linear = make().train(), make().train()
    unfuse_experts(linear)
    for model in (stacked, linear):
        model(**tiny_batch(model.config)).loss.backward()
    for layer in (1, 2):
        for name, bank in stacked.model.language_model.layers[layer].mlp.banks.items():
            other = linear.model.language_model.layers[layer].mlp.banks[name].experts
            grad = torch.stack([torch.cat((e.gate_proj.weight.grad, e.up_proj.weight.grad)) for e in other])
            # Float32 sums in another order, at gradients up to 0.1.
            torch.testing.assert_close(grad, bank.experts.gate_up_proj.grad, rtol=1e-4, atol=1e-6)
            down = torch.stack([e.down_proj.weight.grad for e in other])
            torch.testing.assert_close(down, bank.experts.down_proj.grad, rtol=1e-4, atol=1e-6)


def test_a_linear_expert_without_tokens_has_a_zero_gradient() -> None:
    model = make().train()
    unfuse_experts(model)
    ids = torch.tensor([[5, 6, 7]])
    model(input_ids=ids, labels=ids).loss.backward()
    experts = model.model.language_model.layers[2].mlp.banks["image"].experts
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in experts.parameters())


def test_a_saved_linear_model_loads_linear_and_equal(tmp_path: Path) -> None:
    model = make()
    unfuse_experts(model)
    model.save_pretrained(tmp_path)
    loaded = ChorusForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert sum(isinstance(module, LinearExperts) for module in loaded.modules()) == 7  # two more of deep experts
    assert_same(model, loaded)
    assert torch.equal(logits_of(model), logits_of(loaded))


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("max_shard_bytes", [200_000, 10**9])
def test_an_exported_checkpoint_has_one_tensor_an_expert_and_comes_back_bit_for_bit(
    tmp_path: Path, max_shard_bytes: int, is_tied: bool
) -> None:
    config = tiny_config(expert_banks=BANKS, tie_word_embeddings=is_tied)
    config.tie_word_embeddings = is_tied
    model = ChorusForConditionalGeneration(config).eval()
    files = export_experts(model, tmp_path, max_shard_bytes)
    assert (len(files) > 3) == (max_shard_bytes < 10**9)
    names = []
    for file in files:
        with safe_open(tmp_path / file, "pt") as opened:
            names += list(opened.keys())
    assert ("lm_head.weight" in names) == (not is_tied)  # a tied weight is stored once
    prefix = "model.language_model.layers.1.mlp.banks.text.experts"
    found = sorted(name.removeprefix(f"{prefix}.") for name in names if name.startswith(prefix))
    assert found == [f"{e}.{part}_proj.weight" for e in range(3) for part in ("down", "gate", "up")]
    assert "model.language_model.layers.2.mlp.banks.common.deeper_experts.0.3.up_proj.weight" in names
    if len(files) > 1:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
        assert sorted(index) == sorted(names)
    loaded = ChorusForConditionalGeneration.from_pretrained(tmp_path).eval()
    fuse_experts(loaded)
    assert_same(model, loaded)
    assert model.config.text_config.experts_layout == "fused"


def test_an_exported_checkpoint_has_its_processor(tmp_path: Path) -> None:
    model = make()
    processor = processor_from_config(model.config, build_tokenizer(["what is it?"], 280))
    export_experts(model, tmp_path, processor=processor)
    loaded = ChorusProcessor.from_pretrained(tmp_path)
    assert loaded.num_image_tokens == processor.num_image_tokens
    assert loaded.tokenizer("what is it?").input_ids == processor.tokenizer("what is it?").input_ids


def test_an_export_keeps_what_generation_was_set_to(tmp_path: Path) -> None:
    model = make()
    model.generation_config.max_new_tokens = 7
    export_experts(model, tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text())["max_new_tokens"] == 7


def test_a_frozen_bank_stays_frozen() -> None:
    model = make()
    model.model.language_model.layers[1].mlp.banks["text"].requires_grad_(False)
    unfuse_experts(model)
    layer = model.model.language_model.layers[1].mlp.banks
    assert not any(parameter.requires_grad for parameter in layer["text"].parameters())
    assert all(parameter.requires_grad for parameter in layer["common"].parameters())


def test_the_report_counts_both_layouts_alike() -> None:
    assert parameter_report(make().config) == parameter_report(make(experts_layout="linear").config)


def test_adaptive_experts_skip_slots_in_linear_experts_too() -> None:
    torch.manual_seed(0)
    model = ChorusForConditionalGeneration(tiny_config(expert_banks={"common": {"adaptive_experts": True}})).eval()
    before = logits_of(model)
    unfuse_experts(model)
    torch.testing.assert_close(logits_of(model), before, rtol=0, atol=1e-5)


def test_what_cannot_be_converted_is_refused() -> None:
    model = make()
    with pytest.raises(ValueError, match="already have the layout 'fused'"):
        fuse_experts(model)
    with pytest.raises(Exception, match="unknown experts_layout 'liner'; did you mean 'linear'"):
        make(experts_layout="liner")
    unfuse_experts(model)
    with pytest.raises(ValueError, match=r"holds LinearExperts; stack its experts with fuse_experts\(\) first"):
        prune_experts(model, {"text": 2}, {})
    get_peft_model(model, LoraConfig(target_modules=["o_proj"]))
    with pytest.raises(ValueError, match="carry adapters"):
        fuse_experts(model)


@pytest.mark.parametrize("kind", ["whole numbers", "a kind of its own"])
def test_quantised_and_sharded_experts_are_refused_before_the_first_bank_is_converted(kind: str) -> None:
    class Sharded(nn.Parameter): ...

    model = make()
    last = model.model.language_model.layers[-1].mlp.banks["common"].deeper_experts[0]
    values = last.down_proj.detach()
    if kind == "whole numbers":
        last.down_proj = nn.Parameter(values.to(torch.int8), requires_grad=False)
    else:
        last.down_proj = Sharded(values)
    with pytest.raises(ValueError, match="bank 'common': down_proj is quantised or sharded"):
        unfuse_experts(model)
    assert model.config.text_config.experts_layout == "fused"
    assert not any(isinstance(module, LinearExperts) for module in model.modules())


def test_experts_with_shares_of_their_width_stay_stacked(tmp_path: Path) -> None:
    model = ChorusForConditionalGeneration(tiny_config(expert_width_shares=[0.5, 1.0]))
    for operation in (unfuse_experts, lambda model: export_experts(model, tmp_path / "out")):
        with pytest.raises(ValueError, match=r"expert_width_shares=\[0.5, 1.0\] take stacked experts"):
            operation(model)
    assert not (tmp_path / "out").exists()
