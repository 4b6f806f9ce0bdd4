"""Placeholders equal features, over random samples: a batch runs through a model, or one named sample is refused."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from chorus_moe import ChorusConfig, ChorusForConditionalGeneration, ChorusProcessor
from chorus_moe.processors import MediaError
from chorus_moe.surgery.processor import processor_from_config
from chorus_moe.surgery.tokenizer import build_tokenizer
from tests.conftest import tiny_config
from tests.processors.conftest import CORPUS, RATE, picture, tone

NUM_SAMPLES, BATCH_SIZE = 300, 6
IMAGE_TOKENS, WINDOW_FRAMES, FRAMES_PER_TOKEN, HOP = 4, 200, 8, 160
ALPHABET = "abc xyz \n.,0123456789 äß€漢😀\u200d<>|/&"


@dataclass
class Sample:
    """Words and placeholders in any order, and what they stand for."""

    text: str
    images: list[Image.Image] = field(default_factory=list)
    clips: list[np.ndarray] = field(default_factory=list)

    @property
    def num_image_tokens(self) -> int:
        return IMAGE_TOKENS * len(self.images)

    @property
    def num_audio_tokens(self) -> int:
        """Counted anew: windows of 2 s, 10 ms a frame, 8 frames a token, the last one of a window begun counts."""
        frames = [-(-len(clip) // HOP) for clip in self.clips]
        windows = [min(WINDOW_FRAMES, count - start) for count in frames for start in range(0, count, WINDOW_FRAMES)]
        return sum(-(-window // FRAMES_PER_TOKEN) for window in windows)

    @property
    def num_media_tokens(self) -> int:
        return self.num_image_tokens + self.num_audio_tokens

    def reason_against(self, max_length: int) -> str | None:
        """Why this sample is no input of a model, as the beginning of the error; None if it is one."""
        if any(max(image.size) > 100 * min(image.size) for image in self.images):
            return r"\d+ x \d+: aspect ratio \d+, the limit is 100"
        if self.num_media_tokens > max_length:
            return f"images and clips alone take {self.num_media_tokens} tokens, max_length is {max_length};"
        return None if self.text else "found 0 tokens, expected at least 1:"


def random_text(rng: random.Random) -> str:
    if rng.random() < 0.5:
        return rng.choice(CORPUS)
    return "".join(rng.choices(ALPHABET, k=rng.randint(0, 60)))


def random_sample(rng: random.Random) -> Sample:
    """0-3 images of 1 to 200 pixels a side, 0-2 clips of 0.05 to 40 s (short ones as often as long ones), 0-3 texts."""
    images = [picture(rng.randint(1, 200), rng.randint(1, 200)) for _ in range(rng.randint(0, 3))]
    clips = [tone(0.05 * 800 ** rng.random()) for _ in range(rng.choice([0, 0, 1, 2]))]
    pieces = ["<image>"] * len(images) + ["<audio>"] * len(clips)
    pieces += [random_text(rng) for _ in range(rng.randint(0, 3))]
    rng.shuffle(pieces)
    return Sample(" ".join(pieces), images, clips)


@pytest.fixture(scope="module")
def config() -> ChorusConfig:
    config = tiny_config(vocab_size=320, max_position_embeddings=4_096)
    vision, audio, text = (part.to_dict() for part in (config.vision_config, config.audio_config, config.text_config))
    return ChorusConfig(
        text_config=text,
        vision_config=vision,
        audio_config={**audio, "pool_size": 2, "max_seconds": 2.0},
        image_token_id=config.image_token_id,
        audio_token_id=config.audio_token_id,
    )


@pytest.fixture(scope="module")
def model(config: ChorusConfig) -> ChorusForConditionalGeneration:
    torch.manual_seed(0)
    return ChorusForConditionalGeneration(config).eval()


@pytest.fixture(scope="module")
def processor(config: ChorusConfig) -> ChorusProcessor:
    return processor_from_config(config, build_tokenizer(CORPUS, vocab_size=320))


def encode(processor: ChorusProcessor, samples: list[Sample], **options: Any) -> Any:
    return processor(
        text=[sample.text for sample in samples],
        images=[sample.images for sample in samples],
        audio=[sample.clips for sample in samples],
        sampling_rate=RATE,
        return_tensors="pt",
        **options,
    )


def test_random_samples_run_through_a_model_or_are_refused_by_name(
    processor: ChorusProcessor, model: ChorusForConditionalGeneration
) -> None:
    rng = random.Random(0)
    outcomes = {"whole": 0, "cut": 0, "refused": 0}
    for _ in range(NUM_SAMPLES // BATCH_SIZE):
        samples = [random_sample(rng) for _ in range(BATCH_SIZE)]
        limit = int(2 ** rng.uniform(0, 11))
        accepted = list(refuse(processor, samples, limit))
        outcomes["refused"] += len(samples) - len(accepted)
        if not accepted:
            continue
        batch = encode(processor, accepted, truncation=True, max_length=limit)
        full = encode(processor, accepted)
        check_counts(batch, accepted)
        check_media_are_whole(batch, full)
        check_forward(model, batch, accepted)
        lengths = batch["attention_mask"].sum(1)
        assert lengths.max() <= limit
        num_cut = int((full["attention_mask"].sum(1) > lengths).sum())
        outcomes["cut"] += num_cut
        outcomes["whole"] += len(accepted) - num_cut
    assert sum(outcomes.values()) == NUM_SAMPLES
    assert min(outcomes.values()) > 30, outcomes


def refuse(processor: ChorusProcessor, samples: list[Sample], limit: int) -> Iterator[Sample]:
    """The samples that fit; each of the others, put in a batch, is refused by its place and both numbers."""
    for sample in samples:
        reason = sample.reason_against(limit)
        if reason is None:
            yield sample
            continue
        place = len(samples) // 2
        others = [Sample("words")] * place
        with pytest.raises(MediaError, match=rf"^sample {place}\b.*: {reason}") as caught:
            encode(processor, [*others, sample, *others], truncation=True, max_length=limit)
        assert caught.value.sample == place


def check_counts(batch: Any, samples: list[Sample]) -> None:
    types = batch["mm_token_type_ids"]
    assert (types == 1).sum(1).tolist() == [sample.num_image_tokens for sample in samples]
    assert (types == 3).sum(1).tolist() == [sample.num_audio_tokens for sample in samples]


def check_media_are_whole(cut: Any, full: Any) -> None:
    """Media tensors and the rows of media tokens are bit-equal before and after truncation."""
    assert cut.keys() == full.keys()
    for name in {"pixel_values", "input_features", "input_features_mask"} & full.keys():
        assert torch.equal(cut[name], full[name]), name
    for short, short_types, long, long_types in zip(
        cut["input_ids"], cut["mm_token_type_ids"], full["input_ids"], full["mm_token_type_ids"], strict=True
    ):
        assert torch.equal(short[short_types > 0], long[long_types > 0])


@torch.no_grad()
def check_forward(model: ChorusForConditionalGeneration, batch: Any, samples: list[Sample]) -> None:
    outputs = model(**batch)
    images, audio = outputs.image_hidden_states, outputs.audio_hidden_states
    assert (0 if images is None else images.shape[:2].numel()) == sum(sample.num_image_tokens for sample in samples)
    assert (0 if audio is None else len(audio)) == sum(sample.num_audio_tokens for sample in samples)
    assert torch.isfinite(outputs.logits[batch["attention_mask"].bool()]).all()


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (Sample("an <image> too many"), "found 1 image placeholder for 0 images"),
        (Sample("an image too many", [picture()]), "found 0 image placeholders for 1 images"),
        (Sample("<audio><audio>", clips=[tone(0.5)]), "found 2 audio placeholders for 1 clips"),
        (Sample("<audio>", clips=[tone(0.5), tone(0.1)]), "found 1 audio placeholder for 2 clips"),
        (Sample("<audio> <image>", [picture()]), "found 1 audio placeholder for 0 clips"),
        (Sample(""), "found 0 tokens, expected at least 1: no words, images or clips are left"),
    ],
)
def test_a_sample_that_does_not_fit_is_named_among_random_ones(
    processor: ChorusProcessor, bad: Sample, reason: str
) -> None:
    rng = random.Random(1)
    samples = [random_sample(rng) for _ in range(4)]
    with pytest.raises(MediaError, match=f"sample 2: {reason}"):
        encode(processor, [*samples[:2], bad, *samples[2:]], truncation=True, max_length=64)
