"""The demo's questions: a handwritten digit, a spoken digit and a text; the answer is generated text.

Unusual here:
- a sample is a pure function of (seed, index), so an interrupted run resumes on the same data;
- answers are dealt so that one medium alone says next to nothing: `best_blind_accuracy` is the most that any model
  can reach without the picture or without the sound, the "chance" that an ablation must fall to;
- the phrasings for testing are held out, but use only words that the training phrasings use.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from chorus_moe.processors.processing_media import MEDIA
from chorus_moe.training.demo.augment import PictureAugment
from chorus_moe.training.demo.speech import SAMPLING_RATE, SpeechClips

Sample = dict[str, Any]
MEDIA_COLUMNS = {name: row.column for name, row in MEDIA.items()}
# How often two different digits are 1, 2, ... 9 apart in "larger": small gaps leave a single digit uninformative.
GAPS = np.array([0.40, 0.22, 0.14, 0.09, 0.06, 0.04, 0.03, 0.01, 0.01])


@dataclass(frozen=True)
class DigitPictures:
    """Handwritten digits: `images` PIL "L" (grey, white on black), `digits` int (pictures,)."""

    images: list[Image.Image]
    digits: np.ndarray

    def __len__(self) -> int:
        return len(self.images)


def handwritten_digits(test_fraction: float = 0.25, size: int = 32) -> tuple[DigitPictures, DigitPictures]:
    """(training, test) pictures of scikit-learn's digits, with a margin of one, enlarged from 10 to `size` pixels.

    The data come in writer order, so the last `test_fraction` is cut off in one piece: no writer is in both parts but
    the one at the cut.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    grey = np.pad(np.round(data.images * (255 / 16)).astype(np.uint8), ((0, 0), (1, 1), (1, 1)))
    images = [Image.fromarray(picture).resize((size, size), Image.Resampling.BICUBIC) for picture in grey]
    cut = len(images) - round(len(images) * test_fraction)
    return DigitPictures(images[:cut], data.target[:cut]), DigitPictures(images[cut:], data.target[cut:])


def _close_digits() -> np.ndarray:
    """A third equal, a third the written one larger, a third the spoken one, mostly by little."""
    joint = np.eye(10) / 30
    for gap, share in enumerate(GAPS, start=1):
        joint += (np.eye(10, k=gap) + np.eye(10, k=-gap)) * share / (10 - gap) / 3
    return joint


# Joint probability of (written digit, spoken digit).
INDEPENDENT = np.full((10, 10), 0.01)
HALF_EQUAL = np.where(np.eye(10, dtype=bool), 0.5 / 10, 0.5 / 90)
CLOSE = _close_digits()


def _larger(written: int, spoken: int) -> str:
    return "same" if written == spoken else "written" if written > spoken else "spoken"


@dataclass(frozen=True)
class Skill:
    """A question type: the media it needs, its answer and the joint probability of (written, spoken), its phrasings.

    `templates` are expanded to `questions`, without those that are held out for testing.
    """

    name: str
    needs: tuple[str, ...]
    answer: Callable[[int, int], str]
    templates: tuple[str, ...]
    held_out_questions: tuple[str, ...]
    joint: np.ndarray = field(default_factory=lambda: INDEPENDENT)

    @cached_property
    def questions(self) -> tuple[str, ...]:
        """The phrasings to train on."""
        return tuple(text for text in expand(*self.templates) if text not in self.held_out_questions)


def expand(*templates: str) -> tuple[str, ...]:
    """Every sentence of the templates, in which `[a|b]` is a choice."""
    pieces = [[part.split("|") for part in re.split(r"[\[\]]", template)] for template in templates]
    return tuple("".join(words) for choices in pieces for words in product(*choices))


def _comparison(word: str) -> dict[str, tuple[str, ...]]:
    return {
        "templates": (
            f"Which [digit|number|one] is {word}?",
            f"Which [digit|number|one] is {word}, the written or the spoken one?",
            f"Which [digit|number|one] is {word}, the picture or the [sound|voice]?",
            f"Is the written or the spoken [digit|number] {word}?",
            f"Tell me which [digit|number|one] is {word}.",
            f"Name the {word} [digit|number|one], written or spoken.",
            f"Compare the two [digits|numbers]. Which [is|one is] {word}?",
            f"Compare the [picture|written digit] and the [sound|spoken digit|voice]. Which [is|one is] {word}?",
        ),
        "held_out_questions": (
            f"Which number is {word}, the written or the spoken one?",
            f"Compare the picture and the voice. Which is {word}?",
        ),
    }


_SKILLS = (
    Skill(
        "written",
        ("image",),
        lambda written, spoken: str(written),
        (
            "[Which|What] [digit|number] is written?",
            "[Which|What] [digit|number] is in the picture?",
            "[Which|What] [digit|number] does the picture show?",
            "[Read|Name|Tell me] the written [digit|number].",
            "[Read|Name|Tell me] the [digit|number] you see.",
            "Look at the picture. Which [digit|number] is it?",
        ),
        ("Which number is in the picture?", "Tell me the digit you see."),
    ),
    Skill(
        "spoken",
        ("audio",),
        lambda written, spoken: str(spoken),
        (
            "[Which|What] [digit|number] is spoken?",
            "[Which|What] [digit|number] is in the sound?",
            "[Which|What] [digit|number] does the voice say?",
            "[Repeat|Name|Tell me] the spoken [digit|number].",
            "[Repeat|Name|Tell me] the [digit|number] you hear.",
            "Listen to the sound. Which [digit|number] is it?",
        ),
        ("Which number is in the sound?", "Tell me the digit you hear."),
    ),
    Skill(
        "sum",
        ("image", "audio"),
        lambda written, spoken: str(written + spoken),
        (
            "What is the sum of the [two digits|two numbers]?",
            "What is the sum of the written and the spoken [digit|number]?",
            "Tell me the sum of the [two digits|two numbers|picture and the sound|picture and the voice].",
            "Add the [two digits|two numbers|written and the spoken digit|written and the spoken number].",
            "Add the [digit|number] you see and the [digit|number] you hear.",
            "What do the picture and the [sound|voice] make together?",
            "What is the written [digit|number] plus the spoken [digit|number]?",
            "How much is the [digit|number] you see plus the [digit|number] you hear?",
        ),
        ("What is the sum of the written and the spoken number?", "Add the digit you see and the digit you hear."),
    ),
    Skill("larger", ("image", "audio"), _larger, joint=CLOSE, **_comparison("larger")),
    Skill(
        "same",
        ("image", "audio"),
        lambda written, spoken: "yes" if written == spoken else "no",
        (
            "Are the two [digits|numbers] the same?",
            "Are the written and the spoken [digit|number] the same?",
            "Is the written [digit|number] the same as the spoken [digit|number]?",
            "Is it the same [digit|number]?",
            "Do you see the [digit|number] you hear?",
            "Do the picture and the [sound|voice] agree?",
            "Does the [sound|voice] agree with the picture?",
            "Does the picture agree with the [sound|voice]?",
        ),
        ("Are the written and the spoken digit the same?", "Does the voice agree with the picture?"),
        HALF_EQUAL,
    ),
    Skill(
        "smaller",
        ("image", "audio"),
        lambda written, spoken: _larger(spoken=written, written=spoken),
        joint=CLOSE,
        **_comparison("smaller"),
    ),
)
SKILLS: dict[str, Skill] = {skill.name: skill for skill in _SKILLS}
BASE_SKILLS = ("written", "spoken", "sum", "larger", "same")
NEW_SKILL = "smaller"


def corpus() -> list[str]:
    """Every phrasing and every answer: what a tokenizer for the demo is trained on."""
    texts = [text for skill in _SKILLS for text in (*skill.questions, *skill.held_out_questions)]
    answers = {skill.answer(written, spoken) for skill in _SKILLS for written in range(10) for spoken in range(10)}
    return texts + sorted(answers)


def best_blind_accuracy(skill: str, withheld: str) -> float:
    """The most any model can reach on `skill` when `withheld` ("image" or "audio") is missing (Bayes, exact).

    For a skill that does not need the medium it is 1.
    """
    chosen = SKILLS[skill]
    if withheld not in chosen.needs:
        return 1.0
    # Probability of (what is still seen, answer).
    mass: dict[tuple[int, str], float] = defaultdict(float)
    for written in range(10):
        for spoken in range(10):
            seen = spoken if withheld == "image" else written
            if len(chosen.needs) == 1:
                seen = 0  # the other medium has nothing to do with the answer
            mass[seen, chosen.answer(written, spoken)] += float(chosen.joint[written, spoken])
    # The best guess for each value of what is seen.
    return sum(max(p for (seen, _), p in mass.items() if seen == digit) for digit in {seen for seen, _ in mass})


class DigitQuestions(Dataset):
    """`length` samples, each a function of (seed, index): rows as `datasets` holds them.

    A sample has `messages` (chat turns whose content names its media), `images` (PIL, 0 or 1), `audio` (0 or 1 dict of
    `array` float32 (samples,) and `sampling_rate`), `skill`, `answer`, `written` and `spoken` (the digits; None where
    that medium is absent).

    Args:
        pictures, clips: where pictures and sounds are drawn from, all digits needed.
        skills: names and weights; the draw is by weight, or in turn when `skills` is a list of names.
        held_out_questions: ask in the phrasings held out for testing.
        distractors: probability that a medium the question does not need is there as well.
        picture_augment: changes the picture; None leaves it. Sounds are augmented beforehand (`augmented_clips`).
    """

    def __init__(
        self,
        pictures: DigitPictures,
        clips: SpeechClips,
        skills: Sequence[str] | Mapping[str, float],
        length: int,
        *,
        seed: int = 0,
        held_out_questions: bool = False,
        distractors: float = 0.5,
        picture_augment: PictureAugment | None = None,
    ) -> None:
        unknown = [name for name in skills if name not in SKILLS]
        if unknown or not skills:
            raise ValueError(f"unknown skills {unknown} among {list(skills)}: known are {', '.join(SKILLS)}")
        self.pictures, self.clips, self.length, self.seed = pictures, clips, length, seed
        self.names = list(skills)
        self.weights = None
        if isinstance(skills, Mapping):
            self.weights = np.array([skills[name] for name in self.names], float) / sum(skills.values())
        self.held_out_questions, self.distractors = held_out_questions, distractors
        self.picture_augment = picture_augment
        self.picture_rows = _rows_by_digit(pictures.digits, "pictures")
        self.clip_rows = _rows_by_digit(clips.digits, "clips")

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.length:
            raise IndexError(f"sample {index} of {self.length}")
        # A function of seed and index: workers and resumed runs see the same sample.
        rng = np.random.default_rng((self.seed, index))
        in_turn = index % len(self.names)
        skill = SKILLS[self.names[in_turn if self.weights is None else rng.choice(len(self.names), p=self.weights)]]
        # Both digits at once, from their joint probability: it keeps one medium alone from telling the answer.
        written, spoken = divmod(int(rng.choice(100, p=skill.joint.ravel())), 10)
        present = [medium for medium in MEDIA_COLUMNS if medium in skill.needs or rng.random() < self.distractors]
        questions = skill.held_out_questions if self.held_out_questions else skill.questions
        content: list[dict[str, str]] = [{"type": medium} for medium in present]
        # Order of media and place of the question vary, so that positions say nothing.
        rng.shuffle(content)  # type: ignore[arg-type]
        content.insert(
            0 if rng.random() < 0.25 else len(content),
            {"type": "text", "text": questions[rng.integers(len(questions))]},
        )
        answer = skill.answer(written, spoken)
        return {
            "messages": [
                {"role": "user", "content": content},
                {"role": "assistant", "content": [{"type": "text", "text": answer}]},
            ],
            "images": [self._picture(written, rng)] if "image" in present else [],
            "audio": [self._clip(spoken, rng)] if "audio" in present else [],
            "skill": skill.name,
            "answer": answer,
            "written": written if "image" in present else None,
            "spoken": spoken if "audio" in present else None,
        }

    def _picture(self, digit: int, rng: np.random.Generator) -> Image.Image:
        picture = self.pictures.images[rng.choice(self.picture_rows[digit])]
        return self.picture_augment(picture, rng) if self.picture_augment else picture

    def _clip(self, digit: int, rng: np.random.Generator) -> dict[str, Any]:
        return {"array": self.clips.waveforms[rng.choice(self.clip_rows[digit])], "sampling_rate": SAMPLING_RATE}


def withhold(sample: Sample, medium: str) -> Sample:
    """A copy of the sample without its pictures or without its sounds, and without their places in the messages.

    Raises:
        ValueError: `medium` is neither "image" nor "audio".
    """
    if medium not in MEDIA_COLUMNS:
        raise ValueError(f"unknown medium {medium!r}: known are {', '.join(MEDIA_COLUMNS)}")
    messages = [
        {**message, "content": [part for part in message["content"] if part["type"] != medium]}
        for message in sample["messages"]
    ]
    return {**sample, "messages": messages, MEDIA_COLUMNS[medium]: []}


def _rows_by_digit(digits: np.ndarray, what: str) -> list[np.ndarray]:
    rows = [np.flatnonzero(digits == digit) for digit in range(10)]
    missing = [digit for digit, found in enumerate(rows) if not len(found)]
    if missing:
        raise ValueError(f"the {what} have no digit {missing[0]}: {10 - len(missing)} of 10 digits are there")
    return rows
