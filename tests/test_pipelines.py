"""The Auto classes and the any-to-any pipeline, on a model folder as a user has it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForSequenceClassification,
    AutoProcessor,
    AutoTokenizer,
    pipeline,
)

from chorus_moe import (
    ChorusConfig,
    ChorusFeatureExtractor,
    ChorusForConditionalGeneration,
    ChorusForSequenceClassification,
    ChorusImageProcessor,
    ChorusModel,
    ChorusProcessor,
)
from chorus_moe.processors.tokenization_chorus import build_tokenizer
from tests.conftest import tiny_config

IMAGE = {"type": "image", "image": Image.new("RGB", (40, 30), (200, 20, 20))}
SOUND = np.sin(np.arange(4_000) / 5).astype(np.float32) * 0.3
AUDIO = {"type": "audio", "audio": SOUND, "sampling_rate": 16_000}
TEXT = {"type": "text", "text": "what is it?"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tokenizer = build_tokenizer(["what is it?"], vocab_size=300)
    torch.manual_seed(0)
    model = ChorusForConditionalGeneration(tiny_config(vocab_size=len(tokenizer)))
    model.save_pretrained(path)
    ChorusProcessor.from_config(model.config, tokenizer).save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("auto", "expected"),
    [
        (AutoConfig, ChorusConfig),
        (AutoModel, ChorusModel),
        (AutoModelForMultimodalLM, ChorusForConditionalGeneration),
        (AutoModelForImageTextToText, ChorusForConditionalGeneration),
        (AutoModelForSequenceClassification, ChorusForSequenceClassification),
        (AutoProcessor, ChorusProcessor),
        (AutoImageProcessor, ChorusImageProcessor),
        (AutoFeatureExtractor, ChorusFeatureExtractor),
    ],
)
def test_auto_classes_load_the_folder(folder: Path, auto: Any, expected: type) -> None:
    assert type(auto.from_pretrained(folder)) is expected


def test_auto_tokenizer_knows_the_media_tokens(folder: Path) -> None:
    assert AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids(["<image>", "<audio>"]) == [3, 4]


@pytest.mark.parametrize(
    "content",
    [[TEXT], [IMAGE, TEXT], [AUDIO, TEXT], [AUDIO, TEXT, IMAGE]],
    ids=["text", "image", "audio", "all together"],
)
def test_the_any_to_any_pipeline_answers(folder: Path, content: list[dict[str, Any]]) -> None:
    pipe = pipeline("any-to-any", model=str(folder))
    messages = [{"role": "user", "content": content}]

    answer = pipe(text=messages, max_new_tokens=3, return_full_text=False)

    assert isinstance(answer[0]["generated_text"], str)
