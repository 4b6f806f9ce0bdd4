"""A small model whose answers depend on every picture and clip, an adapter on it, and media."""

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image

from chorus_moe import ChorusForConditionalGeneration
from chorus_moe.surgery import build_tokenizer, processor_from_config
from tests.conftest import tiny_config
from tests.processors.conftest import wav_bytes

WORDS = ["what is it? three four five what do you see and what do you hear"]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of large random weights: another picture gives another answer."""
    path = tmp_path_factory.mktemp("served") / "tiny"
    tokenizer = build_tokenizer(WORDS, vocab_size=300)
    torch.manual_seed(0)
    model = ChorusForConditionalGeneration(tiny_config(vocab_size=len(tokenizer), initializer_range=0.2))
    model.save_pretrained(path)
    processor_from_config(model.config, tokenizer).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def adapter(folder: Path) -> Path:
    torch.manual_seed(1)
    model = ChorusForConditionalGeneration.from_pretrained(folder)
    # Not zero at the start, so that the adapter changes answers.
    config = LoraConfig(r=4, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    path = folder.parent / "adapter"
    get_peft_model(model, config).save_pretrained(path)
    return path


def picture_file(seed: int, size: int = 32) -> bytes:
    buffer = io.BytesIO()
    colours = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(colours).resize((size, size), Image.Resampling.NEAREST).save(buffer, "PNG")
    return buffer.getvalue()


def sound_file(seed: int, seconds: float = 0.2) -> bytes:
    rng = np.random.default_rng(seed)
    time = np.arange(int(16_000 * seconds)) / 16_000
    tones = sum(np.sin(2 * np.pi * hertz * time) for hertz in rng.uniform(200, 4_000, 3))
    return wav_bytes((0.2 * tones).astype(np.float32))


def parts(text: str, images: list[bytes] = (), sounds: list[bytes] = ()) -> list[dict[str, Any]]:  # type: ignore[assignment]
    """OpenAI's parts of one message."""
    found: list[dict[str, Any]] = []
    for file in images:
        url = "data:image/png;base64," + base64.b64encode(file).decode()
        found.append({"type": "image_url", "image_url": {"url": url}})
    for file in sounds:
        found.append({"type": "input_audio", "input_audio": {"data": base64.b64encode(file).decode(), "format": "wav"}})
    return [*found, {"type": "text", "text": text}]
