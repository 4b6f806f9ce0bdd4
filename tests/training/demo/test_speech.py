"""Synthetic voices and real recordings of digits."""

import os
from pathlib import Path

import numpy as np
import pytest

from chorus_moe.training.demo.speech import (
    NEW_VARIANTS,
    SAMPLING_RATE,
    TEST_VARIANTS,
    TRAIN_VARIANTS,
    SpeechClips,
    SynthesisSettings,
    recorded_digits,
    split_held_out,
    split_last_takes,
    synthetic_digits,
    trim_silence,
)

RECORDINGS = Path(os.environ.get("CHORUS_SPEECH_DIR", Path(__file__).parents[4] / "shared" / "data" / "spoken_digits"))
SMALL = SynthesisSettings(
    variants=("m1", "f4"), languages=("en-us",), accents=("de",), languages_per_variant=2, takes=1
)
needs_recordings = pytest.mark.skipif(
    not any(RECORDINGS.glob("0_*_0.wav")) if RECORDINGS.is_dir() else True,
    reason=f"no real recordings in {RECORDINGS}; set CHORUS_SPEECH_DIR to a folder of them",
)


def write_recordings(folder: Path, speakers: tuple[str, ...], takes: int, rate: int = 8000) -> None:
    soundfile = pytest.importorskip("soundfile")
    for number, speaker in enumerate(speakers):
        for digit in range(10):
            for take in range(takes):
                tone = np.sin(np.arange(rate // 4) * (0.1 + 0.01 * digit + 0.1 * number + 0.001 * take))
                soundfile.write(folder / f"{digit}_{speaker}_{take}.wav", 0.5 * tone, rate)


def test_every_voice_says_every_digit(tmp_path):
    pytest.importorskip("espeakng_loader")
    clips = synthetic_digits(SMALL, tmp_path)
    assert sorted(set(clips.speakers)) == ["de+f4", "de+m1", "en-us+f4", "en-us+m1"]
    for speaker in set(clips.speakers):
        assert sorted(clips.by_speaker(speaker).digits) == list(range(10))
    for waveform in clips.waveforms:
        assert waveform.dtype == np.float32 and 0.1 < len(waveform) / SAMPLING_RATE < 2
        assert 0.5 < np.abs(waveform).max() <= 1


def test_two_fresh_processes_synthesise_the_same_samples(tmp_path):
    pytest.importorskip("espeakng_loader")
    first, second = (synthetic_digits(SMALL, tmp_path / name) for name in "ab")
    for left, right in zip(first.waveforms, second.waveforms, strict=True):
        assert np.array_equal(left, right)


def test_cached_speech_is_not_spoken_again(tmp_path, monkeypatch):
    clips = SpeechClips([np.full(4, 0.5, np.float32)], np.array([7]), ["nobody"])
    clips.save(tmp_path / f"espeak-{SMALL.key}.npz")
    monkeypatch.setattr("subprocess.run", lambda *_, **__: pytest.fail("spoke again"))
    assert synthetic_digits(SMALL, tmp_path).speakers == ["nobody"]


def test_other_settings_have_another_key():
    assert SMALL.key == SynthesisSettings(**vars(SMALL)).key
    assert SMALL.key != SynthesisSettings(**{**vars(SMALL), "seed": 1}).key


def test_an_unknown_voice_is_named_in_the_error(tmp_path):
    pytest.importorskip("espeakng_loader")
    with pytest.raises(RuntimeError, match="xx-nowhere"):
        synthetic_digits(SynthesisSettings(variants=("m1",), languages=("xx-nowhere",), takes=1), tmp_path)
    assert not list(tmp_path.glob("*.npz"))


def test_variants_of_the_three_sets_are_disjoint():
    names = TRAIN_VARIANTS + TEST_VARIANTS + NEW_VARIANTS
    assert len(set(names)) == len(names)


def test_saved_clips_come_back_within_half_a_step_of_16_bits(tmp_path):
    rng = np.random.default_rng(0)
    waveforms = [rng.uniform(-1, 1, length).astype(np.float32) for length in (5, 1, 300)]
    SpeechClips(waveforms, np.array([1, 2, 3]), ["a", "b", "ä"]).save(tmp_path / "clips.npz")
    loaded = SpeechClips.load(tmp_path / "clips.npz")
    assert list(loaded.digits) == [1, 2, 3] and loaded.speakers == ["a", "b", "ä"]
    for left, right in zip(waveforms, loaded.waveforms, strict=True):
        np.testing.assert_allclose(left, right, atol=0.5 / 32767 + 1e-7)


def test_trimming_keeps_the_loud_part_and_a_margin():
    waveform = np.zeros(1000, np.float32)
    waveform[500:600] = 1
    assert len(trim_silence(waveform, margin=50)) == 200
    assert len(trim_silence(np.zeros(10, np.float32))) == 10


def test_recordings_are_read_by_name_and_resampled(tmp_path):
    write_recordings(tmp_path, ("ann", "bob"), takes=2)
    (tmp_path / "notes.wav").write_bytes(b"not a recording")
    clips = recorded_digits(tmp_path)
    assert len(clips) == 40 and sorted(set(clips.speakers)) == ["ann", "bob"]
    assert {len(waveform) for waveform in clips.waveforms} == {SAMPLING_RATE // 4}


def test_a_folder_without_recordings_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="digit.*speaker.*take"):
        recorded_digits(tmp_path)


def test_a_held_out_speaker_is_only_in_adaptation_and_test(tmp_path):
    write_recordings(tmp_path, ("ann", "bob", "cyd"), takes=4)
    others, adaptation, test = split_held_out(recorded_digits(tmp_path), "bob", takes=3)
    assert set(others.speakers) == {"ann", "cyd"} and set(adaptation.speakers) == set(test.speakers) == {"bob"}
    assert np.bincount(adaptation.digits).tolist() == [3] * 10 and np.bincount(test.digits).tolist() == [1] * 10


@pytest.mark.parametrize("speaker", ["dan", "Ann"])
def test_an_unknown_held_out_speaker_lists_the_known_ones(tmp_path, speaker):
    write_recordings(tmp_path, ("ann", "bob"), takes=1)
    with pytest.raises(ValueError, match="ann, bob"):
        split_held_out(recorded_digits(tmp_path), speaker)


def test_no_clip_left_for_testing_is_an_error(tmp_path):
    write_recordings(tmp_path, ("ann", "bob"), takes=1)
    with pytest.raises(ValueError, match="10 clips, none left"):
        split_held_out(recorded_digits(tmp_path), "ann", takes=5)


def test_the_last_tenth_of_every_speakers_takes_of_a_digit_is_split_off():
    """One speaker says every digit twenty times, another once: of that one nothing can be spared."""
    digits = np.array([*range(10)] * 20 + [*range(10)])
    waveforms = [np.full(4, row, np.float32) for row in range(len(digits))]
    clips = SpeechClips(waveforms, digits, ["ann"] * 200 + ["bob"] * 10)
    first, last = split_last_takes(clips)
    assert [wave[0] for wave in last.waveforms] == list(range(180, 200)) and set(last.speakers) == {"ann"}
    assert [wave[0] for wave in first.waveforms] == [*range(180), *range(200, 210)]


@needs_recordings
def test_the_shared_recordings_split_by_speaker():
    clips = recorded_digits(RECORDINGS)
    speaker = sorted(set(clips.speakers))[0]
    others, adaptation, test = split_held_out(clips, speaker)
    assert len(others) + len(adaptation) + len(test) == len(clips) and len(adaptation) == 50


def test_other_words_are_numbered_in_their_order_and_said_as_they_are_written():
    spoken = SynthesisSettings(variants=("m1",), words=("yes", "no"), languages_per_variant=1, takes=2).utterances()
    assert [(number, text) for _, number, text, *_ in spoken] == [(0, "yes"), (1, "no")] * 2
