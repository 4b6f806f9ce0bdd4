"""Bytes that are told beforehand are those that saving, loading and training take."""

from pathlib import Path

import pytest
import torch
from peft import get_peft_model

from chorus_moe import ChorusForConditionalGeneration
from chorus_moe.training.lora import lora_config
from chorus_moe.training.sizes import readable, size_report
from tests.conftest import tiny_config


def bytes_of(model: torch.nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bytes_of_a_model(dtype: torch.dtype, tmp_path: Path) -> None:
    model = ChorusForConditionalGeneration(tiny_config()).to(dtype)
    report = size_report(model.config)
    size = report.sizes[str(dtype).removeprefix("torch.")]
    model.save_pretrained(tmp_path)
    # Names, shapes and some small buffers stand beside the weights.
    assert size.disk is not None and 0 <= (tmp_path / "model.safetensors").stat().st_size - size.disk < 40_000
    assert size.load == bytes_of(model)
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    states = sum(v.numel() * v.element_size() for state in optimizer.state.values() for v in state.values() if v.dim())
    assert size.whole == 2 * bytes_of(model) + states


def test_a_lora_is_counted_as_peft_builds_it() -> None:
    model = ChorusForConditionalGeneration(tiny_config()).to(torch.bfloat16)
    weights, report = bytes_of(model), size_report(model)
    adapted = get_peft_model(model, lora_config(model, banks="all", cross_modal=True, r=8, verbose=False))
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    assert report.lora_parameters == sum(parameter.numel() for parameter in trained)
    assert report.sizes["bfloat16"].lora == weights + 4 * sum(parameter.nbytes for parameter in trained)


def test_stacked_experts_are_out_of_reach_for_four_bits() -> None:
    stacked, linear = (size_report(tiny_config(experts_layout=layout)) for layout in ("fused", "linear"))
    assert stacked.parameters == linear.parameters
    assert stacked.four_bit_share < 0.5 < linear.four_bit_share
    assert "stacked experts stay in 16 bits" in str(stacked) and "stay" not in str(linear)
    assert linear.sizes["4-bit"].load < stacked.sizes["4-bit"].load < stacked.sizes["bfloat16"].load


def test_a_dense_text_model_has_sizes_too() -> None:
    config = tiny_config(mlp_layer_types=["dense"] * 3, cross_modal_layers=[])
    assert size_report(config).lora_parameters > 0


@pytest.mark.parametrize(
    ("count", "text"),
    [(5, "5 bytes"), (1_000, "1.0 kB"), (999_499, "999.5 kB"), (999_600, "1.0 MB"), (190_300_000_000, "190.3 GB")],
)
def test_bytes_are_readable(count: int, text: str) -> None:
    assert readable(count) == text
