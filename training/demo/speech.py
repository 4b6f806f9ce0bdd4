"""Spoken digits: synthetic voices (eSpeak NG through ctypes) and a folder of real recordings.

Unusual here:
- eSpeak NG is not repeatable within a process: the whole set is spoken once, in a fresh process that runs this file,
  and cached as plain arrays keyed by the settings. Some voices differ even between fresh processes (320 of 4,480 clips
  of the demo), so runs that are to be compared must share a cache;
- accents are made by giving a foreign voice the words in its own spelling ("sri" for "three" in German);
- speakers are the unit of every split, never clips.

The engine is GPLv3, optional (`pip install chorus-moe[speech]`) and only ever loaded in that other process.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

SAMPLING_RATE = 16_000
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# Short common words that are no digits: whoever can tell these apart as well has learnt sounds, not ten patterns.
OTHER_WORDS = tuple(
    "yes no up down left right go stop on off bed bird cat dog house tree wow happy learn begin back forward follow "
    "visual door window light dark open close red green blue black white yellow hand head foot face water fire air "
    "stone bread milk cheese fish apple lemon table chair glass paper book word name time day night week month year "
    "north south east west king queen ship train street city sheep shape sick sack tip take late fright "
    "height sleigh neat wait free".split()
)
ENGLISH = ("en", "en-us", "en-gb-x-rp", "en-gb-scotland", "en-gb-x-gbclan", "en-gb-x-gbcwmd", "en-029", "en-us-nyc")
# English digits in the spelling of other languages, so that their voices speak with an accent.
ACCENTS: dict[str, tuple[str, ...]] = {
    "de": ("siro", "uann", "tu", "sri", "for", "faif", "six", "sewwen", "ejt", "nain"),
    "fr": ("ziro", "ouane", "tou", "sri", "faur", "faïve", "sixe", "sévène", "éïte", "naïne"),
    "es": ("sirou", "uan", "tu", "zri", "for", "faif", "six", "seven", "eit", "nain"),
    "it": ("ziro", "uan", "tu", "tri", "for", "faiv", "sics", "seven", "eit", "nain"),
    "nl": ("ziero", "wan", "toe", "srie", "foor", "faajf", "siks", "sevven", "eet", "najn"),
    "el": ("ζίρο", "ουάν", "του", "θρι", "φορ", "φάιβ", "σιξ", "σέβεν", "έιτ", "νάιν"),
    "pl": ("ziro", "łan", "tu", "sri", "for", "fajw", "siks", "sewen", "ejt", "najn"),
    "ru": ("зиро", "уан", "ту", "сри", "фор", "файв", "сикс", "сэвэн", "эйт", "найн"),
}
TRAIN_VARIANTS = tuple(
    "Alex Alicia Andy Denis Diogo Gene Henrique Jacky Lee Marco Michael Mike Nguyen adam anika antonio aunty belinda "
    "benjamin boris caleb david ed edward f1 f2 f3 grandma gustave ian iven iven3 john kaukovalta klatt klatt3 klatt5 "
    "linda m1 m2 m4 m5 m7 marcelo max michel miguel norbert pablo paul quincy rob sandro shelby steph travis".split()
)
TEST_VARIANTS = ("Andrea", "Annie", "Hugo", "Mario", "Reed", "f4", "f5", "m3", "m6", "m8", "robert", "victor", "pedro")
NEW_VARIANTS = ("whisper", "whisperf", "croak", "Demonic", "UniRobot", "robosoft4", "Tweaky", "Storm")


@dataclass(frozen=True)
class SpeechClips:
    """Recordings of digits: `waveforms` float32 of (samples,) at 16 kHz, `digits` (clips,), one speaker name each."""

    waveforms: list[np.ndarray]
    digits: np.ndarray
    speakers: list[str]

    def __len__(self) -> int:
        return len(self.waveforms)

    def select(self, rows: Iterable[int]) -> SpeechClips:
        """The clips with the given row numbers, in that order."""
        rows = [int(row) for row in rows]
        return SpeechClips([self.waveforms[i] for i in rows], self.digits[rows], [self.speakers[i] for i in rows])

    def by_speaker(self, *speakers: str) -> SpeechClips:
        """All the clips of the named speakers."""
        return self.select(row for row, speaker in enumerate(self.speakers) if speaker in speakers)

    def __add__(self, other: SpeechClips) -> SpeechClips:
        digits = np.concatenate([self.digits, other.digits])
        return SpeechClips(self.waveforms + other.waveforms, digits, self.speakers + other.speakers)

    def save(self, path: Path) -> None:
        """Write a plain `.npz` of 16-bit samples (never pickled objects); the file appears only when complete."""
        samples = np.concatenate(self.waveforms) if self.waveforms else np.zeros(0, np.float32)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Renamed when complete: a run that is cut short leaves no half cache.
        partial = path.with_suffix(".partial.npz")
        np.savez(
            partial,
            samples=np.round(samples * 32767).clip(-32768, 32767).astype(np.int16),
            lengths=np.array([len(waveform) for waveform in self.waveforms], np.int64),
            digits=self.digits.astype(np.int64),
            speakers=np.array(self.speakers, dtype=np.str_),
        )
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> SpeechClips:
        """Read what `save` wrote."""
        # A cache may come from somewhere else, and pickles run code.
        with np.load(path, allow_pickle=False) as arrays:
            samples = arrays["samples"].astype(np.float32) / 32767
            waveforms = np.split(samples, np.cumsum(arrays["lengths"])[:-1])
            return cls(list(waveforms), arrays["digits"], [str(name) for name in arrays["speakers"]])


@dataclass(frozen=True)
class SynthesisSettings:
    """What to synthesise: every voice says the `words` in `takes` prosodies (rate, pitch, range).

    A voice is `language+variant`, its speaker name; `accents` use the words of `ACCENTS`. The prosodies are drawn from
    `seed`. Each variant is spoken in `languages_per_variant` of the languages, dealt round-robin.
    """

    variants: tuple[str, ...] = TRAIN_VARIANTS
    languages: tuple[str, ...] = ENGLISH
    accents: tuple[str, ...] = ()
    languages_per_variant: int = 4
    takes: int = 2
    rates: tuple[int, int] = (110, 260)
    pitches: tuple[int, int] = (10, 90)
    ranges: tuple[int, int] = (10, 90)
    seed: int = 0
    words: tuple[str, ...] = WORDS

    @property
    def key(self) -> str:
        """Short hash of the settings and of this file's word lists: the name of the cached file."""
        # The word lists are no setting, but a change to them must not read old clips.
        text = json.dumps([asdict(self), WORDS, ACCENTS], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def utterances(self) -> list[tuple[str, int, str, int, int, int]]:
        """(voice, digit, text, rate in words a minute, pitch 0..99, pitch range 0..99) in speaking order."""
        rng = np.random.default_rng(self.seed)
        languages = self.languages + self.accents
        spoken = []
        for number, variant in enumerate(self.variants):
            for turn in range(min(self.languages_per_variant, len(languages))):
                # Round-robin, so that all languages get about as many voices.
                language = languages[(number * self.languages_per_variant + turn) % len(languages)]
                words = ACCENTS[language] if language in self.accents else self.words
                for _ in range(self.takes):
                    for digit, text in enumerate(words):
                        rate, pitch, spread = (
                            int(rng.integers(low, high + 1)) for low, high in (self.rates, self.pitches, self.ranges)
                        )
                        spoken.append((f"{language}+{variant}", digit, text, rate, pitch, spread))
        return spoken


def synthetic_digits(settings: SynthesisSettings, cache: Path) -> SpeechClips:
    """Spoken digits of many synthetic voices, from `cache` if these settings were spoken before.

    Raises:
        RuntimeError: espeakng-loader is not installed, or the engine knows no such voice; the message says which.
    """
    path = Path(cache) / f"espeak-{settings.key}.npz"
    if not path.exists():
        # -P: the folder of this file does not become an import path, so nothing in it can hide another package.
        command = [sys.executable, "-P", str(Path(__file__).resolve()), str(path), json.dumps(asdict(settings))]
        process = subprocess.run(command, capture_output=True, text=True, check=False)
        if process.returncode or not path.exists():
            reason = (process.stderr.strip().splitlines() or [f"exit status {process.returncode}"])[-1]
            raise RuntimeError(f"speech synthesis failed: {reason}")
    return SpeechClips.load(path)


def recorded_digits(folder: Path) -> SpeechClips:
    """Real recordings `{digit}_{speaker}_{take}.wav` of a folder: mono, 16 kHz, same level, by speaker, digit and take.

    Raises:
        FileNotFoundError: the folder holds no such file.
        ValueError: a file of that name pattern is empty.
    """
    import soundfile
    import soxr

    found = []
    for path in Path(folder).glob("*.wav"):
        match = re.fullmatch(r"([0-9])_([^_]+)_([0-9]+)", path.stem)
        if match:
            found.append((match[2], int(match[1]), int(match[3]), path))
    if not found:
        raise FileNotFoundError(f"no recordings named {{digit}}_{{speaker}}_{{take}}.wav in {folder}")
    waveforms = []
    for *_, path in sorted(found):
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
        if not len(samples):
            raise ValueError(f"{path}: empty recording (0 samples)")
        waveforms.append(level(soxr.resample(samples.mean(axis=1), rate, SAMPLING_RATE)))
    digits = np.array([digit for _, digit, _, _ in sorted(found)])
    return SpeechClips(waveforms, digits, [speaker for speaker, *_ in sorted(found)])


def split_held_out(clips: SpeechClips, speaker: str, takes: int = 5) -> tuple[SpeechClips, SpeechClips, SpeechClips]:
    """(clips of the other speakers, the first `takes` clips per digit of `speaker`, the rest of that speaker's).

    Raises:
        ValueError: the speaker is unknown, the only one, or has no clip left for testing.
    """
    names = sorted(set(clips.speakers))
    if speaker not in names or len(names) < 2:
        raise ValueError(
            f"held-out speaker {speaker!r}: the recordings have {', '.join(names)}; two or more are needed"
        )
    mine = clips.by_speaker(speaker)
    # By digit: the first clips of a speaker may lack some digits.
    adaptation = [row for digit in range(10) for row in np.flatnonzero(mine.digits == digit)[:takes]]
    test = sorted(set(range(len(mine))) - {int(row) for row in adaptation})
    if not test:
        raise ValueError(
            f"held-out speaker {speaker!r}: {len(mine)} clips, none left for testing after {takes} a digit"
        )
    others = clips.by_speaker(*(name for name in names if name != speaker))
    return others, mine.select(adaptation), mine.select(test)


def split_last_takes(clips: SpeechClips, share: float = 0.1) -> tuple[SpeechClips, SpeechClips]:
    """(the first takes, the last `share` of the takes, one at least) of every digit of every speaker; an only take is
    among the first."""
    takes: dict[tuple[str, int], list[int]] = {}
    for row, key in enumerate(zip(clips.speakers, clips.digits.tolist(), strict=True)):
        takes.setdefault(key, []).append(row)
    last = sorted(row for rows in takes.values() for row in rows[max(1, int(len(rows) * (1 - share))) :])
    return clips.select(sorted(set(range(len(clips))) - set(last))), clips.select(last)


def level(waveform: np.ndarray, peak: float = 0.9) -> np.ndarray:
    """The clip as float32 with its largest sample at `peak`: speakers differ more in level than in anything else."""
    return (waveform * (peak / max(float(np.abs(waveform).max()), 1e-4))).astype(np.float32)


def trim_silence(waveform: np.ndarray, threshold: float = 0.02, margin: int = 320) -> np.ndarray:
    """Cut quiet ends (below `threshold` of the peak), keeping `margin` samples (20 ms) on both sides."""
    loud = np.flatnonzero(np.abs(waveform) > threshold * np.abs(waveform).max(initial=0.0))
    if not len(loud):
        return waveform
    return waveform[max(0, loud[0] - margin) : loud[-1] + 1 + margin]


class _Espeak:
    """The engine, in this process: speaks one text at a time into an array."""

    RATE, PITCH, RANGE = 1, 3, 4
    SYNCHRONOUS = 2
    UTF8 = 1

    def __init__(self) -> None:
        try:
            import espeakng_loader
        except ImportError as error:
            raise RuntimeError("espeakng-loader is not installed: pip install 'chorus-moe[speech]'") from error
        self.library = ctypes.CDLL(espeakng_loader.get_library_path())
        data = str(espeakng_loader.get_data_path()).encode()
        self.sampling_rate = self.library.espeak_Initialize(self.SYNCHRONOUS, 0, data, 0)
        if self.sampling_rate <= 0:
            raise RuntimeError(f"espeak-ng did not start: code {self.sampling_rate}")
        self.chunks: list[np.ndarray] = []
        kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
        self.callback = kind(self._collect)  # kept alive: the engine holds only the pointer
        self.library.espeak_SetSynthCallback(self.callback)

    def _collect(self, samples: ctypes._Pointer[ctypes.c_short], count: int, _events: int) -> int:
        if samples and count > 0:
            # Copied, because the engine uses its buffer again.
            self.chunks.append(np.ctypeslib.as_array(samples, shape=(count,)).copy())
        return 0

    def say(self, voice: str, text: str, rate: int, pitch: int, spread: int) -> np.ndarray:
        """Float32 samples at the engine's rate. Raises RuntimeError for an unknown voice or silence."""
        if self.library.espeak_SetVoiceByName(voice.encode()):
            raise RuntimeError(f"espeak-ng has no voice {voice!r}")
        for parameter, value in ((self.RATE, rate), (self.PITCH, pitch), (self.RANGE, spread)):
            self.library.espeak_SetParameter(parameter, value, 0)
        self.chunks.clear()
        encoded = text.encode()
        # One more than the text: the size includes the zero byte at its end.
        self.library.espeak_Synth(encoded, ctypes.c_size_t(len(encoded) + 1), 0, 0, 0, self.UTF8, None, None)
        self.library.espeak_Synchronize()
        if not self.chunks:
            raise RuntimeError(f"espeak-ng voice {voice!r} said nothing for {text!r}")
        return np.concatenate(self.chunks).astype(np.float32) / 32768


def _speak(settings: SynthesisSettings) -> SpeechClips:
    """Speak all utterances in this process, in order, trimmed, at 16 kHz."""
    import soxr

    engine = _Espeak()
    waveforms, digits, speakers = [], [], []
    for voice, digit, text, rate, pitch, spread in settings.utterances():
        spoken = soxr.resample(engine.say(voice, text, rate, pitch, spread), engine.sampling_rate, SAMPLING_RATE)
        waveforms.append(trim_silence(level(spoken)))
        digits.append(digit)
        speakers.append(voice)
    return SpeechClips(waveforms, np.array(digits), speakers)


def _main(arguments: Sequence[str]) -> None:
    path, text = arguments
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in json.loads(text).items()
    }
    _speak(SynthesisSettings(**values)).save(Path(path))


if __name__ == "__main__":
    _main(sys.argv[1:])
