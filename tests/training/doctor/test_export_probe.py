"""The program that loads an export where the package does not exist."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import nn

from chorus_moe.training.doctor.export_probe import Refuse, main


@pytest.mark.parametrize("name", ["chorus_moe", "chorus_moe.modeling.losses"])
def test_the_package_is_refused_whatever_is_installed(name: str) -> None:
    with pytest.raises(ModuleNotFoundError, match=f"{name} is hidden"):
        Refuse().find_spec(name)


@pytest.mark.parametrize("name", ["chorus_moe_other", "transformers", "other.chorus_moe"])
def test_other_modules_are_found_by_others(name: str) -> None:
    assert Refuse().find_spec(name) is None  # type: ignore[func-returns-value]


class Export(nn.Module):
    def forward(self, input_ids: torch.Tensor) -> Any:
        assert not self.training and torch.get_num_threads() == 1 and not torch.is_grad_enabled()
        return type("Outputs", (), {"logits": input_ids.float()})


def test_the_difference_is_a_share_of_the_spread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []

    def load(source: str, **options: Any) -> Export:
        # The package is hidden before the first file of the export is read.
        assert isinstance(sys.meta_path[0], Refuse)
        asked.append((source, options))
        return Export()

    for name in ("AutoModelForMultimodalLM", "AutoProcessor"):
        monkeypatch.setattr(transformers, name, type(name, (), {"from_pretrained": staticmethod(load)}))
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    expected = torch.tensor([[0.0, 2.0], [4.0, 6.0]])
    stored = tmp_path / "expected.safetensors"
    save_file({"input_ids": expected.long() + 3, "logits": expected}, stored)
    main(["export", str(stored), "cpu", "1"])
    said = json.loads(capsys.readouterr().out)
    assert said == {"difference": pytest.approx(3 / float(expected.double().std()))}
    assert asked == [("export", {"trust_remote_code": True})] * 2
