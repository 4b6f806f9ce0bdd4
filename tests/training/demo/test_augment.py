"""Augmentation: repeatable, bounded, and each effect does what its name says."""

import numpy as np
import pytest
from PIL import Image

from chorus_moe.training.demo.augment import (
    SAMPLING_RATE,
    PictureAugment,
    SpeechAugment,
    augmented_clips,
    change_speed,
    change_tempo,
    coloured_noise,
    room_response,
)
from chorus_moe.training.demo.speech import SpeechClips


def tone(hertz: float, seconds: float = 0.5) -> np.ndarray:
    return np.sin(2 * np.pi * hertz * np.arange(round(seconds * SAMPLING_RATE)) / SAMPLING_RATE).astype(np.float32)


def loudest_hertz(waveform: np.ndarray) -> float:
    spectrum = np.abs(np.fft.rfft(waveform * np.hanning(len(waveform))))
    return float(spectrum.argmax() * SAMPLING_RATE / len(waveform))


def test_speed_moves_pitch_and_duration():
    faster = change_speed(tone(400), 1.25)
    assert len(faster) == 6400 and loudest_hertz(faster) == pytest.approx(500, abs=5)


def test_tempo_moves_duration_and_keeps_pitch():
    faster = change_tempo(tone(400), 1.25)
    assert len(faster) == 6400 and loudest_hertz(faster) == pytest.approx(400, abs=5)


def test_a_telephone_hears_nothing_outside_its_band():
    narrow = SpeechAugment(
        speed=(1, 1), tempo_probability=0, crop=(0, 0), padding=(0, 0), telephone=1, telephone_edge=(2_000, 2_000),
        channel=0, room=0, noise_probability=0,
    )  # fmt: skip
    spectrum = np.abs(np.fft.rfft(narrow(tone(1000) + tone(6000), np.random.default_rng(0))))
    assert spectrum[3000] < 1e-2 * spectrum[500]


def test_noise_has_unit_power_at_any_length():
    rng = np.random.default_rng(0)
    for length in (1, 257, 5000):
        assert (coloured_noise(rng, length, 1.0) ** 2).mean() == pytest.approx(1, rel=1e-3)


def test_a_room_decays_after_the_direct_path():
    response = room_response(np.random.default_rng(0), 0.2, 0.5)
    assert response[0] == 1 and np.abs(response[-100:]).max() < 0.01


def test_an_augmented_clip_is_a_function_of_the_generator_state():
    augment = SpeechAugment()
    for seed in range(20):
        first, second = (augment(tone(300), np.random.default_rng(seed)) for _ in range(2))
        assert np.array_equal(first, second)
        assert first.dtype == np.float32 and np.isfinite(first).all() and np.abs(first).max() <= 0.951
    assert not np.array_equal(first, augment(tone(300), np.random.default_rng(99))[: len(first)])


def test_silence_and_very_short_clips_stay_finite():
    for waveform in (np.zeros(800, np.float32), np.ones(1, np.float32)):
        for seed in range(5):
            assert np.isfinite(SpeechAugment()(waveform, np.random.default_rng(seed))).all()


def test_augmented_clips_do_not_depend_on_the_number_of_workers_and_are_cached(tmp_path, monkeypatch):
    clips = SpeechClips([tone(200), tone(500, 0.3)], np.array([3, 8]), ["a", "b"])
    single = augmented_clips(clips, SpeechAugment(), 3, tmp_path / "one", workers=0)
    double = augmented_clips(clips, SpeechAugment(), 3, tmp_path / "two", workers=2)
    assert single.digits.tolist() == [3, 8] * 3 and single.speakers == ["a", "b"] * 3
    for left, right in zip(single.waveforms, double.waveforms, strict=True):
        assert np.array_equal(left, right)
    monkeypatch.setattr("torch.utils.data.DataLoader", lambda *_, **__: pytest.fail("augmented again"))
    assert len(augmented_clips(clips, SpeechAugment(), 3, tmp_path / "one")) == 6


def test_a_picture_keeps_size_and_mode_and_repeats():
    picture = Image.fromarray((np.random.default_rng(0).random((32, 32)) * 255).astype(np.uint8))
    first, second = (PictureAugment()(picture, np.random.default_rng(5)) for _ in range(2))
    assert first.size == (32, 32) and first.mode == "L" and first.tobytes() == second.tobytes() != picture.tobytes()


def test_a_picture_without_changes_stays_itself():
    picture = Image.fromarray((np.random.default_rng(0).random((16, 16)) * 255).astype(np.uint8))
    still = PictureAugment(degrees=0, slant=0, shift=0, zoom=(1, 1), contrast=(1, 1))
    assert still(picture, np.random.default_rng(0)).tobytes() == picture.tobytes()
