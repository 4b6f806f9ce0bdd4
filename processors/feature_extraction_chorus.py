"""Sound to `input_features`, log-mel frames or samples, with a mask, in windows.

Unusual here:
- the sampling rate is required with arrays; another rate is resampled (soxr), or refused when `strict_sampling_rate`;
- features are computed clip by clip, so they depend neither on batch mates nor on padding;
- a clip longer than `max_seconds` is split into several windows (rows) and never truncated;
- for a Whisper encoder transformers' own feature extractor does the arithmetic, window by window, so that the encoder
  hears exactly what it was trained on, the silence up to the end of the window included;
- no filter bank is kept in the object or in the saved JSON.

Shape suffixes: N windows, F frames, M mel bins.
"""

import math
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from transformers import BatchFeature, WhisperFeatureExtractor
from transformers.feature_extraction_sequence_utils import SequenceFeatureExtractor
from transformers.utils import logging

from .processing_limits import (
    MediaLimits,
    MediaPlace,
    check_clip_size,
    check_rate,
    check_settings,
    decode_sound,
    float_samples,
    unpack_file_dict,
)
from .processing_placement import is_media_item

logger = logging.get_logger(__name__)

MAX_AUDIO_SECONDS = 300.0
FEATURE_TYPES = ("log_mel", "whisper", "waveform")
# Below half a step of 16-bit sound nothing can be heard: -96 dB of full scale.
SILENCE_PEAK = 2.0**-16
# Floats are expected in -1..1; intermediate processing overshoots a little, 16-bit integers stored as floats do not.
MAX_FLOAT_PEAK = 16.0
INTEGERS = ("int16", "int32", "uint8")


class ChorusFeatureExtractor(SequenceFeatureExtractor):
    """Log-mel frames in Whisper's normalisation (https://arxiv.org/abs/2212.04356, section 2.2), or samples, per clip.

    Args:
        feature_type: `log_mel`; `whisper`, whose windows are always full, the silence after a clip unmasked;
            `waveform`, samples as frames of size 1, `hop_length` 1.
        do_normalize: bring the samples of a clip to mean zero and variance one (`waveform` only).
        feature_size: mel bins M.
        sampling_rate: Hz the model hears; other rates are resampled.
        n_fft, hop_length: window and hop of the spectrogram, in samples.
        dynamic_range: powers of ten below the loudest bin of a clip that are heard (`log_mel`); Whisper's are 8.
        max_seconds: length of a window; a longer clip is split into windows, or refused with `on_long_audio="error"`.
        max_audio_seconds: longest clip accepted at all. A saved file can lower it and never raise it; the caller can.
        strict_sampling_rate: raise on another rate instead of resampling.
        allow_silence: accept clips without sound.
    """

    model_input_names = ["input_features", "input_features_mask"]
    limits = MediaLimits()

    def __init__(
        self,
        feature_size: int = 80,
        sampling_rate: int = 16_000,
        n_fft: int = 400,
        hop_length: int = 160,
        max_seconds: float = 30.0,
        max_audio_seconds: float = MAX_AUDIO_SECONDS,
        on_long_audio: str = "split",
        strict_sampling_rate: bool = False,
        allow_silence: bool = False,
        padding_value: float = 0.0,
        feature_type: str = "log_mel",
        do_normalize: bool = False,
        dynamic_range: float = 8.0,
        **kwargs: Any,
    ):
        given = {name: value for name, value in locals().items() if name not in ("self", "kwargs", "__class__")}
        check_settings(given | kwargs, given)
        if feature_type not in FEATURE_TYPES:
            raise ValueError(f"feature_type must be one of {', '.join(FEATURE_TYPES)}, found {feature_type!r}")
        if on_long_audio not in ("split", "error"):
            raise ValueError(f"on_long_audio must be 'split' or 'error', found {on_long_audio!r}")
        # Such a window would hold no frame.
        if max_seconds * sampling_rate < hop_length:
            raise ValueError(f"max_seconds={max_seconds:g} is shorter than one hop of {hop_length} samples")
        super().__init__(**given, **kwargs)
        # None of its own, so that a pipeline pads the clips of a batch on the side on which it pads text.
        self.padding_side = None

    @classmethod
    def from_dict(cls, feature_extractor_dict: dict[str, Any], **kwargs: Any) -> Self:
        saved = feature_extractor_dict.get("max_audio_seconds", 0)
        if isinstance(saved, int | float) and saved > MAX_AUDIO_SECONDS and "max_audio_seconds" not in kwargs:
            logger.warning(
                f"the saved max_audio_seconds={saved:g} is above {MAX_AUDIO_SECONDS:g}, which is taken; pass "
                "max_audio_seconds= to accept longer clips"
            )
            feature_extractor_dict = {**feature_extractor_dict, "max_audio_seconds": MAX_AUDIO_SECONDS}
        return super().from_dict(feature_extractor_dict, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The settings to save; never the limits, which a downloaded repository must not lift."""
        return {name: value for name, value in super().to_dict().items() if name != "limits"}

    @property
    def window_frames(self) -> int:
        """Frames of a full window."""
        return max(int(self.max_seconds * self.sampling_rate) // self.hop_length, 1)

    def frames_per_window(self, num_samples: int) -> list[int]:
        """Frames of every window of a clip of `num_samples` at the model's rate; their sum is ceil(samples / hop)."""
        # Rounded up and never zero: every sample is heard, and every clip has a token.
        frames = max(math.ceil(num_samples / self.hop_length), 1)
        full, rest = divmod(frames, self.window_frames)
        return [self.window_frames] * full + [rest] * bool(rest)

    def load(self, clip: object, place: MediaPlace, sampling_rate: int | None = None) -> np.ndarray:
        """One checked mono clip (samples,) in float32 at the model's rate.

        Args:
            clip: array (samples,), (channels, samples) or (samples, channels), a list of floats, path, bytes, a dict
                with 'array' and 'sampling_rate', a dict with 'bytes' or 'path', or torchcodec's `AudioDecoder`.
                Channels are averaged.
            sampling_rate: Hz of an array that does not bring its own; unused for files.

        Raises:
            MediaError: over a limit, empty, silent, NaN, broken, no sampling rate, or an unknown type.
        """
        clip = unpack_file_dict(clip, place)
        if isinstance(clip, (str, bytes, bytearray, Path)):
            samples, rate = decode_sound(clip, self.limits, self.max_audio_seconds, place)
        else:
            if hasattr(clip, "get_all_samples"):
                clip = self._decoded(clip, place)
            if isinstance(clip, dict):
                # The clip's own rate wins over the argument.
                sampling_rate, clip = clip.get("sampling_rate", sampling_rate), clip["array"]
            if sampling_rate is None:
                raise place.error(
                    "an array needs its sampling rate: pass sampling_rate=..., or {'array': ..., 'sampling_rate': ...}"
                )
            rate = check_rate(sampling_rate, self.limits, place)
            # Channels are averaged before the checks: two opposite channels can cancel to silence.
            samples = self._array_to_samples(clip, rate, place).mean(axis=1, dtype=np.float32)
        peak = float(np.abs(samples).max())
        if not math.isfinite(peak):
            raise place.error("the clip holds NaN or infinite samples")
        if peak > MAX_FLOAT_PEAK:
            raise place.error(f"float samples reach {peak:g}, expected -1..1; integers stored as floats must be scaled")
        if peak < SILENCE_PEAK and not self.allow_silence:
            raise place.error("the clip is silent; allow_silence=True accepts it")
        # After the checks, so that NaN is reported as such and is not spread by the filter.
        samples = self._resample(samples, rate, place)
        if self.on_long_audio == "error" and len(samples) > self.max_seconds * self.sampling_rate:
            raise place.error(
                f"{len(samples) / self.sampling_rate:.2f} seconds, one window has {self.max_seconds:g}; "
                "on_long_audio='split' accepts it as several windows"
            )
        return samples

    def _decoded(self, decoder: Any, place: MediaPlace) -> dict[str, Any]:
        """The samples of torchcodec's `AudioDecoder`, which `datasets` 4 and later gives for a column of sound."""
        header = decoder.metadata
        rate, seconds = check_rate(header.sample_rate, self.limits, place), header.duration_seconds_from_header
        # A header may not say how long the clip is; what was decoded is counted in any case.
        samples = 1 if seconds is None else math.ceil(seconds * rate)
        check_clip_size(samples, header.num_channels, rate, self.limits, self.max_audio_seconds, place)
        decoded = decoder.get_all_samples()
        return {"array": decoded.data, "sampling_rate": decoded.sample_rate}

    def _array_to_samples(self, clip: Any, rate: int, place: MediaPlace) -> np.ndarray:
        """(samples, channels) in float32; the shorter axis of a 2-D array counts as channels."""
        try:
            if isinstance(clip, torch.Tensor):
                # numpy has no bfloat16.
                clip = clip.detach().cpu()
                clip = clip.float() if clip.is_floating_point() else clip
            array = np.asarray(clip)
        except ValueError as cause:
            raise place.error(f"not an array of samples ({cause})") from cause
        if array.ndim not in (1, 2):
            raise place.error(f"a clip has 1 or 2 axes, found the shape {array.shape}")
        if array.ndim == 1:
            array = array[:, None]
        # A clip has fewer channels than samples.
        elif array.shape[0] < array.shape[1]:
            array = array.T
        # Before the conversion to float32, which copies the array.
        check_clip_size(array.shape[0], array.shape[1], rate, self.limits, self.max_audio_seconds, place)
        if array.dtype.kind != "f" and array.dtype.name not in INTEGERS:
            raise place.error(f"samples of type {array.dtype} have no known scale; use floats in -1..1 or int16")
        return float_samples(array)

    def _resample(self, samples: np.ndarray, rate: int, place: MediaPlace) -> np.ndarray:
        if rate == self.sampling_rate:
            return samples
        if self.strict_sampling_rate:
            raise place.error(f"sampling rate {rate}, the model hears {self.sampling_rate} Hz (strict_sampling_rate)")
        logger.warning_once(f"resampling sound from {rate} Hz to the model's {self.sampling_rate} Hz")
        try:
            import soxr
        except ImportError as cause:
            raise ImportError(f"resampling {rate} Hz to {self.sampling_rate} Hz needs `pip install soxr`") from cause

        # The number of tokens is computed from the length, so it must not depend on how the resampler rounds.
        length = math.ceil(len(samples) * self.sampling_rate / rate)
        resampled = soxr.resample(samples, rate, self.sampling_rate)[:length]
        return np.pad(resampled, (0, length - len(resampled))).astype(np.float32)

    def fetch_audio(self, audio_url_or_urls: object, sampling_rate: int | None = None) -> object:
        """Decode paths and bytes in a (nested) list into dicts with 'array' and 'sampling_rate'; called by pipelines.

        Arrays and dicts pass unchanged. Nothing is fetched from the network.
        """
        if isinstance(audio_url_or_urls, (str, bytes, Path)):
            return {"array": self.load(audio_url_or_urls, MediaPlace("audio", 0)), "sampling_rate": self.sampling_rate}
        if isinstance(audio_url_or_urls, (list, tuple)) and not is_media_item(audio_url_or_urls):
            return [self.fetch_audio(clip) for clip in audio_url_or_urls]
        return audio_url_or_urls

    def __call__(
        self, raw_speech: Any, sampling_rate: int | None = None, return_tensors: str | None = None, **kwargs: Any
    ) -> BatchFeature:
        """Features of one clip or a flat list of clips.

        Args:
            raw_speech: clips as `load` takes them.
            sampling_rate: Hz of the arrays among them that bring none.
            return_tensors: "pt", "np" or None (numpy arrays).
            kwargs: text settings that processors forward to all their parts; they do not concern sound.

        Returns:
            `input_features` (N, F, M) float32, zero after the end of a window, and `input_features_mask` (N, F) bool,
            True on real frames; the windows of all clips, flat in order.
        """
        is_list = isinstance(raw_speech, (list, tuple)) and not is_media_item(raw_speech)
        clips = list(raw_speech) if is_list else [raw_speech]
        loaded = [self.load(clip, MediaPlace("audio", index), sampling_rate) for index, clip in enumerate(clips)]
        return self.featurize(loaded, return_tensors)

    def featurize(self, clips: list[np.ndarray], return_tensors: str | None = None) -> BatchFeature:
        """`__call__` on clips that `load` returned."""
        windows_FM = [window for clip in clips for window in self.windows(clip)]
        frames_N = [frames for clip in clips for frames in self.frames_per_window(len(clip))]
        longest = max(len(window) for window in windows_FM)
        features_NFM = np.full((len(windows_FM), longest, self.feature_size), self.padding_value, dtype=np.float32)
        mask_NF = np.zeros((len(windows_FM), longest), dtype=bool)
        for row, (window_FM, frames) in enumerate(zip(windows_FM, frames_N, strict=True)):
            features_NFM[row, : len(window_FM)] = window_FM.numpy()
            mask_NF[row, :frames] = True
        return BatchFeature({"input_features": features_NFM, "input_features_mask": mask_NF}, return_tensors)

    def windows(self, samples: np.ndarray) -> list[torch.Tensor]:
        """The windows (F, M) of one mono clip."""
        if self.feature_type == "log_mel":
            return list(self.log_mel(samples).split(self.window_frames))
        if self.feature_type == "waveform":
            # Normalised before it is split: all windows of a clip have one mean and one variance.
            return list(torch.from_numpy(self._normalized(samples))[:, None].split(self.window_frames))
        size = self.window_frames * self.hop_length
        return [self._whisper_window(samples[start : start + size], size) for start in range(0, len(samples), size)]

    def _normalized(self, samples: np.ndarray) -> np.ndarray:
        """As `Wav2Vec2FeatureExtractor` normalises a clip, or the clip as it is."""
        samples = np.ascontiguousarray(samples)
        return (samples - samples.mean()) / np.sqrt(samples.var() + 1e-7) if self.do_normalize else samples

    def _whisper_window(self, samples: np.ndarray, size: int) -> torch.Tensor:
        """Frames of a window of `size` samples, (size / hop_length, M), silent after the clip."""
        extractor = whisper_extractor(self.sampling_rate, self.n_fft, self.hop_length, self.feature_size)
        batch = extractor(samples, max_length=size, sampling_rate=self.sampling_rate)
        return torch.from_numpy(batch["input_features"][0].T)

    def log_mel(self, samples: np.ndarray) -> torch.Tensor:
        """Normalised log-mel features (F, M) of one mono clip, F = ceil(samples / hop_length)."""
        transform = mel_spectrogram(self.sampling_rate, self.n_fft, self.hop_length, self.feature_size)
        frames = sum(self.frames_per_window(len(samples)))
        # A centred spectrogram has one frame more than hops.
        power_FM = transform(torch.from_numpy(np.ascontiguousarray(samples))).T[:frames]
        # Whisper's constants: floor 1e-10, then about -1 to 1.
        log_FM = power_FM.clamp(min=1e-10).log10()
        return (torch.maximum(log_FM, log_FM.max() - self.dynamic_range) + 4.0) / 4.0


@lru_cache(maxsize=8)
def whisper_extractor(sampling_rate: int, n_fft: int, hop_length: int, num_mel_bins: int) -> WhisperFeatureExtractor:
    """transformers' feature extractor of Whisper, built once per setting and process."""
    return WhisperFeatureExtractor(num_mel_bins, sampling_rate, hop_length, n_fft=n_fft)


@lru_cache(maxsize=8)
def mel_spectrogram(sampling_rate: int, n_fft: int, hop_length: int, num_mel_bins: int) -> torch.nn.Module:
    """torchaudio's mel spectrogram, centred frames, zeros beyond the ends; built once per setting and process.

    Raises:
        ImportError: torchaudio is missing or does not fit the installed torch.
    """
    try:
        from torchaudio.transforms import MelSpectrogram
    except (ImportError, OSError) as cause:
        raise ImportError(f"sound needs a torchaudio that fits torch {torch.__version__}: {cause}") from cause
    # The filter bank stays here even if the caller builds a model under `torch.device("meta")` or on a GPU.
    with torch.device("cpu"):
        return MelSpectrogram(
            sampling_rate, n_fft, hop_length=hop_length, n_mels=num_mel_bins, pad_mode="constant", norm="slaney",
            mel_scale="slaney",
        )  # fmt: skip
