"""A tiny contrastive model, and pairs with texts that repeat."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast

from chorus_moe import ChorusConfig, ChorusForContrastive

TEXTS = ("three", "four", "five", "three", "four five", "five")


def make_pair(index: int, *names: str) -> dict[str, Any]:
    """Text, image and clip number `index`, or those of them that are named."""
    rng = np.random.default_rng(index)
    image = Image.fromarray(rng.integers(0, 255, (24, 24, 3), dtype=np.uint8))
    tone = np.sin(np.arange(1_500 + 300 * index) * 0.1 * (index + 1)) + rng.normal(0, 0.01, 1_500 + 300 * index)
    sound = {"array": 0.1 * tone.astype(np.float32), "sampling_rate": 16_000}
    pair = {"text": TEXTS[index % len(TEXTS)], "image": image, "audio": sound}
    return {name: pair[name] for name in names or pair}


@pytest.fixture
def contrastive(tokenizer: PreTrainedTokenizerFast, config: ChorusConfig) -> ChorusForContrastive:
    torch.manual_seed(0)
    return ChorusForContrastive(config).eval()
