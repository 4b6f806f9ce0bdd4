"""The Auto classes and the any-to-any pipeline, on a model folder as a user has it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from PIL import Image
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
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
from chorus_moe.surgery.processor import processor_from_config
from chorus_moe.surgery.tokenizer import build_tokenizer
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
    model = ChorusForConditionalGeneration(tiny_config(vocab_size=len(tokenizer), initializer_range=0.2))
    model.save_pretrained(path)
    processor_from_config(model.config, tokenizer).save_pretrained(path)
    return path


def media_pipeline(task: str, folder: Path) -> transformers.Pipeline:
    if task == "any-to-any" and Version(transformers.__version__) < Version("5.23"):
        pytest.importorskip("librosa", reason="transformers 5.22 wants it for this pipeline of a model that hears")
    return pipeline(task, model=str(folder))


@pytest.mark.parametrize(
    ("auto", "expected"),
    [
        (AutoConfig, ChorusConfig),
        (AutoModel, ChorusModel),
        (AutoModelForMultimodalLM, ChorusForConditionalGeneration),
        (AutoModelForImageTextToText, ChorusForConditionalGeneration),
        (AutoModelForCausalLM, ChorusForConditionalGeneration),
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
    pipe = media_pipeline("any-to-any", folder)
    messages = [{"role": "user", "content": content}]

    answer = pipe(text=messages, max_new_tokens=3, return_full_text=False)

    assert isinstance(answer[0]["generated_text"], str)


LONGER = {"type": "text", "text": "what is it? what is it? it is"}
BLUE = {"type": "image", "image": Image.new("RGB", (24, 56), (10, 60, 240))}
LONGER_AUDIO = {"type": "audio", "audio": np.cos(np.arange(9_000) / 7).astype(np.float32), "sampling_rate": 16_000}


@pytest.mark.parametrize("task", ["any-to-any", "image-text-to-text"])
@pytest.mark.parametrize(
    "contents",
    [
        [[TEXT], [LONGER]],
        [[IMAGE, TEXT], [IMAGE, LONGER]],
        [[AUDIO, TEXT], [LONGER_AUDIO, LONGER]],
        [[AUDIO, IMAGE, TEXT], [IMAGE, LONGER, LONGER_AUDIO]],
        [[IMAGE, LONGER, BLUE], [BLUE, TEXT], [BLUE, IMAGE, TEXT, BLUE], [IMAGE, TEXT], [BLUE, LONGER]],
        [[BLUE, AUDIO, TEXT, IMAGE], [BLUE, LONGER, LONGER_AUDIO], [IMAGE, BLUE, BLUE, LONGER, AUDIO]],
    ],
    ids=["text", "images", "sound", "all together", "several images", "several images and sound"],
)
def test_a_batch_of_a_pipeline_answers_as_one_by_one(
    folder: Path, task: str, contents: list[list[dict[str, Any]]]
) -> None:
    pipe = media_pipeline(task, folder)
    chats = [[{"role": "user", "content": content}] for content in contents]
    options = {"return_full_text": False, "generate_kwargs": {"max_new_tokens": 4, "do_sample": False}}
    alone = [generated(pipe, chat) for chat in chats]
    for batch_size in (1, 2, 4):
        answers = pipe(text=chats, batch_size=batch_size, **options)
        assert [answer[0]["generated_text"] for answer in answers] == alone


@pytest.mark.parametrize("second", [[AUDIO, TEXT], [AUDIO, LONGER, AUDIO], [LONGER_AUDIO, LONGER]])
def test_several_clips_go_one_by_one_through_a_pipeline(folder: Path, second: list[dict[str, Any]]) -> None:
    """Of each sample in a batch, transformers' `_pad` (pipelines/base.py) keeps the first clip."""
    pipe = pipeline("image-text-to-text", model=str(folder))
    chats = [[{"role": "user", "content": content}] for content in ([LONGER_AUDIO, TEXT, AUDIO], second)]
    options = {"return_full_text": False, "generate_kwargs": {"max_new_tokens": 4, "do_sample": False}}
    answers = [answer[0]["generated_text"] for answer in pipe(text=chats, **options)]
    assert answers == [generated(pipe, chat) for chat in chats]
    with pytest.raises(ValueError, match="batch_size=1|input_features_mask"):
        pipe(text=chats, batch_size=2, **options)


def generated(pipe: transformers.Pipeline, chat: list[dict[str, Any]]) -> str:
    """The answer to one chat without a pipeline."""
    inputs = pipe.processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    tokens = pipe.model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return pipe.processor.decode(tokens, skip_special_tokens=True)


@pytest.mark.parametrize(
    "prompts", [["it", "what is it?"], [[{"role": "user", "content": "it"}]] * 2], ids=["texts", "chats"]
)
def test_a_batch_of_the_text_pipeline_answers_as_one_by_one(folder: Path, prompts: list[Any]) -> None:
    pipe = pipeline("text-generation", model=str(folder))
    assert isinstance(pipe.model, ChorusForConditionalGeneration)
    options = {"max_new_tokens": 4, "do_sample": False, "return_full_text": False}
    alone = [pipe(prompt, **options)[0]["generated_text"] for prompt in prompts]
    assert [answer[0]["generated_text"] for answer in pipe(prompts, batch_size=2, **options)] == alone
