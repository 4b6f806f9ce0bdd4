"""Small sliding-window models."""

from typing import Any

import pytest
import torch

from chorus_moe import ChorusForConditionalGeneration
from chorus_moe.modeling import block_attention
from tests.conftest import tiny_config

WINDOW = 6
KINDS = ["sliding_attention", "full_attention", "sliding_attention"]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of four queries, so that short sequences have many."""
    monkeypatch.setattr(block_attention, "block_size", lambda window: 4)


def windowed_model(attention: str = "sdpa", **text: Any) -> ChorusForConditionalGeneration:
    """A model with two sliding layers, away from its start: zeros and ones hide faults."""
    torch.manual_seed(0)
    config = tiny_config(**{"layer_types": KINDS, "sliding_window": WINDOW} | text)
    model = ChorusForConditionalGeneration._from_config(config, attn_implementation=attention).eval()
    for parameter in model.parameters():
        parameter.data.mul_(1.5).add_(torch.randn_like(parameter), alpha=0.02)
    model.generation_config.eos_token_id = None
    return model
