"""A small processor and small media for the tests of the processors."""

import io
from itertools import groupby
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

from chorus_moe.processors import ChorusProcessor
from chorus_moe.surgery.processor import processor_from_config
from chorus_moe.surgery.tokenizer import build_tokenizer

RATE = 16_000
CORPUS = ["which digit is written in the image and which one is spoken", "the sum of both, yes or no"]


def tone(seconds: float, hertz: float = 440.0, rate: int = RATE) -> np.ndarray:
    """A sine (samples,) in float32."""
    return np.sin(2 * np.pi * hertz * (np.arange(max(int(seconds * rate), 1)) + 1) / rate).astype(np.float32)


def wav_bytes(samples: np.ndarray, rate: int = RATE, **options: Any) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format="WAV", **options)
    return buffer.getvalue()


def picture(width: int = 9, height: int = 6, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def model_config(**audio: Any) -> SimpleNamespace:
    """What `processor_from_config` reads of a ChorusConfig."""
    settings = {
        "feature_type": "log_mel",
        "do_normalize": False,
        "sampling_rate": RATE,
        "n_fft": 400,
        "hop_length": 160,
        "max_seconds": 2.0,
        "num_mel_bins": 20,
        "convolutions": [],
    }
    return SimpleNamespace(
        vision_config=SimpleNamespace(num_image_tokens=4, image_size=16, num_channels=3),
        audio_config=SimpleNamespace(**{**settings, "frames_per_token": 8, **audio}),
        image_token_id=3,
        audio_token_id=4,
    )


@pytest.fixture(scope="module")
def processor() -> ChorusProcessor:
    return processor_from_config(model_config(), build_tokenizer(CORPUS, vocab_size=320))


def spoken_text(processor: ChorusProcessor, batch, row: int = 0) -> str:
    """The labelled text of one row; `|` where the labels have a gap."""
    runs = groupby((int(label) for label in batch["labels"][row]), key=lambda label: label != -100)
    return "|".join(processor.tokenizer.decode(list(run)) for is_label, run in runs if is_label)


def user(*parts) -> dict:
    return {
        "role": "user",
        "content": [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts],
    }


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


IMAGE = {"type": "image", "image": picture()}
CLIP = {"type": "audio", "audio": tone(0.5), "sampling_rate": RATE}
