"""Limits on untrusted images and sound, and decoding that applies them before any pixel or sample is decoded.

Unusual here:
- limits are never saved with a processor, so a downloaded repository cannot lift them;
- nothing is fetched: http(s) addresses are refused, local files, bytes, `data:` addresses and decoded media accepted;
- sound files are decoded by soundfile alone, images by Pillow with a short list of formats.

Pillow's threat model (Pillow#9562) asks to treat its decompression-bomb warning as an error; so does `load_image`.
"""

import base64
import binascii
import io
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

# Pillow opens MPO (what many phones write) as JPEG.
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")


class MediaError(ValueError):
    """An image or clip that cannot be used, or that does not fit the text.

    Attributes:
        sample: index of the offending sample in the batch, None when a part was called on its own.
        modality: "text", "image" or "audio".
    """

    def __init__(self, message: str, sample: int | None = None, modality: str | None = None):
        super().__init__(message)
        self.sample = sample
        self.modality = modality


@dataclass(frozen=True)
class MediaLimits:
    """Upper bounds applied before decoding. Sizes in bytes, rates in Hz, the ratio is long side over short side."""

    image_bytes: int = 64 * 2**20
    image_pixels: int = 64_000_000
    image_aspect_ratio: float = 100.0
    images_per_sample: int = 64
    audio_bytes: int = 256 * 2**20
    audio_min_rate: int = 1_000
    audio_max_rate: int = 768_000
    audio_channels: int = 8
    clips_per_sample: int = 64


@dataclass(frozen=True)
class MediaPlace:
    """Where an item came from: names it in every error."""

    modality: str
    index: int
    sample: int | None = None

    def error(self, text: str) -> MediaError:
        prefix = f"sample {self.sample}, " if self.sample is not None else ""
        return MediaError(f"{prefix}{self.modality} {self.index}: {text}", self.sample, self.modality)


def open_source(item: str | bytes | bytearray | Path, max_bytes: int, place: MediaPlace) -> io.BytesIO | str:
    """A local path or an in-memory file whose size was checked.

    Raises:
        MediaError: web address, missing file, something that is no plain file, or more than `max_bytes`.
    """
    if isinstance(item, str) and item.startswith(("http://", "https://")):
        raise place.error(f"web addresses are never fetched, download the file first: {item[:80]!r}")
    if isinstance(item, str) and item.startswith("data:"):
        # Base64 takes 4 characters for 3 bytes; 256 leave room for the address's own header. Checked before it is
        # decoded.
        if len(item) > max_bytes * 4 // 3 + 256:
            raise place.error(f"{len(item)} characters of base64, the limit is {max_bytes} bytes")
        try:
            item = base64.b64decode(item.partition(",")[2], validate=True)
        except binascii.Error as cause:
            raise place.error("the data: address holds no valid base64") from cause
    source: io.BytesIO | str
    if isinstance(item, (bytes, bytearray)):
        size, source = len(item), io.BytesIO(item)
    else:
        path = os.fspath(item)
        # Refuses folders, devices and pipes, which could be read without end.
        if not os.path.isfile(path):
            raise place.error(f"no such file: {path[:200]!r}")
        size, source = os.path.getsize(path), path
    if size == 0:
        raise place.error("the file is empty")
    if size > max_bytes:
        raise place.error(f"{size} bytes, the limit is {max_bytes}")
    return source


def unpack_file_dict(item: Any, place: MediaPlace) -> Any:
    """`{"bytes", "path"}` as `datasets` stores undecoded media; anything else comes back unchanged."""
    if not isinstance(item, dict) or "array" in item:
        return item
    # `datasets` stores both for an embedded file; its path may not exist on this machine.
    source = item.get("bytes") if item.get("bytes") is not None else item.get("path")
    if source is None:
        raise place.error(f"a dict needs 'bytes', 'path' or 'array', found the keys {sorted(map(str, item))}")
    return source


def check_image_size(width: int, height: int, limits: MediaLimits, place: MediaPlace) -> None:
    """Refuse empty, huge and very long images by their header alone."""
    if width < 1 or height < 1:
        raise place.error(f"empty image of {width} x {height} pixels")
    if width * height > limits.image_pixels:
        raise place.error(f"{width} x {height} = {width * height} pixels, the limit is {limits.image_pixels}")
    ratio = max(width, height) / min(width, height)
    if ratio > limits.image_aspect_ratio:
        raise place.error(
            f"{width} x {height} has an aspect ratio of {ratio:.0f}, the limit is {limits.image_aspect_ratio:g}"
        )


def load_image(item: Any, limits: MediaLimits, place: MediaPlace) -> Any:
    """A decoded image within the limits: a PIL image (upright by its EXIF tag), or the array or tensor that came in.

    Args:
        item: PIL image, array or tensor (H, W), (H, W, C) or (C, H, W), path, bytes, `data:` address, or a dict with
            'bytes' or 'path'.

    Raises:
        MediaError: over a limit, animated, truncated, not an image, or an unknown type.
    """
    from PIL import Image

    item = unpack_file_dict(item, place)
    if isinstance(item, (np.ndarray, torch.Tensor)):
        shape = tuple(item.shape)
        if len(shape) not in (2, 3):
            raise place.error(f"an image array has 2 or 3 axes, found the shape {shape}")
        # The same rule for channels as in `array_to_tensor`.
        height, width = shape[1:] if len(shape) == 3 and shape[0] in (1, 3, 4) else shape[:2]
        check_image_size(width, height, limits, place)
        return item
    if isinstance(item, Image.Image):
        return _finish_image(item, limits, place)
    if not isinstance(item, (str, bytes, bytearray, Path)):
        raise place.error(f"expected an image, an array, bytes or a path, found {type(item).__name__}")
    source = open_source(item, limits.image_bytes, place)
    try:
        with warnings.catch_warnings():
            # Pillow only warns up to twice its own limit.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(source, formats=IMAGE_FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as cause:
        raise place.error(f"too many pixels, the limit is {limits.image_pixels} ({cause})") from cause
    except Exception as cause:
        raise place.error(f"not a readable image of the formats {', '.join(IMAGE_FORMATS)} ({cause})") from cause
    with image:
        return _finish_image(image, limits, place)


def _finish_image(image: Any, limits: MediaLimits, place: MediaPlace) -> Any:
    from PIL import ImageOps

    width, height = image.size
    check_image_size(width, height, limits, place)
    # A phone's MPO holds a second picture beside the one that is meant.
    if getattr(image, "is_animated", False) and image.format != "MPO":
        raise place.error("animated or multi-page image; pass the frame you mean as a single image")
    try:
        # `open` reads the header only; a truncated file fails here.
        image.load()
        # Cameras store the sensor's orientation and a tag.
        return ImageOps.exif_transpose(image)
    except Exception as cause:
        raise place.error(f"broken or truncated image ({cause})") from cause


def check_rate(rate: Any, limits: MediaLimits, place: MediaPlace) -> int:
    """The sampling rate in Hz as an int, inside the allowed range."""
    # `True` is an int for Python.
    if isinstance(rate, bool) or not isinstance(rate, (int, float, np.number)) or int(rate) != rate:
        raise place.error(f"the sampling rate must be a whole number of Hz, found {rate!r}")
    if not limits.audio_min_rate <= rate <= limits.audio_max_rate:
        raise place.error(
            f"sampling rate {int(rate)} Hz is outside {limits.audio_min_rate}..{limits.audio_max_rate} Hz"
        )
    return int(rate)


def check_clip_size(
    samples: int, channels: int, rate: int, limits: MediaLimits, max_seconds: float, place: MediaPlace
) -> None:
    """Refuse empty clips, too many channels and clips over `max_seconds`, by their header alone."""
    if samples < 1:
        raise place.error("empty clip of 0 samples")
    if channels > limits.audio_channels:
        raise place.error(f"{channels} channels, the limit is {limits.audio_channels}")
    if samples > max_seconds * rate:
        raise place.error(f"{samples / rate:.2f} seconds, the limit max_audio_seconds is {max_seconds:g}")


def decode_sound(
    item: str | bytes | bytearray | Path, limits: MediaLimits, max_seconds: float, place: MediaPlace
) -> tuple[np.ndarray, int]:
    """Samples (samples, channels) in float32 and the rate of a sound file, decoded by soundfile.

    The header is checked before decoding and never more than `max_seconds` are decoded, whatever the header claims.

    Raises:
        MediaError: over a limit, truncated, or a format soundfile cannot read.
    """
    try:
        import soundfile
    except (ImportError, OSError) as cause:
        raise ImportError("sound files need `pip install soundfile`; arrays work without it") from cause

    source = open_source(item, limits.audio_bytes, place)
    try:
        sound = soundfile.SoundFile(source)
    except Exception as cause:
        raise place.error(f"soundfile cannot read it; convert it to WAV, FLAC, OGG or MP3 ({cause})") from cause
    with sound:
        rate = check_rate(sound.samplerate, limits, place)
        check_clip_size(sound.frames, sound.channels, rate, limits, max_seconds, place)
        try:
            # One frame more than allowed, so that the second check sees a clip that is longer than its header claims.
            samples = sound.read(frames=int(max_seconds * rate) + 1, dtype="float32", always_2d=True)
        except Exception as cause:
            raise place.error(f"broken sound file ({cause})") from cause
    # Once more on what was decoded: headers can lie.
    check_clip_size(len(samples), samples.shape[1], rate, limits, max_seconds, place)
    return samples, rate
