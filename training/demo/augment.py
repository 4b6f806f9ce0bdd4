"""Augmentation of waveforms and small pictures: every function is pure in (input, numpy random generator).

Unusual here:
- waveforms are float32 (samples,) at 16 kHz and stay numpy: one clip costs about a millisecond and needs no model;
- speed (which moves pitch and formants together with duration, as vocal tract length does) and tempo (duration
  alone, phase vocoder) are drawn independently, so their quotient covers voices outside the training set;
- band, channel and room are one multiplication in the frequency domain;
- `augmented_clips` does the work once, before training, so that a training step only reads arrays.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from chorus_moe.training.demo.speech import SAMPLING_RATE, SpeechClips


def change_speed(waveform: np.ndarray, factor: float) -> np.ndarray:
    """Play `factor` times as fast: duration, pitch and formants change together (linear interpolation)."""
    length = max(1, round(len(waveform) / factor))
    return np.interp(np.arange(length) * factor, np.arange(len(waveform)), waveform).astype(np.float32)


def change_tempo(waveform: np.ndarray, factor: float, n_fft: int = 512) -> np.ndarray:
    """Say it `factor` times as fast at the same pitch and formants (phase vocoder, torchaudio's)."""
    import torch
    from torchaudio.functional import phase_vocoder

    hop = n_fft // 4
    # Shorter than one window: nothing to stretch.
    if len(waveform) < n_fft:
        return waveform
    window = torch.hann_window(n_fft)
    spectrum = torch.stft(torch.from_numpy(waveform), n_fft, hop, window=window, return_complex=True)
    advance = torch.linspace(0, torch.pi * hop, n_fft // 2 + 1)[:, None]
    stretched = phase_vocoder(spectrum, factor, advance)
    return torch.istft(stretched, n_fft, hop, window=window, length=round(len(waveform) / factor)).numpy()


def band_gain(frequencies: np.ndarray, low: float, high: float, slope: float = 100.0) -> np.ndarray:
    """Gain per frequency (Hz) of a band from `low` to `high` with soft edges `slope` Hz wide."""
    rise = 1.0 / (1.0 + np.exp(-(frequencies - low) / (slope / 4))) if low > 0 else 1.0
    fall = 1.0 / (1.0 + np.exp((frequencies - high) / (slope / 4)))
    return np.asarray(rise * fall)


def channel_gain(frequencies: np.ndarray, rng: np.random.Generator, decibels: float, points: int = 7) -> np.ndarray:
    """A smooth random frequency response: linear between `points` normal draws of `decibels` on a log-like axis."""
    axis = np.log1p(frequencies / 500)
    knots = np.linspace(0, axis[-1], points)
    return 10 ** (np.interp(axis, knots, rng.normal(0, decibels, points)) / 20)


def room_response(rng: np.random.Generator, seconds: float, level: float) -> np.ndarray:
    """A direct path and an exponentially decaying noise tail that falls by 60 dB in `seconds`."""
    length = max(2, round(seconds * SAMPLING_RATE))
    # exp(-6.9) is a thousandth in amplitude: 60 dB, the definition of a room's decay time.
    tail = rng.standard_normal(length) * np.exp(-6.9 * np.arange(length) / length)
    tail *= level / max(float(np.sqrt((tail**2).sum())), 1e-9)
    # The direct path.
    tail[0] = 1.0
    return tail


def coloured_noise(rng: np.random.Generator, length: int, exponent: float) -> np.ndarray:
    """Noise of unit power whose power falls with frequency to the `exponent` (0 white, 1 pink, 2 brown)."""
    size = 1 << max(length - 1, 1).bit_length()  # a power of two: ten times as fast as an awkward length
    spectrum = np.fft.rfft(rng.standard_normal(size))
    spectrum *= np.maximum(np.arange(len(spectrum)), 1.0) ** (-exponent / 2)
    noise = np.fft.irfft(spectrum, n=size)[:length]
    return noise / max(float(np.sqrt((noise**2).mean())), 1e-9)


@dataclass(frozen=True)
class SpeechAugment:
    """Random changes of a clip; ranges are (low, high), probabilities 0..1.

    Attributes:
        speed: factor of `change_speed`, drawn log-uniformly.
        tempo: factor of `change_tempo`, drawn log-uniformly; used with `tempo_probability` (it costs 2 ms).
        crop: seconds cut off at either end, as in carelessly cut recordings; at most a tenth of the clip.
        padding: seconds of quiet put before and after, each.
        telephone: probability of the band of an 8 kHz recording, whose upper edge in Hz is drawn from `telephone_edge`.
        channel: standard deviation in dB of the random frequency response.
        room: probability of a room; its decay is 0.05 to 0.3 s.
        noise: signal-to-noise ratio in dB of coloured noise, added with `noise_probability`.
        gain: peak of the result; narrow, because the clips are levelled when they are read.
    """

    speed: tuple[float, float] = (0.85, 1.18)
    tempo: tuple[float, float] = (0.8, 1.25)
    tempo_probability: float = 0.5
    crop: tuple[float, float] = (0.0, 0.04)
    padding: tuple[float, float] = (0.0, 0.2)
    telephone: float = 0.5
    telephone_edge: tuple[float, float] = (3500.0, 4000.0)
    channel: float = 5.0
    room: float = 0.3
    noise: tuple[float, float] = (5.0, 45.0)
    noise_probability: float = 0.8
    gain: tuple[float, float] = (0.6, 0.95)

    def __call__(self, waveform: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """An augmented copy, float32 (samples,); the same generator state gives the same result."""
        waveform = change_speed(waveform, _log_uniform(rng, self.speed))
        if rng.random() < self.tempo_probability:
            waveform = change_tempo(waveform, _log_uniform(rng, self.tempo))
        first, last = (min(round(rng.uniform(*self.crop) * SAMPLING_RATE), len(waveform) // 10) for _ in range(2))
        before, after = (round(rng.uniform(*self.padding) * SAMPLING_RATE) for _ in range(2))
        waveform = np.pad(waveform[first : len(waveform) - last], (before, after))
        noisy = rng.random() < self.noise_probability
        if noisy:
            power = float((waveform**2).mean()) * 10 ** (-rng.uniform(*self.noise) / 10)
            waveform = waveform + np.sqrt(power) * coloured_noise(rng, len(waveform), rng.uniform(0, 2))
        # Noise comes before the filter: it was in the room with the voice.
        waveform = self._filter(waveform, rng)
        return (waveform * (rng.uniform(*self.gain) / max(float(np.abs(waveform).max()), 1e-6))).astype(np.float32)

    def _filter(self, waveform: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        # Longer than the clip, so that the tail of the room does not wrap around to its start.
        size = 1 << (len(waveform) + SAMPLING_RATE // 8).bit_length()
        frequencies = np.fft.rfftfreq(size, 1 / SAMPLING_RATE)
        response = channel_gain(frequencies, rng, self.channel).astype(complex)
        if rng.random() < self.telephone:
            response *= band_gain(frequencies, rng.uniform(0, 200), rng.uniform(*self.telephone_edge))
        if rng.random() < self.room:
            response *= np.fft.rfft(room_response(rng, rng.uniform(0.05, 0.3), rng.uniform(0.2, 0.8)), n=size)
        return np.fft.irfft(np.fft.rfft(waveform, n=size) * response, n=size)[: len(waveform)]


@dataclass(frozen=True)
class PictureAugment:
    """Random small rotation (degrees), slant, shift (fraction of the width), zoom and contrast of a grey picture."""

    degrees: float = 15.0
    slant: float = 0.25
    shift: float = 0.1
    zoom: tuple[float, float] = (0.8, 1.15)
    contrast: tuple[float, float] = (0.8, 1.2)

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """An augmented copy of the same size and mode; what moves in from outside is black."""
        width, height = image.size
        angle, zoom = np.deg2rad(rng.uniform(-self.degrees, self.degrees)), rng.uniform(*self.zoom)
        right, down = (rng.uniform(-self.shift, self.shift) * size for size in (width, height))
        cos, sin = np.cos(angle) / zoom, np.sin(angle) / zoom
        x, y = (width - 1) / 2, (height - 1) / 2
        lean = sin + rng.uniform(-self.slant, self.slant)
        # PIL maps output to input coordinates: rotate and slant about the centre, then shift.
        matrix = (
            cos,
            lean,
            x - cos * (x + right) - lean * (y + down),
            -sin,
            cos,
            y + sin * (x + right) - cos * (y + down),
        )
        moved = image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
        contrast = rng.uniform(*self.contrast)
        return moved.point(lambda value: min(255, round(value * contrast)))


@dataclass(frozen=True)
class _AugmentedClips:
    """Map-style dataset: item i is copy i // clips of clip i % clips, its randomness a function of (seed, i)."""

    clips: SpeechClips
    augment: SpeechAugment
    copies: int
    seed: int

    def __len__(self) -> int:
        return len(self.clips) * self.copies

    def __getitem__(self, index: int) -> np.ndarray:
        waveform = self.clips.waveforms[index % len(self.clips)]
        return self.augment(waveform, np.random.default_rng((self.seed, index)))


def augmented_clips(
    clips: SpeechClips, augment: SpeechAugment, copies: int, cache: Path, *, seed: int = 0, workers: int = 2
) -> SpeechClips:
    """`copies` augmented versions of every clip (about 3 ms each), from `cache` if they were made before.

    The result does not depend on `workers`, the number of processes; its order is all clips, then all again.
    """
    from torch.utils.data import DataLoader
    from tqdm.auto import tqdm

    # Settings and samples decide the cache, so a changed setting never reads old clips.
    digest = hashlib.sha256(f"{augment} {copies} {seed} {len(clips)}".encode())
    for waveform in clips.waveforms:
        digest.update(waveform.tobytes())
    path = Path(cache) / f"augmented-{digest.hexdigest()[:16]}.npz"
    if not path.exists():
        dataset = _AugmentedClips(clips, augment, copies, seed)
        loader: DataLoader = DataLoader(dataset, 32, num_workers=workers, collate_fn=list)  # type: ignore[arg-type]
        batches = tqdm(loader, desc="augmenting speech", unit="batch")
        waveforms = [waveform for batch in batches for waveform in batch]
        SpeechClips(waveforms, np.tile(clips.digits, copies), clips.speakers * copies).save(path)
    return SpeechClips.load(path)


def _log_uniform(rng: np.random.Generator, bounds: tuple[float, float]) -> float:
    return float(np.exp(rng.uniform(np.log(bounds[0]), np.log(bounds[1]))))
