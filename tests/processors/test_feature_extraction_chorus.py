import json
import math
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import Wav2Vec2FeatureExtractor, WhisperFeatureExtractor

from chorus_moe.processors import ChorusFeatureExtractor, MediaError
from tests.processors.conftest import RATE, tone, wav_bytes


@pytest.fixture
def extractor() -> ChorusFeatureExtractor:
    return ChorusFeatureExtractor(feature_size=20, max_seconds=1.0, max_audio_seconds=5.0)


@pytest.mark.parametrize("num_samples", [1, 159, 160, 161, 1000, 15_999, 16_000, 16_001, 40_000])
def test_a_clip_has_ceil_samples_over_hop_frames_in_windows(extractor, num_samples):
    batch = extractor(tone(5.0)[:num_samples], RATE, return_tensors="pt")
    frames = max(math.ceil(num_samples / 160), 1)
    assert batch.input_features_mask.sum() == frames
    assert batch.input_features_mask.sum(1).tolist() == extractor.frames_per_window(num_samples)
    assert len(batch.input_features) == math.ceil(frames / 100)


@pytest.mark.parametrize("seconds", [0.4, 1.0, 1.7])
def test_features_of_other_encoders_are_those_of_their_own_extractors(seconds):
    clip = tone(seconds) + 0.1
    size = 16_000
    whisper = ChorusFeatureExtractor(feature_size=20, max_seconds=1.0, feature_type="whisper")
    expected = WhisperFeatureExtractor(feature_size=20, chunk_length=1, dither=0.0)
    windows = [clip[start : start + size] for start in range(0, len(clip), size)]
    found = whisper(clip, RATE, return_tensors="pt").input_features
    assert len(found) == len(windows)
    for window, features in zip(windows, found, strict=True):
        reference = expected(window, sampling_rate=RATE, return_tensors="pt").input_features[0].T
        torch.testing.assert_close(features, reference, rtol=0, atol=0)

    waveform = ChorusFeatureExtractor(
        feature_size=1, hop_length=1, max_seconds=5.0, feature_type="waveform", do_normalize=True
    )
    reference = Wav2Vec2FeatureExtractor()(clip, sampling_rate=RATE, return_tensors="pt").input_values[0]
    torch.testing.assert_close(waveform(clip, RATE, return_tensors="pt").input_features[0, :, 0], reference)
    plain = ChorusFeatureExtractor(feature_size=1, hop_length=1, max_seconds=5.0, feature_type="waveform")
    np.testing.assert_array_equal(plain(clip, RATE).input_features[0, :, 0], clip)


def test_features_depend_neither_on_batch_mates_nor_on_padding(extractor):
    clips = [tone(0.05), tone(0.9, 300), tone(2.3, 1000)]
    together = extractor(clips, RATE, return_tensors="pt")
    row = 0
    for clip in clips:
        alone = extractor(clip, RATE, return_tensors="pt").input_features
        rows = together.input_features[row : row + len(alone)]
        assert torch.equal(rows[:, : alone.shape[1]], alone)
        row += len(alone)
    assert not together.input_features[~together.input_features_mask].any()


def test_the_end_of_a_long_clip_is_heard(extractor):
    quiet, late = tone(3.0) * 0.1, tone(3.0) * 0.1
    late[-2000:] += tone(0.125, 3000)
    first = extractor(quiet, RATE).input_features
    second = extractor(late, RATE).input_features
    assert first.shape == second.shape == (3, 100, 20)
    assert np.abs(first[2] - second[2]).max() > 0.5


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000])
def test_another_rate_gives_nearly_the_same_features(extractor, rate):
    expected = extractor(tone(0.5), RATE).input_features
    found = extractor(tone(0.5, rate=rate), rate).input_features
    assert found.shape == expected.shape
    # The band limits differ at the very top and at the two ends; the tone's own bin must agree.
    peak = expected[0].mean(0).argmax()
    np.testing.assert_allclose(found[0, 5:-5, peak], expected[0, 5:-5, peak], atol=0.02)


def test_arrays_lists_integers_channels_and_files_agree(extractor):
    clip = tone(0.3)
    expected = extractor(clip, RATE).input_features
    same = [
        clip.tolist(),
        torch.from_numpy(clip),
        np.stack([clip, clip]),
        np.stack([clip, clip], axis=1),
        {"array": clip, "sampling_rate": RATE},
        wav_bytes(clip, subtype="FLOAT"),
        {"bytes": wav_bytes(clip, subtype="FLOAT"), "path": None},
    ]
    for item in same:
        np.testing.assert_allclose(extractor(item, RATE).input_features, expected, atol=1e-6)
    integers = extractor((clip * 32767).astype(np.int16), RATE).input_features
    # 16-bit rounding is audible only in the floor of empty bins.
    assert np.abs(integers - expected)[expected > 0].max() < 0.05


@pytest.mark.parametrize(
    ("clip", "rate", "reason"),
    [
        (tone(0.1), None, "needs its sampling rate"),
        (tone(0.1), math.nan, "whole number of Hz, found nan"),
        (tone(0.1), math.inf, "whole number of Hz, found inf"),
        ({"array": tone(0.1), "sampling_rate": None}, RATE, "needs its sampling rate"),
        (tone(0.1), 999, "sampling rate 999 is outside"),
        (tone(0.1), 16_000.5, "whole number of Hz"),
        (np.zeros(0, dtype=np.float32), RATE, "empty clip"),
        (np.zeros(400, dtype=np.float32), RATE, "silent"),
        (np.stack([tone(0.1), -tone(0.1)]), RATE, "silent"),
        (np.append(tone(0.1), np.nan), RATE, "NaN or infinite"),
        (np.append(tone(0.1), np.inf), RATE, "NaN or infinite"),
        (tone(0.1) * 20_000, RATE, "expected -1..1"),
        (np.ones(400, dtype=np.int64), RATE, "no known scale"),
        (np.ones((2, 3, 4)), RATE, "1 or 2 axes"),
        (np.ones((500, 600)), RATE, "500 channels"),
        (np.ones(600 * 8_000, dtype=np.float32), 8_000, "600.00 seconds, the limit max_audio_seconds is 5"),
    ],
)
def test_a_bad_clip_gets_one_clear_reason(extractor, clip, rate, reason):
    with pytest.raises(MediaError, match=rf"audio 1: .*{reason}"):
        extractor([{"array": tone(0.1), "sampling_rate": RATE}, clip], rate)


class Decoder:
    """What `datasets` gives for a column of sound: torchcodec's `AudioDecoder`, by its documented attributes."""

    def __init__(self, samples: np.ndarray, seconds: float | None, channels: int = 2):
        self.metadata = SimpleNamespace(sample_rate=RATE, num_channels=channels, duration_seconds_from_header=seconds)
        self.samples, self.was_decoded = samples, False

    def get_all_samples(self) -> SimpleNamespace:
        self.was_decoded = True
        return SimpleNamespace(data=torch.from_numpy(self.samples), sample_rate=RATE)


def test_a_decoder_of_datasets_is_a_clip(extractor):
    clip = np.stack([tone(0.3), 0.5 * tone(0.3)])
    expected = extractor(clip, RATE).input_features
    for decoder in (Decoder(clip, 0.3), Decoder(clip, None)):
        assert np.array_equal(extractor(decoder).input_features, expected)
    for decoder, reason in ((Decoder(clip, 9.0), "9.00 seconds"), (Decoder(clip, 0.3, channels=9), "9 channels")):
        with pytest.raises(MediaError, match=reason):
            extractor(decoder)
        assert not decoder.was_decoded
    with pytest.raises(MediaError, match="6.00 seconds"):
        extractor(Decoder(tone(6.0)[None], None))


def test_sound_in_half_precision_is_heard(extractor):
    clip = torch.from_numpy(tone(0.3))
    for dtype in (torch.bfloat16, torch.float16):
        expected = extractor(clip.to(dtype).float(), RATE).input_features
        assert np.array_equal(extractor(clip.to(dtype), RATE).input_features, expected)


def test_strict_settings_refuse_instead_of_adapting():
    with pytest.raises(MediaError, match="sampling rate 44100, the model hears 16000 Hz"):
        ChorusFeatureExtractor(strict_sampling_rate=True)(tone(0.1, rate=44_100), 44_100)
    with pytest.raises(MediaError, match="2.00 seconds, one window has 1"):
        ChorusFeatureExtractor(max_seconds=1.0, on_long_audio="error")(tone(2.0), RATE)
    silent = ChorusFeatureExtractor(allow_silence=True)(np.zeros(400, dtype=np.float32), RATE)
    assert np.isfinite(silent.input_features).all()
    with pytest.raises(ValueError, match="on_long_audio"):
        ChorusFeatureExtractor(on_long_audio="cut")


def test_saving_is_exact_and_small(extractor, tmp_path):
    extractor(tone(0.1), RATE)
    extractor.save_pretrained(tmp_path)
    loaded = ChorusFeatureExtractor.from_pretrained(tmp_path)
    assert loaded.to_dict() == extractor.to_dict()
    assert len(json.dumps(loaded.to_dict())) < 600
    expected = extractor(tone(0.2), RATE).input_features
    for other in (loaded, pickle.loads(pickle.dumps(extractor))):
        assert np.array_equal(other(tone(0.2), RATE).input_features, expected)


@pytest.mark.parametrize(("peak", "is_heard"), [(2.0**-15, True), (2.0**-16, True), (0.9 * 2.0**-16, False)])
def test_sound_is_heard_from_half_a_step_of_sixteen_bits_on(peak: float, is_heard: bool):
    clip = np.zeros(400, dtype=np.float32)
    clip[100] = -peak
    if is_heard:
        assert np.isfinite(ChorusFeatureExtractor()(clip, RATE).input_features).all()
    else:
        with pytest.raises(MediaError, match="silent"):
            ChorusFeatureExtractor()(clip, RATE)
