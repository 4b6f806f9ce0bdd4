"""Options of a raw call: padding, cutting, what is returned, and how many tokens a clip has, by torch's own layers."""

from typing import Any

import numpy as np
import pytest
import torch

from chorus_moe.processors import ChorusImageProcessor, ChorusProcessor, MediaError, MediaLimits
from chorus_moe.surgery.processor import processor_from_config
from chorus_moe.surgery.tokenizer import build_tokenizer
from tests.processors.conftest import CORPUS, RATE, model_config, picture, tone


def fresh(**tokenizer: Any) -> ChorusProcessor:
    return processor_from_config(model_config(), build_tokenizer(CORPUS, vocab_size=320, **tokenizer))


WORDS = "which digit is written in the image"


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("options", "length"),
    [
        ({}, None),
        ({"padding": True}, None),
        ({"padding": "longest"}, None),
        ({"padding": "longest", "pad_to_multiple_of": 16}, 16),
        ({"padding": "max_length", "max_length": 30}, 30),
        ({"padding": "max_length", "max_length": 30, "pad_to_multiple_of": 8}, 32),
    ],
)
def test_rows_are_padded_as_tokenizers_pad_them(processor, side: str, options: dict[str, Any], length: int | None):
    rows = processor(text=["a", WORDS], padding=False)["input_ids"]
    target = length or max(map(len, rows))
    batch = processor(text=["a", WORDS], padding_side=side, return_tensors="pt", **options)
    for row, ids in enumerate(rows):
        fill = [processor.tokenizer.pad_token_id] * (target - len(ids))
        assert batch["input_ids"][row].tolist() == (fill + ids if side == "left" else ids + fill)
        assert batch["attention_mask"][row].sum() == len(ids) and batch["mm_token_type_ids"][row].sum() == 0


@pytest.mark.parametrize("padding", [False, "do_not_pad"])
def test_rows_stay_as_they_are_where_nobody_pads(processor, padding: Any):
    lengths = [len(ids) for ids in processor(text=["a", WORDS], padding=padding)["input_ids"]]
    assert lengths[0] < lengths[1]


@pytest.mark.parametrize(
    ("truncation", "cuts"),
    [(True, True), ("longest_first", True), ("do_not_truncate", False), (False, False), (None, False)],
)
def test_text_is_cut_where_it_is_asked_for(truncation: Any, cuts: bool):
    processor = fresh()
    full = processor(text=WORDS)["input_ids"][0]
    options = {} if truncation is None else {"truncation": truncation}
    assert processor(text=WORDS, max_length=6, **options)["input_ids"][0] == (full[:6] if cuts else full)
    processor.tokenizer.truncation_side = "left"
    assert processor(text=WORDS, max_length=6, **options)["input_ids"][0] == (full[-6:] if cuts else full)
    # Without a limit of its own or the call's there is nothing to cut at.
    assert processor(text=WORDS, **options)["input_ids"][0] == full


def test_what_is_returned_is_what_was_asked_for(processor):
    names = {"input_ids", "attention_mask"}
    assert set(processor(text="a", return_mm_token_type_ids=False)) == names
    found = processor(text="see <image>", images=picture(), return_text_replacement_offsets=True)
    assert set(found) == names | {"mm_token_type_ids", "pixel_values", "text_replacement_offsets"}
    assert len(found["text_replacement_offsets"]) == 1
    assert isinstance(processor(text="a")["input_ids"], list)
    with pytest.raises(MediaError, match="^sample 1: text must be a string, found int$"):
        processor(text=["a", 3])


@pytest.mark.parametrize("convolutions", [[], [[10, 5], [3, 2]]])
@pytest.mark.parametrize("samples", [1, 49, 50, 60, 16_000, 40_001])
def test_a_clip_has_the_tokens_that_convolutions_leave_of_each_window(convolutions: list, samples: int):
    processor = fresh()
    processor.audio_convolutions = convolutions
    extractor = processor.feature_extractor
    total = 0
    for frames in extractor.frames_per_window(samples):
        maps = torch.zeros(1, 1, frames)
        for kernel, stride in convolutions:
            enough = torch.nn.functional.pad(maps, (0, max(kernel - maps.shape[2], 0)))
            maps = torch.nn.functional.conv1d(enough, torch.zeros(1, 1, kernel), stride=stride)
        total += -(-maps.shape[2] // processor.frames_per_token)
    assert processor.num_audio_tokens_for(samples) == total
    assert processor.replace_audio_token([np.zeros(samples)]) == "<audio>" * total


def test_counts_for_serving_are_of_what_was_given(processor):
    assert processor.num_image_tokens_for() == 4 and processor.num_image_tokens_for(3) == 12
    counts = processor._get_num_multimodal_tokens(image_sizes=[(1, 1)] * 2)
    assert (counts.num_image_tokens, counts.num_image_patches) == ([4, 4], [1, 1])
    for name, call, modality in (
        ("num_image_tokens", "num_image_tokens_for", "image"),
        ("frames_per_token", "num_audio_tokens_for", "audio"),
    ):
        without = fresh()
        setattr(without, name, None)
        with pytest.raises(MediaError, match=rf"\({name} is None\)$") as caught:
            getattr(without, call)(1)
        assert caught.value.modality == modality


def test_a_sample_may_have_the_last_pixel_and_second(processor):
    limits = processor.limits
    clip = {"array": tone(0.5), "sampling_rate": RATE}
    try:
        processor.limits = MediaLimits(sample_pixels=1_800, sample_seconds=1.0)
        assert processor.feature_extractor.limits is processor.image_processor.limits is processor.limits
        processor(text="<image><image><audio><audio>", images=[picture(30, 30)] * 2, audio=[clip] * 2)
    finally:
        processor.limits = limits


def test_a_tokenizer_that_does_not_keep_a_placeholder_whole_is_named(monkeypatch: pytest.MonkeyPatch):
    processor = fresh()
    cut = lambda *given, **options: {"input_ids": [[5], [3, 3, 3, 5]], "attention_mask": [[1], [1] * 4]}  # noqa: E731
    monkeypatch.setattr(type(processor.tokenizer), "__call__", cut)
    with pytest.raises(
        MediaError, match="^sample 1: the tokenizer made 3 image tokens of 4 <image>; register the token"
    ):
        processor(text=["a", "<image>"], images=[[], [picture()]])


@pytest.mark.parametrize("token", ["image_token", "audio_token"])
def test_a_media_token_that_the_tokenizer_lacks_is_named(token: str):
    with pytest.raises(
        ValueError, match=r"^the tokenizer has no token <other>; add_media_tokens\(tokenizer\) adds it$"
    ):
        ChorusProcessor(tokenizer=build_tokenizer(CORPUS, vocab_size=320), **{token: "<other>"})


def test_parts_that_were_not_given_are_made():
    processor = ChorusProcessor(tokenizer=build_tokenizer(CORPUS, vocab_size=320))
    assert processor.num_image_tokens is processor.frames_per_token is None and processor.audio_convolutions == []
    assert isinstance(processor.image_processor, ChorusImageProcessor) and processor.feature_extractor.hop_length == 160
    assert (processor.image_token_id, processor.audio_token_id) == (3, 4)
    for media, reason in (({"images": picture()}, "sees no images"), ({"audio": tone(0.1)}, "hears nothing")):
        with pytest.raises(MediaError, match=f"^sample 0: this model {reason}$"):
            processor(**media, sampling_rate=RATE)
