"""The processor of a configuration: each setting comes from the part of the model that it serves."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from chorus_moe.surgery.processor import processor_from_config
from chorus_moe.surgery.tokenizer import build_tokenizer
from tests.conftest import tiny_config


@pytest.fixture(scope="module")
def built() -> PreTrainedTokenizerFast:
    return build_tokenizer(["what is it?"], vocab_size=300)


@pytest.fixture
def tokenizer(built: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    return copy.deepcopy(built)


def vision(**values: Any) -> Any:
    return SimpleNamespace(**{"image_size": 48, "num_channels": 1, "num_image_tokens": 7} | values)


def audio(**values: Any) -> Any:
    given: dict[str, Any] = {
        "feature_type": "log_mel", "do_normalize": False, "sampling_rate": 8_000, "n_fft": 200, "hop_length": 80,
        "max_seconds": 3.5, "num_mel_bins": 20, "frames_per_token": 6, "convolutions": None,
    }  # fmt: skip
    return SimpleNamespace(**given | values)


def config_of(**values: Any) -> Any:
    given = {"vision_config": None, "audio_config": None, "image_token_id": None, "audio_token_id": None}
    return SimpleNamespace(**given | values)


def test_settings_are_those_of_the_towers(tokenizer: PreTrainedTokenizerFast) -> None:
    found = processor_from_config(config_of(vision_config=vision(), audio_config=audio()), tokenizer)
    image, sound = found.image_processor, found.feature_extractor
    assert (image.size["height"], image.size["width"], image.num_channels) == (48, 48, 1)
    assert (found.num_image_tokens, found.frames_per_token, found.audio_convolutions) == (7, 6, [])
    assert (sound.sampling_rate, sound.n_fft, sound.hop_length, sound.feature_size) == (8_000, 200, 80, 20)
    assert (sound.max_seconds, sound.do_normalize, sound.feature_type) == (3.5, False, "log_mel")
    assert found.tokenizer is tokenizer and tokenizer.padding_side == "left"


def test_a_tower_that_is_not_there_sets_nothing(tokenizer: PreTrainedTokenizerFast) -> None:
    plain = processor_from_config(SimpleNamespace(image_token_id=None, audio_token_id=None), tokenizer)  # type: ignore[arg-type]
    assert (plain.num_image_tokens, plain.frames_per_token) == (None, None)
    assert processor_from_config(config_of(vision_config=vision()), tokenizer).frames_per_token is None
    assert processor_from_config(config_of(audio_config=audio()), tokenizer).num_image_tokens is None


@pytest.mark.parametrize(
    ("overrides", "read"),
    [
        ({"num_image_tokens": 9}, lambda p: p.num_image_tokens),
        ({"frames_per_token": 3}, lambda p: p.frames_per_token),
        ({"image_mean": [0.1]}, lambda p: p.image_processor.image_mean),
        ({"n_fft": 256}, lambda p: p.feature_extractor.n_fft),
        ({"chat_template": "{{ messages }}"}, lambda p: p.chat_template),
        ({"image_token": "<pic>"}, lambda p: p.image_token),
        ({"audio_token": "<snd>"}, lambda p: p.audio_token),
    ],
)
def test_an_override_reaches_its_part(overrides: dict[str, Any], read: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    config = config_of(vision_config=vision(), audio_config=audio())
    found = read(processor_from_config(config, tokenizer, **overrides))
    expected = next(iter(overrides.values()))
    assert found == expected or list(found) == expected


def test_audio_seconds_reach_the_extractor(tokenizer: PreTrainedTokenizerFast) -> None:
    found = processor_from_config(config_of(audio_config=audio()), tokenizer, max_seconds=2.0)
    assert found.feature_extractor.max_seconds == 2.0


def test_what_no_part_knows_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(TypeError, match="processor_from_config got n_ffft=3, which no part of the processor knows"):
        processor_from_config(config_of(), tokenizer, n_ffft=3)


def test_ids_are_those_that_the_model_looks_for(tokenizer: PreTrainedTokenizerFast) -> None:
    config = tiny_config(vocab_size=len(tokenizer))
    processor_from_config(config, tokenizer)
    config.audio_token_id = 7
    with pytest.raises(ValueError, match="the tokenizer gives <audio> the id 4, the config expects 7"):
        processor_from_config(config, tokenizer)
    config.image_token_id = 0
    with pytest.raises(ValueError, match="the tokenizer gives <image> the id 3, the config expects 0"):
        processor_from_config(config, tokenizer)


def test_tokens_that_are_missing_are_added(tokenizer: PreTrainedTokenizerFast) -> None:
    before = len(tokenizer)
    processor_from_config(config_of(), tokenizer)
    assert len(tokenizer) == before
    processor_from_config(config_of(image_token_id=before), tokenizer, image_token="<pic>")
    assert tokenizer.convert_tokens_to_ids("<pic>") == before and len(tokenizer) == before + 1
