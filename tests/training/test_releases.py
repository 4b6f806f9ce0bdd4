"""Names of the installed transformers: the newer where it has both."""

import importlib
from typing import Any

import pytest
import transformers

from chorus_moe.training import releases


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["activation_checkpointing", "gradient_checkpointing"], "activation_checkpointing"),
        (["gradient_checkpointing"], "gradient_checkpointing"),
    ],
)
def test_the_newer_name_is_taken_where_it_is_there(
    monkeypatch: pytest.MonkeyPatch, names: list[str], expected: str
) -> None:
    stand_in: Any = type("TrainingArguments", (), dict.fromkeys(names, False))
    with monkeypatch.context() as patch:
        patch.setattr(transformers, "TrainingArguments", stand_in)
        assert expected == importlib.reload(releases).CHECKPOINTING
    found = importlib.reload(releases).CHECKPOINTING
    assert hasattr(transformers.TrainingArguments, found)
    assert hasattr(transformers.PreTrainedModel, f"{found}_enable")
