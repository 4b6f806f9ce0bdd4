"""The questions of the benchmark `lifelong`: of a written digit, the old skill, and of a spoken one, the new skill."""

from typing import Any

import numpy as np

from chorus_moe.training.demo.augment import PictureAugment
from chorus_moe.training.demo.data import SKILLS, DigitPictures, Sample, Skill
from chorus_moe.training.demo.speech import SAMPLING_RATE, SpeechClips

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
    ("audio",),
    lambda written, spoken: str((spoken + 1) % 10),
    (
        "Which digit comes after?",
        "What digit comes after the spoken digit?",
        "Name the digit after the one you hear.",
        "What number comes after the sound?",
        "Tell me the number after.",
        "Listen to the sound. Which number comes after?",
    ),
    (),
)
OLD_SKILLS, NEW_SKILLS = (SKILLS["written"], PARITY, BEFORE, LARGE), (NEXT,)


class Questioner:
    """Asks about pictures and clips that it draws; pictures pass `augment`, if there is one."""

    def __init__(
        self, pictures: DigitPictures, clips: SpeechClips, rng: np.random.Generator, augment: PictureAugment | None
    ):
        self.pictures, self.clips, self.rng, self.augment = pictures, clips, rng, augment

    def ask(self, skill: Skill, beside: float = 0.0) -> Sample:
        """One question and its answer; `beside` is how likely a picture stands beside a sound, saying nothing of it."""
        written, picture = self._picture()
        row = int(self.rng.integers(len(self.clips)))
        spoken, clip = int(self.clips.digits[row]), self.clips.waveforms[row]
        media = list(skill.needs)
        if media == ["audio"] and self.rng.random() < beside:
            media.insert(int(self.rng.integers(2)), "image")
        content: list[dict[str, str]] = [{"type": medium} for medium in media]
        content.append({"type": "text", "text": skill.questions[self.rng.integers(len(skill.questions))]})
        words = skill.answer(written, spoken)
        return {
            "messages": [
                {"role": "user", "content": content},
                {"role": "assistant", "content": [{"type": "text", "text": words}]},
            ],
            "images": [picture] if "image" in media else [],
            "audio": [{"array": clip, "sampling_rate": SAMPLING_RATE}] if "audio" in media else [],
            "skill": skill.name,
            "answer": words,
        }

    def _picture(self) -> tuple[int, Any]:
        row = int(self.rng.integers(len(self.pictures)))
        picture = self.pictures.images[row]
        return int(self.pictures.digits[row]), self.augment(picture, self.rng) if self.augment else picture
