"""torchao's formats reach stacked experts, and are saved and loaded."""

from pathlib import Path
from typing import Any

import pytest
import torch

from chorus_moe import ChorusForConditionalGeneration
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
