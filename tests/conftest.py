"""Small models and inputs that every test may ask for."""

import os
from typing import Any

# Of several processes of tests each gets its share of the cores, and so do the processes that they start.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    share = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, share)))

import pytest
import torch
from torch import Tensor

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from benchmarks.same_bits import AUDIO, AUDIO_TOKEN, IMAGE_TOKEN, TEXT, VISION
from chorus_moe import ChorusConfig, ChorusForConditionalGeneration

pytest_plugins = ["tests.fake_hub", "tests.transformers_suite"]

# Matrix libraries sum a row in another order when its neighbours, their number or its address change: up to 3e-7 here.
# What really reaches a position moves its logits by 3e-3 at least.
ROUNDING = 1e-5


def moved(before: Tensor, after: Tensor) -> Tensor:
    """Which positions `(...,)` of `(..., width)` differ by more than rounding."""
    return ((before - after).abs() > ROUNDING).any(dim=-1)


def override(monkeypatch: pytest.MonkeyPatch, table: Any, name: str, function: Any) -> None:
    """Put a function into one of transformers' tables for a test; an item set by itself would stay there."""
    monkeypatch.setattr(table, "_local_mapping", {**table._local_mapping, name: function})


def tiny_config(**text: Any) -> ChorusConfig:
    """A trimodal configuration of some 300,000 parameters; keyword arguments go to the text part."""
    return ChorusConfig(
        text_config=TEXT | text,
        vision_config=VISION,
        audio_config=AUDIO,
        image_token_id=IMAGE_TOKEN,
        audio_token_id=AUDIO_TOKEN,
    )


def tiny_batch(config: ChorusConfig, seed: int = 0, length: int = 24) -> dict[str, torch.Tensor]:
    """Three samples: text with an image, text with a clip, text with an image, a clip and left padding."""
    generator = torch.Generator().manual_seed(seed)
    image_tokens = config.vision_config.num_image_tokens
    frames = [11, 20]
    audio_tokens = [config.audio_config.num_audio_tokens(n) for n in frames]
    input_ids = torch.randint(5, config.text_config.vocab_size, (3, length), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    input_ids[0, 2 : 2 + image_tokens] = IMAGE_TOKEN
    input_ids[1, 4 : 4 + audio_tokens[0]] = AUDIO_TOKEN
    input_ids[2, :5], attention_mask[2, :5] = 0, 0
    input_ids[2, 6 : 6 + image_tokens] = IMAGE_TOKEN
    input_ids[2, 12 : 12 + audio_tokens[1]] = AUDIO_TOKEN
    mm_token_type_ids = (input_ids == IMAGE_TOKEN).long() + 3 * (input_ids == AUDIO_TOKEN).long()
    labels = input_ids.masked_fill((mm_token_type_ids > 0) | (attention_mask == 0), -100)
    features_mask = torch.arange(max(frames))[None, :] < torch.tensor(frames)[:, None]
    features = torch.randn(2, max(frames), config.audio_config.num_mel_bins, generator=generator)
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "mm_token_type_ids": mm_token_type_ids,
        "pixel_values": torch.randn(2, 3, 32, 32, generator=generator),
        "input_features": features * features_mask[..., None],
        "input_features_mask": features_mask.long(),
        "labels": labels,
    }


@pytest.fixture
def config() -> ChorusConfig:
    return tiny_config()


@pytest.fixture
def model(config: ChorusConfig) -> ChorusForConditionalGeneration:
    torch.manual_seed(0)
    return ChorusForConditionalGeneration(config).eval()


@pytest.fixture
def batch(config: ChorusConfig) -> dict[str, torch.Tensor]:
    return tiny_batch(config)
