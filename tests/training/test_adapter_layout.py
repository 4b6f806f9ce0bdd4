"""A LoRA on stacked experts and the same one on linear experts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from chorus_moe import ChorusForConditionalGeneration
from chorus_moe.surgery import unfuse_experts
from chorus_moe.training.adapter_layout import WEIGHTS, convert_adapter, fuse_adapter, swap_adapter, unfuse_adapter
from chorus_moe.training.lora import lora_config
from tests.conftest import tiny_batch, tiny_config

BANKS: dict[str, Any] = {"text": {"num_experts": [3, 5]}, "common": {"intermediate_size": 16, "expert_depth": 2}}


def make(is_linear: bool = False) -> ChorusForConditionalGeneration:
    torch.manual_seed(0)
    model = ChorusForConditionalGeneration(tiny_config(expert_banks=BANKS)).eval()
    if is_linear:
        unfuse_experts(model)
    return model


def adapt(model: Any, folder: Path, **groups: Any) -> torch.Tensor:
    """Save a LoRA of random numbers, and what the model says with it."""
    groups = groups or {"banks": "all", "attention": True}
    adapted = get_peft_model(model, lora_config(model, r=2, verbose=False, **groups)).eval()
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    adapted.save_pretrained(folder)
    return logits_of(adapted)


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**tiny_batch(make().config)).logits


def test_the_adapter_of_linear_experts_says_the_same(tmp_path: Path) -> None:
    plain, before = logits_of(make()), adapt(make(), tmp_path / "fused")
    convert_adapter(tmp_path / "fused", tmp_path / "linear", make(), "linear")
    linear = PeftModel.from_pretrained(make(is_linear=True), tmp_path / "linear").eval()
    assert not torch.allclose(plain, before, atol=1e-2)
    # Float32 sums in another order, at logits of about 1.
    torch.testing.assert_close(logits_of(linear), before, rtol=0, atol=1e-4)


@pytest.mark.parametrize("groups", [{"banks": "all"}, {"banks": "all", "attention": True}, {"attention": True}])
@pytest.mark.parametrize(("first", "second"), [(4, 2), (2, 4), (3, 3)])
def test_an_adapter_of_another_rank_takes_the_place_of_one(
    first: int, second: int, groups: dict[str, Any], tmp_path: Path
) -> None:
    expected = {}
    for rank in {first, second}:
        torch.manual_seed(rank)
        config = lora_config(make(), r=rank, lora_alpha=3 * rank, verbose=False, init_lora_weights=False, **groups)
        adapted = get_peft_model(make(), config).eval()
        adapted.save_pretrained(tmp_path / str(rank))
        expected[rank] = logits_of(adapted)
    model = PeftModel.from_pretrained(make(), tmp_path / str(first)).eval()
    swap_adapter(model, tmp_path / str(second))
    # Zeros beside the rank change the order of float32 sums, at logits of about 1.
    torch.testing.assert_close(logits_of(model), expected[second], rtol=0, atol=1e-5)


def test_an_adapter_that_cannot_take_the_place_leaves_the_old_one(tmp_path: Path) -> None:
    adapt(make(), tmp_path / "wide")
    adapted = get_peft_model(make(), lora_config(make(), r=4, verbose=False, banks="all", init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "old")
    model = PeftModel.from_pretrained(make(), tmp_path / "old").eval()
    before = logits_of(model)
    with pytest.raises(RuntimeError, match="unexpected keys found"):
        swap_adapter(model, tmp_path / "wide")
    assert torch.equal(logits_of(model), before)


def test_there_and_back_is_the_same_bits_and_loads(tmp_path: Path) -> None:
    before = adapt(make(), tmp_path / "fused")
    convert_adapter(tmp_path / "fused", tmp_path / "linear", make(), "linear")
    convert_adapter(tmp_path / "linear", tmp_path / "back", make(), "fused")
    first, second = (load_file(tmp_path / name / WEIGHTS) for name in ("fused", "back"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(logits_of(PeftModel.from_pretrained(make(), tmp_path / "back").eval()), before)


def test_experts_are_slowest_in_a_and_fastest_in_b() -> None:
    """Each expert's product is the part of PEFT's own delta that belongs to it."""
    model = make()
    adapted = get_peft_model(model, lora_config(model, banks={"text": [2]}, r=2, verbose=False))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    outer = model.model.language_model.layers[2].mlp.banks["text"].experts
    delta = outer.get_delta_weight("default")  # down_proj is the outer wrapper
    prefix = "layers.2.mlp.banks.text.experts"
    tensors = {f"x.{prefix}.lora_{side}.weight": getattr(outer, f"lora_{side}")["default"].weight for side in "AB"}
    linear = unfuse_adapter(tensors, make())
    for expert in range(5):
        product = (
            linear[f"x.{prefix}.{expert}.down_proj.lora_B.weight"]
            @ (linear[f"x.{prefix}.{expert}.down_proj.lora_A.weight"])
        )
        torch.testing.assert_close(product * 8, delta[expert])  # alpha 16 over rank 2


def test_a_lora_trained_on_linear_experts_cannot_always_be_stacked(tmp_path: Path) -> None:
    adapt(make(is_linear=True), tmp_path / "linear", banks="all")
    with pytest.raises(ValueError, match="gate_proj and up_proj have different lora_A"):
        convert_adapter(tmp_path / "linear", tmp_path / "fused", make(), "fused")


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    adapt(make(), tmp_path / "fused")
    other = ChorusForConditionalGeneration(tiny_config(expert_banks={**BANKS, "text": {"num_experts": 4}}))
    with pytest.raises(ValueError, match=r"fit no stack of 4 experts of width 32 on hidden size 64"):
        convert_adapter(tmp_path / "fused", tmp_path / "linear", other, "linear")
    with pytest.raises(ValueError, match="layout='liner'"):
        convert_adapter(tmp_path / "fused", tmp_path / "linear", other, "liner")


def test_some_experts_without_a_lora_are_refused(tmp_path: Path) -> None:
    adapt(make(), tmp_path / "fused", banks={"text": [1]})
    tensors = unfuse_adapter(load_file(tmp_path / "fused" / WEIGHTS), make())
    left = {name: tensor for name, tensor in tensors.items() if ".experts.1.down_proj" not in name}
    with pytest.raises(ValueError, match=r"down_proj has a LoRA on experts \[0, 2\] of 3"):
        fuse_adapter(left)


def test_other_tensors_are_passed_on(tmp_path: Path) -> None:
    adapt(make(), tmp_path / "fused", attention=True)
    tensors = load_file(tmp_path / "fused" / WEIGHTS)
    assert unfuse_adapter(tensors, make()).keys() == tensors.keys() == fuse_adapter(tensors).keys()
    save_file(tensors, tmp_path / "fused" / WEIGHTS)
    convert_adapter(tmp_path / "fused", tmp_path / "linear", make(), "linear")
    assert torch.equal(
        logits_of(PeftModel.from_pretrained(make(), tmp_path / "linear").eval()),
        logits_of(PeftModel.from_pretrained(make(), tmp_path / "fused").eval()),
    )
