"""Reports come from a configuration alone."""

import json
from pathlib import Path

import pytest

from chorus_moe import ChorusForConditionalGeneration
from chorus_moe.training.inspect_model import inspect_model


def test_a_configuration_is_enough(model: ChorusForConditionalGeneration, tmp_path: Path) -> None:
    model.config.save_pretrained(tmp_path)
    for source in (tmp_path, tmp_path / "config.json"):
        report, sizes = inspect_model(source)
        assert report.total == sizes.parameters == sum(p.numel() for p in model.parameters())


def test_what_is_no_chorus_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no model at .*: there is no such folder"):
        inspect_model(tmp_path / "config.json")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match="is a 'llama', expected 'chorus'"):
        inspect_model(tmp_path)
