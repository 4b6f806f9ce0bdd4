"""torchao's formats reach stacked experts, and are saved and loaded."""

from pathlib import Path
from typing import Any

import pytest
import torch

from chorus_moe import ChorusForConditionalGeneration
from chorus_moe.fastpaths.quantized_weights import Quantized, stored_weight
from chorus_moe.surgery import ChorusQuantizationConfig, bytes_report
from tests.conftest import tiny_batch, tiny_config

REASON = "torchao is not installed; .ci/matrix quantization runs this"


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    return model(**tiny_batch(tiny_config())).logits


@pytest.mark.parametrize("name", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_torchao_reaches_stacked_experts_and_leaves_towers(name: str, tmp_path: Path, capsys: Any) -> None:
    quantization = pytest.importorskip("torchao.quantization", reason=REASON)
    from transformers import TorchAoConfig

    torch.manual_seed(0)
    whole = ChorusForConditionalGeneration(tiny_config()).eval()
    whole.save_pretrained(tmp_path / "whole")
    asked = TorchAoConfig(quant_type=getattr(quantization, name)())
    model = ChorusForConditionalGeneration.from_pretrained(tmp_path / "whole", quantization_config=asked)
    groups = bytes_report(model).groups
    assert groups["experts:text"].numbers.keys() == {"Int8Tensor"}
    assert groups["attention"].numbers.keys() == {"Int8Tensor"}
    assert all(groups[part].numbers.keys() == {"float32"} for part in ("vision_tower", "routers", "norms"))
    assert "experts:text" in capsys.readouterr().err
    expected, found = logits_of(whole), logits_of(model)
    assert 0 < (found - expected).norm() / expected.norm() < 0.05
    model.save_pretrained(tmp_path / "small")
    assert torch.equal(logits_of(ChorusForConditionalGeneration.from_pretrained(tmp_path / "small")), found)


def test_a_configuration_without_groups_is_refused() -> None:
    with pytest.raises(ValueError, match="give groups"):
        ChorusQuantizationConfig()


@torch.no_grad()
def test_experts_round_what_torchao_rounds(tmp_path: Path) -> None:
    quantization = pytest.importorskip("torchao.quantization", reason=REASON)
    from transformers import TorchAoConfig

    torch.manual_seed(0)
    ChorusForConditionalGeneration(tiny_config()).eval().save_pretrained(tmp_path)
    asked = TorchAoConfig(quant_type=quantization.Int8DynamicActivationInt8WeightConfig())
    model = ChorusForConditionalGeneration.from_pretrained(tmp_path, quantization_config=asked)
    experts = next(m for name, m in model.named_modules() if name.endswith("banks.text.experts"))
    gate_up, down = (stored_weight(experts, name) for name in ("gate_up_proj", "down_proj"))
    assert isinstance(gate_up, Quantized) and gate_up.rounds_states

    def rounded(states: torch.Tensor) -> torch.Tensor:
        scale = states.abs().amax(-1, keepdim=True) / 127
        return (states / scale).round() * scale

    states, expert = torch.randn(40, gate_up.shape[-1]), torch.zeros(40, 1, dtype=torch.long)
    hidden = rounded(states) @ gate_up[0].dequantize().t()
    active = rounded(experts._apply_gate(hidden))
    expected = active @ down[0].dequantize().t()
    found = experts(states, expert, torch.ones(40, 1))
    # An activation on the edge between two whole numbers may fall to either side.
    assert ((found - expected).norm() / expected.norm()).item() < 2e-3
    unrounded = experts._apply_gate(states @ gate_up[0].dequantize().t()) @ down[0].dequantize().t()
    assert ((found - unrounded).norm() / unrounded.norm()).item() > 4e-3


def test_experts_refuse_activations_that_torchao_rounds_around_another_number() -> None:
    quantization = pytest.importorskip("torchao.quantization", reason=REASON)
    from torchao.quantization import MappingType

    experts = torch.nn.Module()
    experts.stack = torch.nn.Parameter(torch.randn(2, 64, 64), requires_grad=False)
    asked = quantization.Int8DynamicActivationInt8WeightConfig(act_mapping_type=MappingType.ASYMMETRIC)
    quantization.quantize_(experts, quantization.FqnToConfig({"stack": asked}), filter_fn=None)
    with pytest.raises(ValueError, match="by row around zero, not with .*ASYMMETRIC"):
        stored_weight(experts, "stack")
