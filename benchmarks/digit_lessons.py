"""Several small decoders learn the demo's questions side by side: what benchmarks of quality have in common.

Unusual here:
- the encoders learn their digits first, once a seed, and are frozen: all decoders read the same image and audio tokens;
- a batch is made and encoded once, then every decoder takes one step on it. So data and number of steps are equal, and
  the times of the steps, which are those of the decoders alone, drift together;
- decoders are scored on questions about writers and voices that none has met, by the text they generate.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn
from transformers import get_cosine_schedule_with_warmup
from transformers.modeling_outputs import BaseModelOutputWithPooling

from benchmarks.computation import ENCODERS
from benchmarks.timing import Timing
from chorus_moe.modeling.configuration_chorus import ChorusConfig
from chorus_moe.modeling.modeling_generation import ChorusForConditionalGeneration
from chorus_moe.training.collator import ChorusDataCollator
from chorus_moe.training.demo.answers import answer
from chorus_moe.training.demo.augment import PictureAugment
from chorus_moe.training.demo.data import BASE_SKILLS, DigitPictures, DigitQuestions, Sample, corpus, handwritten_digits
from chorus_moe.training.demo.encoders import EncoderLesson, LoneDigitCollator, LoneDigits
from chorus_moe.training.demo.model import build_demo
from chorus_moe.training.demo.speech import TEST_VARIANTS, SpeechClips, SynthesisSettings, synthetic_digits

# By how hard a skill is: a sum has nineteen answers, "same" two.
SKILLS = {"written": 1.3, "spoken": 0.7, "sum": 2.0, "larger": 1.0, "same": 0.8}
TRAIN_VOICES = SynthesisSettings()
TEST_VOICES = SynthesisSettings(variants=TEST_VARIANTS, languages_per_variant=3, takes=1, seed=1)
QUICK_VOICES = SynthesisSettings(variants=TEST_VARIANTS[:1], languages_per_variant=1, takes=1)
# The demo's decoder with a dense first layer, as in all the figures of docs/log.md.
DECODER: dict[str, Any] = {
    "mlp_layer_types": ["dense", "sparse", "sparse"],
    "intermediate_size": 256,
    "cross_modal_layers": [1, 2],
}

Batch = dict[str, Any]
Models = Mapping[str, ChorusForConditionalGeneration]


@dataclass(frozen=True)
class LessonSettings:
    """How much of everything; steps are optimizer steps."""

    steps: int
    encoder_steps: int
    questions_per_skill: int
    batch_size: int = 44
    lr: float = 2e-3

    @classmethod
    def read(cls, parsed: argparse.Namespace) -> "LessonSettings":
        """From the command line of [`lesson_options`]."""
        if parsed.quick:
            return cls(steps=2, encoder_steps=1, questions_per_skill=1, batch_size=6)
        return cls(parsed.steps, parsed.encoder_steps, parsed.questions)


def lesson_options(steps: int, seeds: int, questions: int = 200) -> list[tuple[str, dict[str, Any]]]:
    """What the command line of a benchmark with lessons has."""
    return [
        ("--steps", {"type": int, "default": steps, "help": f"steps of every decoder (default {steps})"}),
        ("--encoder-steps", {"type": int, "default": 400, "help": "steps of each encoder alone (default 400)"}),
        (
            "--questions",
            {"type": int, "default": questions, "help": f"held-out questions of each skill (default {questions})"},
        ),
        ("--seeds", {"type": int, "nargs": "+", "default": list(range(seeds))}),
        ("--cache", {"type": Path, "default": Path("out/bench/cache"), "help": "folder of the synthetic speech"}),
    ]


@dataclass(frozen=True)
class Media:
    """Pictures and clips to learn from, and others, by other writers and voices, to be tested on."""

    pictures: DigitPictures
    clips: SpeechClips
    test_pictures: DigitPictures
    test_clips: SpeechClips


@contextmanager
def media(parsed: argparse.Namespace) -> Iterator[Media]:
    """Real handwriting and synthetic speech, the latter spoken once and kept in the cache."""
    pictures, test_pictures = handwritten_digits()
    voices = [QUICK_VOICES, replace(QUICK_VOICES, seed=1)] if parsed.quick else [TRAIN_VOICES, TEST_VOICES]
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) if parsed.quick else parsed.cache
        clips, test_clips = (synthetic_digits(settings, cache) for settings in voices)
    yield Media(pictures, clips, test_pictures, test_clips)


def with_text(config: ChorusConfig, **changes: Any) -> ChorusConfig:
    """The configuration with another decoder: `DECODER` and `changes`."""
    values = config.to_dict()
    return ChorusConfig(**values | {"text_config": {**values["text_config"], **DECODER, **changes}})


class Lesson:
    """One seed: trained encoders, and the questions to learn and to be asked."""

    def __init__(self, found: Media, settings: LessonSettings, seed: int):
        self.settings, self.seed = settings, seed
        torch.manual_seed(seed)
        self.teacher, self.processor = build_demo(corpus())
        self.media, augment, items = found, PictureAugment(), settings.encoder_steps * settings.batch_size
        self._learn_alone("image", LoneDigits(found.pictures, items, seed=seed, picture_augment=augment))
        self._learn_alone("audio", LoneDigits(found.clips, items, seed=seed))
        self.teacher.eval().requires_grad_(False)
        self.collator = ChorusDataCollator(self.processor)
        self.questions = self._questions(seed)
        held_out = settings.questions_per_skill * len(BASE_SKILLS)
        test = DigitQuestions(found.test_pictures, found.test_clips, BASE_SKILLS, held_out, seed=seed + 7)
        self.test: list[Sample] = [test[index] for index in range(held_out)]

    def _questions(self, seed: int) -> DigitQuestions:
        count = self.settings.steps * self.settings.batch_size
        return DigitQuestions(
            self.media.pictures, self.media.clips, SKILLS, count, seed=seed, picture_augment=PictureAugment()
        )

    def again(self, seed: int, steps: int) -> "Lesson":
        """Another seed behind the same encoders: other questions to learn and other decoders, the same test."""
        other = copy(self)
        other.seed, other.settings = seed, replace(self.settings, steps=steps)
        other.questions = other._questions(seed)
        return other

    def _learn_alone(self, modality: str, digits: LoneDigits) -> None:
        lesson, collate = (
            EncoderLesson(self.teacher.model, modality).train(),
            LoneDigitCollator(self.processor, modality),
        )
        size = self.settings.batch_size
        take_step = stepper(lesson, self.settings.encoder_steps, self.settings.lr)
        for step in range(self.settings.encoder_steps):
            take_step(collate([digits[index] for index in range(step * size, (step + 1) * size)]))

    def decoder(self, config: ChorusConfig) -> ChorusForConditionalGeneration:
        """A fresh decoder behind the trained encoders, which are frozen."""
        torch.manual_seed(self.seed)
        model = ChorusForConditionalGeneration(config)
        model.generation_config = self.teacher.generation_config
        for name in ENCODERS:
            module: nn.Module = getattr(model.model, name)
            module.load_state_dict(getattr(self.teacher.model, name).state_dict())
            module.requires_grad_(False)
        return model

    @torch.no_grad()
    def encode(self, samples: Sequence[Sample]) -> Batch:
        """A batch with image and audio tokens in the place of pictures and sounds."""
        batch = self.collator(samples)
        encoded: dict[str, BaseModelOutputWithPooling] = {}
        if "pixel_values" in batch:
            encoded["image"] = self.teacher.get_image_features(batch.pop("pixel_values"))
        if "input_features" in batch:
            sound = (batch.pop(name) for name in ("input_features", "input_features_mask"))
            encoded["audio"] = self.teacher.get_audio_features(*sound)
        return {**batch, "mm_encoder_outputs": encoded}

    def learn(self, models: Models) -> dict[str, Timing]:
        """Train all models on the same batches, in turns; how long their steps took."""
        settings = self.settings
        rounds: dict[str, list[float]] = {name: [] for name in models}
        take_step = {name: stepper(model.train(), settings.steps, settings.lr) for name, model in models.items()}
        for step in range(settings.steps):
            rows = range(step * settings.batch_size, (step + 1) * settings.batch_size)
            batch = self.encode([self.questions[row] for row in rows])
            for name, seconds in rounds.items():
                start = time.thread_time()
                take_step[name](batch)
                seconds.append(time.thread_time() - start)
        return {name: Timing(median(seconds), seconds, None) for name, seconds in rounds.items()}

    def accuracies(self, model: ChorusForConditionalGeneration) -> tuple[dict[str, float], float]:
        """Skill -> share of held-out questions answered exactly, and "all"; processor seconds of one answer."""
        start = time.thread_time()
        given = answer(model, self.processor, self.test)
        seconds = (time.thread_time() - start) / len(self.test)
        marks: dict[str, list[bool]] = {"all": []}
        for sample, text in zip(self.test, given, strict=True):
            for skill in ("all", sample["skill"]):
                marks.setdefault(skill, []).append(text == sample["answer"])
        return {skill: sum(right) / len(right) for skill, right in marks.items()}, seconds

    @cached_property
    def held_out(self) -> list[Batch]:
        """The held-out questions with their answers, encoded."""
        size = self.settings.batch_size
        return [self.encode(self.test[start : start + size]) for start in range(0, len(self.test), size)]

    @torch.no_grad()
    def held_out_loss(self, model: ChorusForConditionalGeneration, **options: Any) -> float:
        """Nats for each token of the held-out answers; `options` go to the model."""
        model.eval()
        total, tokens = 0.0, 0
        for batch in self.held_out:
            count = int((batch["labels"][:, 1:] != -100).sum())
            total, tokens = total + model(**batch, **options).loss.item() * count, tokens + count
        return total / tokens


def score(lesson: Lesson, models: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """What the trained models do with the held-out questions: accuracy by skill, loss, milliseconds of an answer."""
    rows: dict[str, dict[str, float]] = {}
    for name, model in models.items():
        accuracy, seconds = lesson.accuracies(model)
        for skill, share in accuracy.items():
            rows.setdefault(skill, {})[f"{name}_accuracy"] = share
        rows.setdefault("held-out", {})[f"{name}_loss"] = lesson.held_out_loss(model)
        rows.setdefault("answer", {})[f"{name}_ms"] = seconds * 1e3
    return rows


def unit_of(values: Mapping[str, float]) -> str:
    """The unit of a row of [`score`], with which all its keys end."""
    return next(iter(values)).rpartition("_")[2]


def stepper(model: nn.Module, steps: int, lr: float) -> Any:
    """A call that takes one optimizer step on a batch, as the demo's Trainer does."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, min(100, steps // 10), steps)

    def take_step(batch: Mapping[str, Any]) -> None:
        model(**batch)["loss"].backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)

    return take_step
