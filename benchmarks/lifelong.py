"""Learning a second skill without losing the first: a bank that is added, against fine-tuning the whole model.

Run as `python -m benchmarks.lifelong`. A small model learns skill A, four kinds of questions about handwritten
digits (which it is, which comes before, whether it is odd or even, whether it is larger than four). Then it learns
skill B, which digit comes after, whose answers contradict those of A, from B's questions alone:

- `full`: all of the decoder is trained;
- `chorus`: a bank is added and nothing else is trained; its gate stays open for every question;
- `full_rehearsed`, `chorus_rehearsed`: the same with a few of A's questions, always the same, in every batch.

All start from the same model and see the same batches. The encoder learns its digits first and is frozen. Accuracy is
the share of questions answered exactly, in the phrasings of the lessons, about writers that none has met; the models
with a bank are also asked A with it closed, and the logits are then compared bit for bit with those before B. `lost` is
in points.
"""

import argparse
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.digit_lessons import Batch, stepper
from benchmarks.timing import OURS, Report, parse
from chorus_moe.modeling.configuration_chorus import ChorusConfig
from chorus_moe.modeling.modeling_generation import ChorusForConditionalGeneration
from chorus_moe.training.augment import PictureAugment
from chorus_moe.training.collator import ChorusDataCollator
from chorus_moe.training.demo_answers import answer
from chorus_moe.training.demo_data import SKILLS, DigitPictures, Sample, Skill, corpus, handwritten_digits
from chorus_moe.training.demo_encoders import EncoderLesson, LoneDigitCollator, LoneDigits
from chorus_moe.training.demo_model import build_demo

PARITY = Skill(
    "parity",
    ("image",),
    lambda written, spoken: "even" if written % 2 == 0 else "odd",
    (
        "Is the written digit odd or even?",
        "Odd or even, what do you see?",
        "Tell me if the digit in the picture is odd.",
        "Look at the picture. Is the number even?",
        "Is the number you see odd or even?",
    ),
    (),
)
BEFORE = Skill(
    "before",
    ("image",),
    lambda written, spoken: str((written - 1) % 10),
    (
        "Which digit comes before?",
        "What digit comes before the written digit?",
        "Name the digit before the one you see.",
        "What number comes before the picture?",
        "Tell me the number before.",
        "Look at the picture. Which number comes before?",
    ),
    (),
)
LARGE = Skill(
    "large",
    ("image",),
    lambda written, spoken: "yes" if written > 4 else "no",
    (
        "Is the written digit larger than four?",
        "Is the number in the picture larger than four?",
        "Do you see a digit larger than four?",
        "Look at the picture. Is it more than four?",
    ),
    (),
)
NEXT = Skill(
    "next",
    ("image",),
    lambda written, spoken: str((written + 1) % 10),
    (
        "Which digit comes after?",
        "What digit comes after the written digit?",
        "Name the digit after the one you see.",
        "What number comes after the picture?",
        "Tell me the number after.",
        "Look at the picture. Which number comes after?",
    ),
    (),
)
OLD_SKILLS, NEW_SKILLS = (SKILLS["written"], PARITY, BEFORE, LARGE), (NEXT,)
BANK = "next"
FULL, REHEARSED = "full", "_rehearsed"


@dataclass(frozen=True)
class LifelongSettings:
    """How much of everything; steps are optimizer steps, `rehearsed` is how many questions of A are kept."""

    encoder_steps: int
    old_steps: int
    new_steps: int
    questions: int
    rehearsed: int
    batch_size: int = 24
    lr: float = 2e-3

    @classmethod
    def read(cls, parsed: argparse.Namespace) -> "LifelongSettings":
        if parsed.quick:
            return cls(encoder_steps=1, old_steps=1, new_steps=2, questions=4, rehearsed=2, batch_size=4)
        return cls(parsed.encoder_steps, parsed.steps, parsed.new_steps, parsed.questions, parsed.rehearsed)


def ask(skill: Skill, pictures: DigitPictures, rng: np.random.Generator, augment: Any = None) -> Sample:
    """One question about one picture, and its answer."""
    row = int(rng.integers(len(pictures)))
    digit, picture = int(pictures.digits[row]), pictures.images[row]
    content = [{"type": "image"}, {"type": "text", "text": skill.questions[rng.integers(len(skill.questions))]}]
    words = skill.answer(digit, 0)
    return {
        "messages": [
            {"role": "user", "content": content},
            {"role": "assistant", "content": [{"type": "text", "text": words}]},
        ],
        "images": [picture if augment is None else augment(picture, rng)],
        "audio": [],
        "skill": skill.name,
        "answer": words,
    }


class Life:
    """One seed: a trained encoder, a model that has learned A, and the questions of both skills."""

    def __init__(self, settings: LifelongSettings, seed: int):
        self.settings, self.rng = settings, np.random.default_rng(seed)
        self.pictures, self.test_pictures = handwritten_digits(size=16)
        self.augment = PictureAugment()
        torch.manual_seed(seed)
        demo, self.processor = build_demo(
            [*corpus(), *(text for skill in (*OLD_SKILLS, *NEW_SKILLS) for text in skill.questions), "odd", "even"]
        )
        values = demo.config.to_dict() | {"audio_config": None, "audio_token_id": None}
        self.model = ChorusForConditionalGeneration(ChorusConfig(**values))
        self.model.generation_config = demo.generation_config
        self.collator = ChorusDataCollator(self.processor)
        self._learn_pictures(seed)
        self.model.freeze("vision_tower", "vision_connector")
        self.old_test, self.new_test = (self._test(skills) for skills in (OLD_SKILLS, NEW_SKILLS))
        self.memory = self._questions(OLD_SKILLS, settings.rehearsed)
        learn({OURS: self.model}, [self.encode(self._lesson(OLD_SKILLS)) for _ in range(settings.old_steps)], settings)

    def _learn_pictures(self, seed: int) -> None:
        size, steps = self.settings.batch_size, self.settings.encoder_steps
        digits = LoneDigits(self.pictures, steps * size, seed=seed, picture_augment=self.augment)
        lesson, collate = EncoderLesson(self.model.model, "image").train(), LoneDigitCollator(self.processor, "image")
        take_step = stepper(lesson, steps, self.settings.lr)
        for step in range(steps):
            take_step(collate([digits[index] for index in range(step * size, (step + 1) * size)]))

    def _questions(self, skills: Sequence[Skill], count: int) -> list[Sample]:
        return [ask(skills[i % len(skills)], self.pictures, self.rng, self.augment) for i in range(count)]

    def _lesson(self, skills: Sequence[Skill]) -> list[Sample]:
        return self._questions(skills, self.settings.batch_size)

    def _test(self, skills: Sequence[Skill]) -> list[Sample]:
        count = self.settings.questions * len(skills)
        return [ask(skills[i % len(skills)], self.test_pictures, self.rng) for i in range(count)]

    @torch.no_grad()
    def encode(self, samples: Sequence[Sample]) -> Batch:
        """A batch with image tokens in the place of pictures: the encoder is frozen, so it runs once for all."""
        batch = self.collator(samples)
        self.model.model.vision_tower.eval()
        encoded = self.model.get_image_features(batch.pop("pixel_values"))
        return {**batch, "mm_encoder_outputs": {"image": encoded}}

    def new_lessons(self) -> tuple[list[Batch], list[Batch]]:
        """Batches of B alone, and the same with half of the rows given to A's questions that were kept."""
        plain, rehearsed = [], []
        for _ in range(self.settings.new_steps):
            samples = self._lesson(NEW_SKILLS)
            share = max(1, len(samples) // 2)
            kept = [self.memory[i] for i in self.rng.integers(len(self.memory), size=share)]
            plain.append(self.encode(samples))
            rehearsed.append(self.encode(samples[share:] + kept))
        return plain, rehearsed

    def accuracy(self, model: ChorusForConditionalGeneration, samples: list[Sample]) -> float:
        given = answer(model, self.processor, samples)
        return fmean(text == sample["answer"] for sample, text in zip(samples, given, strict=True))

    @torch.no_grad()
    def old_logits(self, model: ChorusForConditionalGeneration, **options: Any) -> list[Tensor]:
        """Logits on all of A's test questions; `options` go to the model."""
        model.eval()
        size = self.settings.batch_size
        batches = [self.encode(self.old_test[start : start + size]) for start in range(0, len(self.old_test), size)]
        return [model(**batch, **options).logits for batch in batches]


def learn(
    models: Mapping[str, ChorusForConditionalGeneration], batches: Sequence[Batch], settings: LifelongSettings
) -> None:
    """Train what is not frozen of each model on the same batches."""
    for model in models.values():
        take_step = stepper(model.train(), len(batches), settings.lr)
        for batch in batches:
            take_step(batch)


def with_bank(model: ChorusForConditionalGeneration) -> ChorusForConditionalGeneration:
    """A copy with a new bank for text, which alone is trained."""
    grown = deepcopy(model)
    grown.add_bank(BANK, modalities=["text"])
    grown.freeze("all")
    grown.unfreeze(BANK)
    return grown


def strategies(life: Life) -> dict[str, ChorusForConditionalGeneration]:
    """The models after B."""
    plain, rehearsed = life.new_lessons()
    start = {FULL: deepcopy(life.model), OURS: with_bank(life.model)}
    again = {name + REHEARSED: deepcopy(model) for name, model in start.items()}
    learn(start, plain, life.settings)
    learn(again, rehearsed, life.settings)
    return start | again


def score(life: Life) -> dict[str, dict[str, float]]:
    """Row -> figures of every strategy."""
    before, logits = life.accuracy(life.model, life.old_test), life.old_logits(life.model)
    rows: dict[str, dict[str, float]] = {
        "A before": {"all_accuracy": before},
        "B before": {"all_accuracy": life.accuracy(life.model, life.new_test)},
    }
    for name, model in strategies(life).items():
        after = life.accuracy(model, life.old_test)
        rows.setdefault("A after", {})[f"{name}_accuracy"] = after
        rows.setdefault("A lost", {})[f"{name}_lost"] = 100 * (before - after)
        rows.setdefault("B after", {})[f"{name}_accuracy"] = life.accuracy(model, life.new_test)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        rows.setdefault("trained", {})[f"{name}_parameters"] = trained
        if not name.startswith(OURS):
            continue
        closed = life.old_logits(model, closed_banks=[BANK])
        rows.setdefault("closed, logits of A", {})[f"{name}_identical"] = float(
            all(torch.equal(a, b) for a, b in zip(logits, closed, strict=True))
        )
        model.close_bank(BANK)
        lost = 100 * (before - life.accuracy(model, life.old_test))
        rows.setdefault("closed, A lost", {})[f"{name}_lost"] = lost
        model.open_bank(BANK)
    return rows


def main(arguments: list[str] | None = None) -> None:
    options: list[tuple[str, dict[str, Any]]] = [
        ("--encoder-steps", {"type": int, "default": 300, "help": "steps of the encoder alone (default 300)"}),
        ("--steps", {"type": int, "default": 260, "help": "steps on A (default 260)"}),
        ("--new-steps", {"type": int, "default": 90, "help": "steps on B (default 90)"}),
        ("--questions", {"type": int, "default": 100, "help": "test questions of each kind (default 100)"}),
        ("--rehearsed", {"type": int, "default": 120, "help": "questions of A that are kept (default 120)"}),
        ("--seeds", {"type": int, "nargs": "+", "default": [0, 1, 2]}),
    ]
    parsed = parse("A second skill: a bank that is added against full fine-tuning.", arguments, *options)
    settings = LifelongSettings.read(parsed)
    report = Report(f"a second skill, {settings}", parsed)
    scores: list[dict[str, dict[str, float]]] = []
    for seed in parsed.seeds[:1] if parsed.quick else parsed.seeds:
        scores.append(score(Life(settings, seed)))
        for row, values in scores[-1].items():
            report.add(f"seed {seed} {row}", values, next(iter(values)).rpartition("_")[2])
    for row, values in scores[0].items():
        means = {key: fmean(found[row][key] for found in scores) for key in values}
        report.add(f"mean {row}", means, next(iter(values)).rpartition("_")[2])
    report.save()


if __name__ == "__main__":
    main()
