"""Sound to numbers: the log-mel formula written out, windows, rates and peaks at both ends of what is accepted."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soxr
import torch
from transformers.audio_utils import mel_filter_bank

from chorus_moe.processors import ChorusFeatureExtractor, MediaError, MediaLimits
from chorus_moe.processors.processing_limits import MediaPlace
from tests.processors.conftest import RATE, tone, wav_bytes

PLACE = MediaPlace("audio", 0)


def slow_log_mel(samples: np.ndarray, rate: int, n_fft: int, hop: int, bins: int) -> np.ndarray:
    """Frames (F, M) by a loop: windows of Hann around each hop, power, Slaney's filters, Whisper's scaling."""
    filters = mel_filter_bank(n_fft // 2 + 1, bins, 0.0, rate / 2, rate, norm="slaney", mel_scale="slaney")
    padded = np.pad(samples.astype(np.float64), (n_fft // 2, n_fft))
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n_fft) / n_fft)
    frames = []
    for start in range(0, max(len(samples), 1), hop):
        spectrum = np.fft.rfft(padded[start : start + n_fft] * window)
        frames.append(np.log10(np.maximum(np.abs(spectrum) ** 2 @ filters, 1e-10)))
    found = np.stack(frames)
    return (np.maximum(found, found.max() - 8) + 4) / 4


@pytest.mark.parametrize(("n_fft", "hop", "bins"), [(400, 160, 20), (64, 50, 8)])
@pytest.mark.parametrize("count", [1, 159, 160, 161, 3_000])
def test_features_are_those_of_the_formula(n_fft: int, hop: int, bins: int, count: int) -> None:
    samples = (tone(0.3) * np.linspace(0.01, 1, len(tone(0.3))))[:count].astype(np.float32)
    extractor = ChorusFeatureExtractor(feature_size=bins, n_fft=n_fft, hop_length=hop)
    found = extractor.log_mel(samples).numpy()
    # float32 against float64 at values of size 1.
    np.testing.assert_allclose(found, slow_log_mel(samples, RATE, n_fft, hop, bins), atol=2e-4)


def test_what_is_softer_than_the_dynamic_range_sounds_as_its_edge() -> None:
    samples = (tone(0.3) * np.linspace(0.01, 1, len(tone(0.3)))).astype(np.float32)
    whole, narrow = (ChorusFeatureExtractor(dynamic_range=decades).log_mel(samples).numpy() for decades in (8.0, 3.0))
    # Four powers of ten are one unit.
    assert whole.min() < whole.max() - 1
    np.testing.assert_array_equal(narrow, np.maximum(whole, whole.max() - np.float32(0.75)))


def test_settings_where_nothing_was_said() -> None:
    found = ChorusFeatureExtractor()
    settings = {
        "feature_size": 80, "sampling_rate": 16_000, "n_fft": 400, "hop_length": 160, "max_seconds": 30.0,
        "max_audio_seconds": 300.0, "on_long_audio": "split", "strict_sampling_rate": False, "allow_silence": False,
        "padding_value": 0.0, "feature_type": "log_mel", "do_normalize": False, "dynamic_range": 8.0,
        "padding_side": None,
    }  # fmt: skip
    assert {name: getattr(found, name) for name in settings} == settings


@pytest.mark.parametrize(
    ("seconds", "hop", "frames"), [(1.0, 160, 100), (0.01, 160, 1), (0.0199, 160, 1), (0.02, 160, 2), (0.5, 1, 8_000)]
)
def test_a_window_has_the_hops_that_fit(seconds: float, hop: int, frames: int) -> None:
    extractor = ChorusFeatureExtractor(max_seconds=seconds, hop_length=hop)
    assert extractor.window_frames == frames
    full, more = frames * hop, frames * hop + 1
    assert extractor.frames_per_window(full) == [frames] and extractor.frames_per_window(more) == [frames, 1]
    assert extractor.frames_per_window(0) == [1] and extractor.frames_per_window(2 * full) == [frames] * 2


def test_a_window_that_holds_no_hop_and_words_that_mean_nothing_are_refused() -> None:
    ChorusFeatureExtractor(max_seconds=0.01)
    for options, reason in (
        ({"max_seconds": 0.0099}, "^max_seconds=0.0099 is shorter than one hop of 160 samples$"),
        ({"feature_type": "mel"}, "^feature_type must be one of log_mel, whisper, waveform, found 'mel'$"),
        ({"on_long_audio": "cut"}, "^on_long_audio must be 'split' or 'error', found 'cut'$"),
        ({"dynamic_range": 0.0}, r"^dynamic_range=0\.0: expected finite numbers from 0\.1 to 40$"),
        ({"dynamic_range": float("nan")}, "^dynamic_range=nan: expected finite"),
        ({"hop_lenght": 1}, "^unknown setting hop_lenght=1; hop_length is meant$"),
    ):
        with pytest.raises(ValueError, match=reason):
            ChorusFeatureExtractor(**options)


@pytest.mark.parametrize(("peak", "reason"), [(16.0, None), (16.01, "float samples reach 16.01, expected -1..1")])
def test_floats_may_overshoot_by_intermediate_steps(peak: float, reason: str | None) -> None:
    clip, extractor = np.full(400, -peak, np.float32), ChorusFeatureExtractor()
    if reason is None:
        assert len(extractor.load(clip, PLACE, RATE)) == 400
    else:
        with pytest.raises(MediaError, match=f"^audio 0: {reason}"):
            extractor.load(clip, PLACE, RATE)


@pytest.mark.parametrize(("count", "is_refused"), [(16_000, False), (16_001, True)])
def test_one_window_holds_a_clip_of_its_length(count: int, is_refused: bool) -> None:
    extractor = ChorusFeatureExtractor(max_seconds=1.0, on_long_audio="error")
    clip = tone(2.0)[:count]
    if is_refused:
        with pytest.raises(MediaError, match="^audio 0: 1.00 seconds, one window has 1; on_long_audio='split' accepts"):
            extractor.load(clip, PLACE, RATE)
    else:
        assert len(extractor(clip, RATE).input_features) == 1


@pytest.mark.parametrize("rate", [8_000, 44_100])
@pytest.mark.parametrize("count", [1_001, 4_410])
def test_another_rate_is_resampled_to_the_length_that_was_counted(rate: int, count: int) -> None:
    clip = tone(1.0, rate=rate)[:count]
    found = ChorusFeatureExtractor().load(clip, PLACE, rate)
    length = math.ceil(count * RATE / rate)
    expected = soxr.resample(clip, rate, RATE)
    assert found.shape == (length,) and found.dtype == np.float32
    both = min(length, len(expected))
    np.testing.assert_array_equal(found[:both], expected[:both])
    assert not found[both:].any()


def test_the_rate_of_a_clip_wins_over_that_of_the_call() -> None:
    clip, extractor = tone(0.2, rate=8_000), ChorusFeatureExtractor()
    expected = extractor.load(clip, PLACE, 8_000)
    given = {"array": clip, "sampling_rate": 8_000}
    assert np.array_equal(extractor.load(given, PLACE, RATE), expected)
    assert np.array_equal(extractor.load({"array": clip}, PLACE, 8_000), expected)


@pytest.mark.parametrize(("shape", "channels"), [((2, 400), 2), ((400, 2), 2), ((2, 2), 2), ((3, 2), 2), ((400,), 1)])
def test_the_shorter_axis_has_the_channels(shape: tuple[int, ...], channels: int) -> None:
    array = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
    by_sample = array.reshape(-1, 1) if array.ndim == 1 else array.T if shape[0] < shape[1] else array
    assert by_sample.shape[1] == channels
    np.testing.assert_allclose(ChorusFeatureExtractor().load(array, PLACE, RATE), by_sample.mean(axis=1), atol=1e-6)


@pytest.mark.parametrize("kind", ["int16", "int32", "uint8"])
def test_integers_of_sound_have_a_scale(kind: str) -> None:
    clip, info = tone(0.1), np.iinfo(kind)
    middle = 128 if kind == "uint8" else 0
    scaled = (0.9 * clip.astype(np.float64) * (info.max - middle) + middle).round().astype(kind)
    found = ChorusFeatureExtractor().load(scaled, PLACE, RATE)
    np.testing.assert_allclose(found, 0.9 * clip, atol=2e-7 + 2 / (info.max - middle))
    for other in ("int64", "uint16", "int8", "bool"):
        with pytest.raises(MediaError, match=f"^audio 0: samples of type {other} have no known scale"):
            ChorusFeatureExtractor().load(np.ones(400, other), PLACE, RATE)


def test_a_ragged_list_is_no_clip() -> None:
    with pytest.raises(MediaError, match="^audio 0: not an array of samples"):
        ChorusFeatureExtractor().load([[0.1, 0.2], [0.3]], PLACE, RATE)
    with pytest.raises(MediaError, match=r"^audio 0: a clip has 1 or 2 axes, found the shape \(\)$"):
        ChorusFeatureExtractor().load(np.float32(1), PLACE, RATE)


def test_files_in_lists_are_decoded_where_they_stand(tmp_path: Path) -> None:
    extractor, path = ChorusFeatureExtractor(), tmp_path / "a.wav"
    path.write_bytes(wav_bytes(tone(0.1), subtype="FLOAT"))
    array = tone(0.1)
    found: Any = extractor.fetch_audio([path, [path.read_bytes()], array, [0.1, 0.2]])
    for item in (found[0], found[1][0], extractor.fetch_audio(str(path))):
        assert item["sampling_rate"] == RATE and np.array_equal(item["array"], array)
    assert found[2] is array and found[3] == [0.1, 0.2]


@pytest.mark.parametrize(
    ("saved", "given", "expected"), [(301, None, 300), (300, None, 300), (20, None, 20), (301, 400, 400)]
)
def test_a_file_can_lower_the_longest_clip(saved: float, given: float | None, expected: float) -> None:
    options = {} if given is None else {"max_audio_seconds": given}
    settings = {"max_audio_seconds": saved}
    assert ChorusFeatureExtractor.from_dict(settings, **options).max_audio_seconds == expected
    assert given is not None or settings == {"max_audio_seconds": saved}
    assert ChorusFeatureExtractor.from_dict({}).max_audio_seconds == 300.0


def test_features_of_clips_stand_one_below_the_other_with_their_mask() -> None:
    extractor = ChorusFeatureExtractor(feature_size=4, max_seconds=0.02, padding_value=7.0, allow_silence=True)
    batch = extractor([tone(0.05), tone(0.005)], RATE)
    assert batch.input_features_mask.tolist() == [[True, True], [True, True], [True, False], [True, False]]
    assert batch.input_features.dtype == np.float32 and batch.input_features.shape == (4, 2, 4)
    assert (batch.input_features[~batch.input_features_mask] == 7).all()
    windows = extractor.log_mel(tone(0.05)).numpy()
    np.testing.assert_array_equal(batch.input_features[:2].reshape(4, 4), windows[:4])
    assert isinstance(extractor(tone(0.01), RATE, return_tensors="pt").input_features, torch.Tensor)


def test_a_whisper_window_is_masked_where_the_clip_ends_and_silent_behind() -> None:
    extractor = ChorusFeatureExtractor(feature_size=20, max_seconds=0.5, feature_type="whisper")
    batch = extractor(tone(0.6), RATE)
    assert batch.input_features.shape == (2, 50, 20)
    assert batch.input_features_mask.sum(1).tolist() == [50, 10]
    assert np.ptp(batch.input_features[1, 20:], axis=0).max() == 0


def test_limits_are_never_saved() -> None:
    extractor = ChorusFeatureExtractor()
    extractor.limits = MediaLimits(audio_channels=1)
    assert "limits" not in extractor.to_dict()
    with pytest.raises(MediaError, match="2 channels, the limit is 1"):
        extractor.load(np.ones((400, 2), np.float32), PLACE, RATE)
