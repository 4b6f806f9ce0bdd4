"""One line per token, with a mark where it is learned."""

import pytest
import torch

from chorus_moe import ChorusProcessor
from chorus_moe.training.labels import explain_labels, pair_tokens


def test_every_token_is_printed_once(processor: ChorusProcessor, capsys: pytest.CaptureFixture[str]) -> None:
    words = processor.tokenizer("7", add_special_tokens=False).input_ids
    ids = torch.tensor([processor.image_token_id] * 4 + words + [processor.tokenizer.eos_token_id])
    labels = ids.clone()
    labels[:4] = -100
    text = explain_labels(processor.tokenizer, ids, labels)
    assert capsys.readouterr().out == text + "\n"
    assert text.splitlines() == ["      '<image> x 4'", "label '7'", "label '</s>'"]


def test_runs_are_shown_once() -> None:
    assert pair_tokens(["a", "i", "i", "b"], [-100, -100, -100, 8]) == [("a", False), ("i x 2", False), ("b", True)]
