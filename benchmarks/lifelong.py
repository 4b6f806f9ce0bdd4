"""Learning a second skill without losing the first: a bank that is added, against fine-tuning the whole model.

Run as `python -m benchmarks.lifelong`. A small model learns skill A, four kinds of questions about a handwritten digit
(which it is, which comes before, whether it is odd or even, whether it is larger than four). It is then given ears,
and learns skill B from B's questions alone: which digit comes after the one that is spoken. Beside three sounds in ten
stands a picture, which has nothing to do with the answer.

- `full`: all of the decoder is trained;
- `chorus`: a bank for text and sound is added and nothing else is trained; it stays open, and A's words enter it;
- `full_rehearsed`, `chorus_rehearsed`: the same with half of every batch given to questions of A that were kept;
- `chorus_sound`: as `chorus`, but the bank is open to sound only, so A has nothing that could enter it.

`alone` are the rows of a second course, whose sounds never have a picture beside them.

All start from the same model and see the same batches. The encoders learn their digits first and are frozen. Accuracy
is the share of questions answered exactly, in the phrasings of the lessons, about writers and voices that none has
met. `lost` is in points. `gate` is the mean weight that the bank's own gate gives to the tokens that enter it (0: none
does). The models with a bank are also asked A with it closed: their logits are compared bit for bit with those of the
model that had neither bank nor ears.
"""

import argparse
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.digit_lessons import Batch, Media, media, stepper
from benchmarks.lifelong_questions import NEW_SKILLS, OLD_SKILLS, Questioner
from benchmarks.timing import OURS, Report, parse
from chorus_moe.modeling.configuration_chorus import ChorusConfig
from chorus_moe.modeling.modeling_generation import ChorusForConditionalGeneration
from chorus_moe.surgery import add_bank, add_modality, freeze, unfreeze
from chorus_moe.training.collator import ChorusDataCollator
from chorus_moe.training.demo.answers import answer
from chorus_moe.training.demo.augment import PictureAugment
from chorus_moe.training.demo.data import Sample, Skill, corpus
from chorus_moe.training.demo.encoders import EncoderLesson, LoneDigitCollator, LoneDigits
from chorus_moe.training.demo.model import build_demo

# Nothing reads the sound positions of the last layer, and what a bank changes in a lower one the old layers still read.
BANK, BANK_LAYERS = "hearing", [1]
FULL, REHEARSED, SOUND, ALONE = "full", "_rehearsed", "_sound", "alone, "

Model = ChorusForConditionalGeneration
Rows = dict[str, dict[str, float]]


@dataclass(frozen=True)
class LifelongSettings:
    """How much of everything.

    Args:
        picture_steps, sound_steps, old_steps, new_steps: optimizer steps of the encoders alone, of A and of B.
        questions: test questions of each kind.
        rehearsed: how many questions of A are kept.
        beside: the share of B's questions that have a picture beside the sound.
    """

    picture_steps: int
    sound_steps: int
    old_steps: int
    new_steps: int
    questions: int
    rehearsed: int
    beside: float = 0.3
    batch_size: int = 24
    lr: float = 2e-3

    @classmethod
    def read(cls, parsed: argparse.Namespace) -> "LifelongSettings":
        if parsed.quick:
            return cls(1, 1, old_steps=1, new_steps=2, questions=4, rehearsed=2, batch_size=4)
        return cls(
            picture_steps=parsed.encoder_steps,
            sound_steps=parsed.encoder_steps,
            old_steps=parsed.steps,
            new_steps=parsed.new_steps,
            questions=parsed.questions,
            rehearsed=parsed.rehearsed,
        )


class Life:
    """One seed: a model that has learned A and was then given ears, and the questions of both skills."""

    def __init__(self, found: Media, settings: LifelongSettings, seed: int):
        self.settings, self.seed = settings, seed
        self.rng, augment = np.random.default_rng(seed), PictureAugment()
        self.asker = Questioner(found.pictures, found.clips, self.rng, augment)
        self.tester = Questioner(found.test_pictures, found.test_clips, self.rng, None)
        torch.manual_seed(seed)
        demo, self.processor = build_demo(
            [*corpus(), *(text for skill in (*OLD_SKILLS, *NEW_SKILLS) for text in skill.questions), "odd", "even"]
        )
        self.collator = ChorusDataCollator(self.processor)
        self.model = without_ears(demo)
        self._learn_alone("image", partial(LoneDigits, found.pictures, picture_augment=augment), settings.picture_steps)
        count = settings.questions
        self.old_test = questions(self.tester, OLD_SKILLS, count * len(OLD_SKILLS))
        self.new_test, self.beside_test = (
            questions(self.tester, NEW_SKILLS, count * len(NEW_SKILLS), beside) for beside in (0.0, 1.0)
        )
        self.memory = questions(self.asker, OLD_SKILLS, settings.rehearsed)
        lessons = (questions(self.asker, OLD_SKILLS, settings.batch_size) for _ in range(settings.old_steps))
        learn({OURS: self.model}, [self.encode(lesson) for lesson in lessons], settings)
        self.old_batches = self._encoded(self.old_test)
        self.first_logits = self.old_logits(self.model)
        add_modality(self.model, "audio", demo.config.audio_config, demo.config.audio_token_id)
        self._learn_alone("audio", partial(LoneDigits, found.clips), settings.sound_steps)
        self.new_batches = self._encoded(self.new_test)

    def _learn_alone(self, modality: str, lone_digits: Any, steps: int) -> None:
        """An encoder learns its digits and is frozen."""
        size = self.settings.batch_size
        digits = lone_digits(length=steps * size, seed=self.seed)
        lesson = EncoderLesson(self.model.model, modality).train()
        collate, take_step = LoneDigitCollator(self.processor, modality), stepper(lesson, steps, self.settings.lr)
        for step in range(steps):
            take_step(collate([digits[index] for index in range(step * size, (step + 1) * size)]))
        name = "vision" if modality == "image" else "audio"
        freeze(self.model, f"{name}_tower", f"{name}_connector")

    @torch.no_grad()
    def encode(self, samples: Sequence[Sample]) -> Batch:
        """A batch with image and audio tokens in the place of media: the encoders are frozen and run once for all."""
        batch, inner = self.collator(samples), self.model.model
        encoded: dict[str, Any] = {}
        if "pixel_values" in batch:
            inner.vision_tower.eval()
            encoded["image"] = self.model.get_image_features(batch.pop("pixel_values"))
        if "input_features" in batch:
            inner.audio_tower.eval()
            sound = (batch.pop(name) for name in ("input_features", "input_features_mask"))
            encoded["audio"] = self.model.get_audio_features(*sound)
        return {**batch, "mm_encoder_outputs": encoded}

    def _encoded(self, samples: Sequence[Sample]) -> list[Batch]:
        """All samples, batch by batch."""
        size = self.settings.batch_size
        return [self.encode(samples[start : start + size]) for start in range(0, len(samples), size)]

    def new_lessons(self, beside: float) -> tuple[list[Batch], list[Batch]]:
        """Batches of B alone, and the same with half of the rows given to A's questions that were kept."""
        plain, rehearsed = [], []
        for _ in range(self.settings.new_steps):
            samples = questions(self.asker, NEW_SKILLS, self.settings.batch_size, beside)
            share = max(1, len(samples) // 2)
            kept = [self.memory[i] for i in self.rng.integers(len(self.memory), size=share)]
            plain.append(self.encode(samples))
            rehearsed.append(self.encode(samples[share:] + kept))
        return plain, rehearsed

    def accuracy(self, model: Model, samples: list[Sample]) -> float:
        given = answer(model, self.processor, samples)
        return fmean(text == sample["answer"] for sample, text in zip(samples, given, strict=True))

    @torch.no_grad()
    def old_logits(self, model: Model, **options: Any) -> list[Tensor]:
        """Logits on all of A's test questions; `options` go to the model."""
        model.eval()
        return [model(**batch, **options).logits for batch in self.old_batches]


def questions(asker: Questioner, skills: Sequence[Skill], count: int, beside: float = 0.0) -> list[Sample]:
    """Questions of each skill in turn."""
    return [asker.ask(skills[i % len(skills)], beside) for i in range(count)]


def without_ears(demo: Model) -> Model:
    """A fresh model like the demo's that knows text and images only."""
    values = demo.config.to_dict() | {"audio_config": None, "audio_token_id": None}
    del values["text_config"]["expert_banks"]["audio"]
    model = ChorusForConditionalGeneration(ChorusConfig(**values))
    model.generation_config = demo.generation_config
    return model


def learn(models: Mapping[str, Model], batches: Sequence[Batch], settings: LifelongSettings) -> None:
    """Train what is not frozen of each model on the same batches."""
    for model in models.values():
        take_step = stepper(model.train(), len(batches), settings.lr)
        for batch in batches:
            take_step(batch)


def with_bank(model: Model, *modalities: str) -> Model:
    """A copy with a new bank for some modalities, which alone is trained."""
    grown = deepcopy(model)
    add_bank(grown, BANK, modalities=modalities, layers=BANK_LAYERS)
    freeze(grown, "all")
    unfreeze(grown, BANK)
    return grown


def strategies(life: Life) -> dict[str, Model]:
    """The models after B."""
    plain, rehearsed = life.new_lessons(life.settings.beside)
    start = {FULL: deepcopy(life.model), OURS: with_bank(life.model, "text", "audio")}
    again = {name + REHEARSED: deepcopy(model) for name, model in start.items()}
    start[OURS + SOUND] = with_bank(life.model, "audio")
    learn(start, plain, life.settings)
    learn(again, rehearsed, life.settings)
    return start | again


def alone(life: Life) -> dict[str, Model]:
    """The models after a B without pictures, nothing rehearsed."""
    models = {FULL: deepcopy(life.model), OURS: with_bank(life.model, "text", "audio")}
    learn(models, life.new_lessons(0.0)[0], life.settings)
    return models


@torch.no_grad()
def gate_weight(model: Model, batches: Sequence[Batch]) -> float:
    """The mean weight of the new bank over the tokens that enter it; 0 when none does."""
    model.eval()
    weights: list[Tensor] = []
    banks = [model.model.language_model.layers[layer].mlp.banks[BANK] for layer in BANK_LAYERS]
    hooks = [bank.gate.register_forward_hook(lambda _module, _inputs, gate_R: weights.append(gate_R)) for bank in banks]
    for batch in batches:
        model(**batch)
    for hook in hooks:
        hook.remove()
    return torch.cat(weights).mean().item() if weights else 0.0


def score_models(life: Life, models: Mapping[str, Model], before: float) -> Rows:
    """Row -> figures of every model after B."""
    rows: Rows = {}
    for name, model in models.items():
        after = life.accuracy(model, life.old_test)
        rows.setdefault("A after", {})[f"{name}_accuracy"] = after
        rows.setdefault("A lost", {})[f"{name}_lost"] = 100 * (before - after)
        rows.setdefault("B after", {})[f"{name}_accuracy"] = life.accuracy(model, life.new_test)
        rows.setdefault("B after, a picture beside", {})[f"{name}_accuracy"] = life.accuracy(model, life.beside_test)
        if name.startswith(OURS):
            rows.setdefault("gate, tokens of A", {})[f"{name}_gate"] = gate_weight(model, life.old_batches)
            rows.setdefault("gate, tokens of B", {})[f"{name}_gate"] = gate_weight(model, life.new_batches)
    return rows


def closed_is_identical(life: Life, model: Model) -> bool:
    """Whether the model answers A with its new bank closed as the first model did, bit for bit."""
    closed = life.old_logits(model, closed_banks=[BANK])
    return all(torch.equal(a, b) for a, b in zip(life.first_logits, closed, strict=True))


def score(life: Life) -> Rows:
    """Row -> figures of every strategy."""
    before, models = life.accuracy(life.model, life.old_test), strategies(life)
    trained = {
        f"{name}_parameters": float(sum(p.numel() for p in model.parameters() if p.requires_grad))
        for name, model in models.items()
    }
    closed = {
        f"{name}_identical": float(closed_is_identical(life, model))
        for name, model in models.items()
        if name.startswith(OURS)
    }
    return {
        "A before": {"all_accuracy": before},
        "B before": {"all_accuracy": life.accuracy(life.model, life.new_test)},
        **score_models(life, models, before),
        "closed, logits of A": closed,
        "trained": trained,
        **{ALONE + row: values for row, values in score_models(life, alone(life), before).items()},
    }


def main(arguments: list[str] | None = None) -> None:
    options: list[tuple[str, dict[str, Any]]] = [
        ("--encoder-steps", {"type": int, "default": 300, "help": "steps of each encoder alone (default 300)"}),
        ("--steps", {"type": int, "default": 260, "help": "steps on A (default 260)"}),
        ("--new-steps", {"type": int, "default": 150, "help": "steps on B (default 150)"}),
        ("--questions", {"type": int, "default": 100, "help": "test questions of each kind (default 100)"}),
        ("--rehearsed", {"type": int, "default": 480, "help": "questions of A that are kept (default 480)"}),
        ("--seeds", {"type": int, "nargs": "+", "default": [0, 1]}),
        ("--cache", {"type": Path, "default": Path("out/bench/cache"), "help": "folder of the synthetic speech"}),
    ]
    parsed = parse("A second skill: a bank that is added against full fine-tuning.", arguments, *options)
    settings = LifelongSettings.read(parsed)
    report = Report(f"a second skill, {settings}", parsed)
    scores: list[Rows] = []
    with media(parsed) as found:
        for seed in parsed.seeds[:1] if parsed.quick else parsed.seeds:
            scores.append(score(Life(found, settings, seed)))
            for row, values in scores[-1].items():
                report.add(f"seed {seed} {row}", values, next(iter(values)).rpartition("_")[2])
    for row, values in scores[0].items():
        means = {key: fmean(found_rows[row][key] for found_rows in scores) for key in values}
        report.add(f"mean {row}", means, next(iter(values)).rpartition("_")[2])
    report.save()


if __name__ == "__main__":
    main()
