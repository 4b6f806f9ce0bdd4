"""Small sliding-window models."""

from typing import Any

import pytest
import torch

from chorus_moe import ChorusForConditionalGeneration
from chorus_moe.fastpaths import attention_blocks
from chorus_moe.modeling.moe_routers import Router
from tests.conftest import tiny_config

WINDOW = 6
KINDS = ["sliding_attention", "full_attention", "sliding_attention"]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of four queries, so that short sequences have many."""
    monkeypatch.setattr(attention_blocks, "block_size", lambda window: 4)


def windowed_model(attention: str = "sdpa", **text: Any) -> ChorusForConditionalGeneration:
    """A model with two sliding layers, away from its start: zeros and ones hide faults."""
    torch.manual_seed(0)
    config = tiny_config(**{"layer_types": KINDS, "sliding_window": WINDOW} | text)
    model = ChorusForConditionalGeneration._from_config(config, attn_implementation=attention).eval()
    for parameter in model.parameters():
        parameter.data.mul_(1.5).add_(torch.randn_like(parameter), alpha=0.02)
    model.generation_config.eos_token_id = None
    return model


def make_model(dtype: torch.dtype = torch.float32, **text: Any) -> ChorusForConditionalGeneration:
    """A model whose weights are away from their start: norms of one and biases of zero hide faults."""
    torch.manual_seed(0)
    model = ChorusForConditionalGeneration(tiny_config(**text)).eval().to(dtype)
    model.generation_config.eos_token_id = None
    for parameter in model.parameters():
        parameter.data.mul_(1.5).add_(torch.randn_like(parameter), alpha=0.02)
    for router in (part for part in model.modules() if isinstance(part, Router)):
        if router.e_score_correction_bias is not None:
            router.e_score_correction_bias.normal_(std=0.1)
    return model
