"""Which voices the demo learns from, adapts to and is tested on.

Synthetic: the base model learns from `TRAIN_VARIANTS`, is tested on `TEST_VARIANTS` (other voices altogether), and
adapts to `NEW_VARIANTS` (whispers and robots), tested on other readings by those same voices.
Real recordings: it learns from all speakers but one and from synthetic voices with accents, is tested on the held-out
speaker, and adapts to a few recordings per digit of that speaker, tested on the speaker's other takes. Its audio
encoder also learns to tell other words apart, said by synthetic voices.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from chorus_moe.training.demo.augment import SpeechAugment, augmented_clips
from chorus_moe.training.demo.speech import (
    ACCENTS,
    NEW_VARIANTS,
    OTHER_WORDS,
    TEST_VARIANTS,
    SpeechClips,
    SynthesisSettings,
    recorded_digits,
    split_held_out,
    split_last_takes,
    synthetic_digits,
)

ENGLISH_VOICES = SynthesisSettings()
# Beside real recordings: half as many readings, so that three quarters of all the clips are real.
HELPING_VOICES = replace(ENGLISH_VOICES, takes=1)
ACCENTED_VOICES = SynthesisSettings(languages=(), accents=tuple(ACCENTS), languages_per_variant=3, takes=1)
WORD_VOICES = SynthesisSettings(words=OTHER_WORDS, languages_per_variant=1, takes=1, seed=5)
TEST_VOICES = SynthesisSettings(variants=TEST_VARIANTS, languages_per_variant=3, takes=1, seed=1)
NEW_VOICES = SynthesisSettings(variants=NEW_VARIANTS, languages_per_variant=2, takes=2, seed=2)
NEW_VOICES_TEST = replace(NEW_VOICES, seed=3)
# A few recordings of one speaker vary little: the same voice, room and microphone.
SAME_VOICE = SpeechAugment(
    speed=(0.93, 1.07), crop=(0.0, 0.03), padding=(0.0, 0.1), telephone=0.0, channel=1.5, room=0.0, noise=(20.0, 50.0)
)


@dataclass(frozen=True)
class SpeechSets:
    """Clips by use: `train` and `adaptation` are augmented, the tests are as recorded or spoken.

    `known`, beside recordings, are other takes of speakers in `train`: who is heard without error shows whether a
    question was understood.
    `other_words`, for the audio encoder alone, has the number of a word in `OTHER_WORDS` in the place of the digit.
    """

    train: SpeechClips
    test: SpeechClips
    adaptation: SpeechClips
    adaptation_test: SpeechClips
    description: str
    other_words: SpeechClips | None = None
    known: SpeechClips | None = None


def synthetic_speech_sets(cache: Path, *, copies: int = 1, workers: int = 2) -> SpeechSets:
    """Synthetic voices only, spoken and augmented once, then read from `cache`."""
    train, test, new, new_test = (
        synthetic_digits(settings, cache) for settings in (ENGLISH_VOICES, TEST_VOICES, NEW_VOICES, NEW_VOICES_TEST)
    )
    # Test voices are synthetic as well and have the full band, so few clips get that of a telephone.
    augment = SpeechAugment(telephone=0.2)
    return SpeechSets(
        train=train + augmented_clips(train, augment, copies, cache, workers=workers),
        test=test,
        # Few clips of few voices: three copies of each.
        adaptation=new + augmented_clips(new, augment, 3, cache, workers=workers),
        adaptation_test=new_test,
        description=(
            f"synthetic speech: {_voices(train)} voices to learn from, {_voices(test)} held-out voices to test, "
            f"{_voices(new)} new voices to adapt to"
        ),
    )


def recorded_speech_sets(
    folder: Path, held_out: str, cache: Path, *, takes: int = 5, copies: int = 7, workers: int = 2
) -> SpeechSets:
    """Real recordings with the speaker `held_out`, helped by synthetic voices; `takes` per digit are for adaptation."""
    others, adaptation, test = split_held_out(recorded_digits(folder), held_out, takes)
    others, known = split_last_takes(others)
    synthetic = synthetic_digits(HELPING_VOICES, cache) + synthetic_digits(ACCENTED_VOICES, cache)
    # The recordings have an 8 kHz band already; the synthetic voices get it.
    near, far = SpeechAugment(telephone=0.15), SpeechAugment(telephone=0.9)

    def augmented(clips: SpeechClips, augment: SpeechAugment, copies: int) -> SpeechClips:
        return augmented_clips(clips, augment, copies, cache, workers=workers)

    return SpeechSets(
        train=others + augmented(others, near, copies) + augmented(synthetic, far, 1),
        test=test,
        adaptation=adaptation + augmented(adaptation, SAME_VOICE, 20),
        adaptation_test=test,
        description=(
            f"real recordings of {', '.join(sorted(set(others.speakers)))} and {_voices(synthetic)} synthetic voices; "
            f"{held_out} held out: {len(adaptation)} recordings to adapt to, {len(test)} to test"
        ),
        other_words=augmented(synthetic_digits(WORD_VOICES, cache), far, 1),
        # Speakers of one take have none to spare.
        known=known if len(set(known.digits.tolist())) == 10 else None,
    )


def _voices(clips: SpeechClips) -> int:
    return len(set(clips.speakers))
