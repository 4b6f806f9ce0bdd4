"""Limits on untrusted images and sound, and decoding that applies them before any pixel or sample is decoded.

Unusual here:
- limits are never saved with a processor, so a downloaded repository cannot lift them;
- nothing is fetched: http(s) addresses are refused, local files, bytes, `data:` addresses and decoded media accepted;
- sound is decoded by PyAV to the end of the file, images by Pillow, both with short lists of formats; playlists and
  other formats that name further files are on neither.
"""

import base64
import binascii
import difflib
import io
import math
import os
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias
from urllib.parse import unquote

import numpy as np
import torch
from transformers.image_utils import SizeDict
from transformers.utils import logging

if TYPE_CHECKING:
    from PIL import Image

logger = logging.get_logger(__name__)

# A forked process has none of its parent's threads, and torch would wait for them for ever: `map(num_proc=2)` of a data
# set, with a processor that has worked before. torch's own DataLoader does the same in its workers.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))

Picture: TypeAlias = "np.ndarray | torch.Tensor | Image.Image"

# Pillow opens MPO (what many phones write) as JPEG.
IMAGE_FORMATS = ("PNG", "JPEG", "JPEG2000", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM")
# What settings of a processor may be; they come with a downloaded model. Seconds, Hz, samples, pixels or tokens.
BOUNDS: dict[str, tuple[float, float]] = {
    "size": (1, 4_096), "crop_size": (1, 4_096), "num_image_tokens": (1, 65_536), "frames_per_token": (1, 65_536),
    "audio_convolutions": (1, 65_536), "feature_size": (1, 1_024), "sampling_rate": (1_000, 768_000),
    "n_fft": (1, 65_536), "hop_length": (1, 65_536), "max_seconds": (0, 600), "max_audio_seconds": (0, 86_400),
    "dynamic_range": (0.1, 40),
}  # fmt: skip
# Encoders write about ten. Each scan costs a pass over all pixels, and takes only a few bytes.
MAX_JPEG_SCANS = 64
# ffmpeg's names. "mov" is also MP4 and M4A, "matroska" also WebM.
SOUND_FORMATS = ("wav", "w64", "aiff", "au", "caf", "flac", "ogg", "mp3", "aac", "mov", "matroska")
PCM = ("u8", "s8", "s16le", "s16be", "s24le", "s24be", "s32le", "s32be", "f32le", "f32be", "f64le", "f64be")
SOUND_CODECS = (
    *(f"pcm_{kind}" for kind in (*PCM, "mulaw", "alaw")), "adpcm_ms", "adpcm_ima_wav", "flac", "alac", "vorbis",
    "opus", "libopus", "mp2float", "mp3float", "aac", "ac3", "eac3",
)  # fmt: skip
# Their header counts nothing (in MP3 LAME's does): what ffmpeg calls their duration is guessed from the first packets.
UNCOUNTED_FORMATS = ("mp3", "aac")
# Cut here at the length in the header: ffmpeg's own cut at the end of a short last block takes sound as well.
CUT_CODECS = ("vorbis", "alac")
MAX_BLOCK_SAMPLES = 8_192
# ffmpeg's AV_CODEC_FLAG2_SKIP_MANUAL.
SKIP_MANUAL = 1 << 29
# These put a little silence before and after the sound, which decoders take away again.
PADDED_CODECS = ("mp2float", "mp3float", "aac", "opus", "libopus", "ac3", "eac3")
PADDING_SECONDS = 0.5
# A packet that claims more is miscounted: ffmpeg lets the length of a last packet fall below zero and wraps it.
MIN_PACKET_SECONDS, MAX_PACKET_SECONDS = 0.002, 1_000
UNKNOWN_RIFF_BYTES = 2**32 - 2**16
MAX_BROKEN_PACKETS = 1_000
# Files that hold their sound in one chunk, by how they begin or what stands at byte 8 -> byte order, bytes of a chunk's
# name and of its length, the first chunk, and what chunks are aligned to. Lengths of W64 ("riff") count all of a chunk.
CHUNKS: dict[bytes, tuple[Any, int, int, int, int]] = {
    b"WAV": ("little", 4, 4, 12, 2), b"AIF": ("big", 4, 4, 12, 2), b"riff": ("little", 16, 8, 40, 8),
    b"caff": ("big", 4, 8, 8, 1),
}  # fmt: skip
# Behind the sound of WAV and AIFF files, and how far from the end it is looked for.
TAIL_CHUNKS = re.compile(rb"(?s)(?=([_A-Z]{4}|[iI][dD]3 |bext|iXML|axml|cue |smpl|acid|fact|\(c\) )(\0|...\0))")
MAX_TAIL_BYTES = 2**23


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
    """Upper bounds applied before decoding. Sizes in bytes, rates in Hz; the ratio is long side over short side."""

    image_bytes: int = 64 * 2**20
    image_pixels: int = 64_000_000
    image_aspect_ratio: float = 100.0
    images_per_sample: int = 64
    sample_pixels: int = 256_000_000
    audio_bytes: int = 256 * 2**20
    audio_min_rate: int = 1_000
    audio_max_rate: int = 768_000
    audio_channels: int = 8
    clips_per_sample: int = 64
    sample_seconds: float = 3_600.0


def check_settings(settings: Mapping[str, Any], known: Iterable[str]) -> None:
    """Refuse numbers that are not finite or out of `BOUNDS`, and names that are a `known` one misspelt.

    Raises:
        ValueError: names the setting and what it may be.
    """
    for name, value in settings.items():
        if name not in known and (meant := difflib.get_close_matches(name, known, cutoff=0.89)):
            raise ValueError(f"unknown setting {name}={value!r}; {meant[0]} is meant")
        low, high = BOUNDS.get(name, (-math.inf, math.inf))
        numbers = list(dict(value).values()) if isinstance(value, Mapping | SizeDict) else np.ravel(value).tolist()
        for number in numbers:
            is_number = isinstance(number, int | float) and not isinstance(number, bool)
            if number is not None and (
                (is_number and not (math.isfinite(number) and low <= number <= high))
                or (name in BOUNDS and not is_number)
            ):
                raise ValueError(f"{name}={value!r}: expected finite numbers from {low:g} to {high:g}")


@dataclass(frozen=True)
class MediaPlace:
    """Where a mistake is, as far as that is known: begins every error."""

    modality: str | None = None
    index: int | None = None
    sample: int | None = None
    message: int | None = None

    def error(self, text: str) -> MediaError:
        numbers = {"sample": self.sample, "message": self.message, self.modality: self.index}
        where = ", ".join(f"{name} {number}" for name, number in numbers.items() if number is not None)
        return MediaError(f"{where}: {text}" if where else text, self.sample, self.modality)


IMAGE, TEXT = MediaPlace("image"), MediaPlace("text")


def open_source(item: str | bytes | bytearray | Path, max_bytes: int, place: MediaPlace) -> io.BytesIO | str:
    """A local path or an in-memory file whose size was checked.

    Raises:
        MediaError: web address, missing file, something that is no plain file, or more than `max_bytes`.
    """
    if isinstance(item, str) and item.startswith(("http://", "https://")):
        raise place.error(f"web addresses are never fetched, download the file first: {item[:80]!r}")
    if isinstance(item, str) and item.startswith("data:"):
        # Checked before it is decoded. Base64 takes 4 characters for 3 bytes, and 256 leave room for the header.
        if len(item) > max_bytes * 4 // 3 + 256:
            raise place.error(f"{len(item)} characters of base64, the limit is {max_bytes} bytes")
        try:
            item = base64.b64decode("".join(item.partition(",")[2].split()), validate=True)
        except binascii.Error as cause:
            raise place.error("the data: address holds no valid base64") from cause
    source: io.BytesIO | str
    if isinstance(item, (bytes, bytearray)):
        size, source = len(item), io.BytesIO(item)
    else:
        path = os.fspath(item)
        # An address writes a blank as %20.
        path = unquote(path[7:]) if path.startswith("file://") else path
        # Refuses folders, devices and pipes, which could be read without end.
        if not os.path.isfile(path):
            raise place.error(f"no such file: {path[:200]!r}")
        size, source = os.path.getsize(path), path
    if size == 0:
        raise place.error("the file is empty")
    if size > max_bytes:
        raise place.error(f"{size} bytes, the limit is {max_bytes}")
    return source


def unpack_file_dict(item: object, place: MediaPlace) -> object:
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
        raise place.error(f"{width} x {height}: aspect ratio {ratio:.0f}, the limit is {limits.image_aspect_ratio:g}")


def is_channels_first(shape: tuple[int, ...], layout: str | None = None) -> bool:
    """Whether an array with three axes is (C, H, W): by `layout` ("channels_first" or "channels_last"), else by which
    end has 1, 3 or 4 entries.

    Raises:
        MediaError: neither end has, or both have.
    """
    first, last = (size in (1, 3, 4) for size in (shape[0], shape[-1]))
    if layout is not None:
        is_first = getattr(layout, "value", layout) == "channels_first"
        first, last = first and is_first, last and not is_first
    if first and last:
        raise IMAGE.error(f"the shape {shape} can be channels first or last; pass input_data_format")
    if not first and not last:
        raise IMAGE.error(f"an image has 1, 3 or 4 channels, found the shape {shape}")
    return first


def num_pixels(image: Picture) -> int:
    """Of what `load_image` returned."""
    if not isinstance(image, (np.ndarray, torch.Tensor)):
        return image.width * image.height
    return math.prod(image.shape) // (1 if image.ndim == 2 else min(image.shape[0], image.shape[-1]))


def load_image(item: object, limits: MediaLimits, place: MediaPlace, layout: str | None = None) -> Picture:
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
        try:
            height, width = shape[1:] if len(shape) == 3 and is_channels_first(shape, layout) else shape[:2]
        except MediaError as cause:
            raise place.error(str(cause)) from cause
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
        if image.format in ("JPEG", "MPO"):
            content = source.getvalue() if isinstance(source, io.BytesIO) else Path(source).read_bytes()
            # The mark of a scan; inside one, FF is always followed by another byte.
            if (scans := content.count(b"\xff\xda")) > MAX_JPEG_SCANS:
                raise place.error(f"{scans} scans in a JPEG, the limit is {MAX_JPEG_SCANS}")
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


def check_rate(rate: object, limits: MediaLimits, place: MediaPlace) -> int:
    """The sampling rate in Hz as an int, inside the allowed range."""
    # `True` is an int for Python.
    if isinstance(rate, bool) or not isinstance(rate, (int, float, np.number)) or float(rate) % 1 != 0:
        raise place.error(f"the sampling rate must be a whole number of Hz, found {rate!r}")
    if not limits.audio_min_rate <= rate <= limits.audio_max_rate:
        raise place.error(f"sampling rate {int(rate)} is outside {limits.audio_min_rate}..{limits.audio_max_rate} Hz")
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


def float_samples(samples: np.ndarray) -> np.ndarray:
    """Samples of any type as float32; integers in -1..1, unsigned ones (8-bit sound) around their middle."""
    if samples.dtype.kind == "f":
        return samples.astype(np.float32)
    scale = 2.0 ** (8 * samples.itemsize - 1)
    return samples.astype(np.float32) / np.float32(scale) - (samples.dtype.kind == "u")


def decode_sound(
    item: str | bytes | bytearray | Path, limits: MediaLimits, max_seconds: float, place: MediaPlace
) -> tuple[np.ndarray, int]:
    """Mono samples (samples,) in float32, the mean of the channels, and the rate of a sound or video file.

    Reads to the end whatever the header claims, and no further than `max_seconds`. Of several sound tracks it takes
    ffmpeg's best. Less sound than the packets or the header speak of is reported in a warning.

    Raises:
        MediaError: over a limit, not one of `SOUND_FORMATS`, broken, or without sound.
    """
    try:
        import av
    except (ImportError, OSError) as cause:
        raise ImportError("sound files need `pip install av`; arrays work without it") from cause

    source = open_source(item, limits.audio_bytes, place)
    # No path is given to ffmpeg, which would read parts of it as protocols.
    options = {"format_whitelist": ",".join(SOUND_FORMATS), "codec_whitelist": ",".join(SOUND_CODECS)}
    options["protocol_whitelist"] = "none"
    with open(source, "rb") if isinstance(source, str) else source as file:
        readable, fault = _mended(file)
        try:
            with av.open(readable, options=options, metadata_errors="ignore") as container:
                samples, rate = _decode_best_track(container, limits, max_seconds, place)
        except av.FFmpegError as cause:
            raise place.error(f"no readable sound of the formats {', '.join(SOUND_FORMATS)} ({cause})") from cause
    if fault:
        logger.warning(str(place.error(fault)))
    return samples, rate


def _mended(file: Any) -> tuple[Any, str]:
    """A file, its header rewritten where ffmpeg would leave out sound, or take chunks behind it for sound; and what the
    header counts wrong, of which ffmpeg says nothing."""
    content = file.read()
    file.seek(0)
    size, long = len(content), None
    kind = next((kind for kind in CHUNKS if kind in (content[:4], content[8:11])), b"")
    order, named, counted, start, step = CHUNKS.get(kind, ("little", 0, 0, size, 1))
    own = named + counted if kind == b"riff" else 0
    claimed = int.from_bytes(content[4:8], order) + 8 if counted == 4 else 0
    while (body := start + named + counted) < size:
        name, place = content[start : start + 4], slice(body - counted, body)
        length = max(int.from_bytes(content[place], order) - own, 0)
        start = body + length + -length % step
        if name == b"ds64":
            # RF64: here stand the numbers that need 64 bits.
            long = slice(body + 8, body + 16)
        if name not in (b"data", b"SSND"):
            continue
        if long is not None:
            place, length = long, int.from_bytes(content[long], order) or length
        rest, is_empty = content[body + length :], length <= (8 if name == b"SSND" else 0)
        # A name of four letters and its length, at an even byte.
        chunk = re.match(rb"\0?[ -~]{4}.{%d}(.{%d})" % (named - 4, counted), rest, re.DOTALL)
        is_chunk = chunk and int.from_bytes(chunk[1], order) <= len(rest)
        is_short = not is_empty and len(rest) >= 8 and any(rest) and not is_chunk
        is_open = is_short or is_empty or not rest
        last = _end_of_sound(content, body, order) if is_open and counted == 4 else size
        if is_open and not body + length == last == size:
            mended = bytearray(content[:last])
            mended[place] = (last - body + own).to_bytes(place.stop - place.start, order)
            mended[4:8] = (last - 8).to_bytes(4, order) if counted == 4 else content[4:8]
            file = io.BytesIO(mended)
        if last < size:
            return file, f"the header counts chunks behind the sound as sound; these {size - last} bytes are left out"
        if is_short:
            return file, "the header counts less sound than the file holds; all of it is read"
        claimed = claimed or max(body + length, size)
        break
    # The largest numbers stand for a stream of unknown length.
    if 8 < claimed < UNKNOWN_RIFF_BYTES and not 0 <= size - claimed < 2:
        why = "the file is cut" if size < claimed else "of joined files the first is read"
        return file, f"{why}: {min(size, claimed)} of {max(size, claimed)} bytes"
    return file, ""


def _end_of_sound(content: bytes, start: int, order: Any) -> int:
    """Where chunks of known names begin that fill the file to its last byte."""
    seen: set[int] = set()
    for found in TAIL_CHUNKS.finditer(content, max(start, len(content) - MAX_TAIL_BYTES)):
        place = found.start()
        # Every place once, or a file of nothing but such names would take hours.
        while place + 8 <= len(content) and place not in seen and content[place : place + 4].isascii():
            seen.add(place)
            place += 8 + int.from_bytes(content[place + 4 : place + 8], order)
            place += place % 2
        if 0 <= place - len(content) < 2:
            return found.start()
    return len(content)


def _decode_best_track(
    container: Any, limits: MediaLimits, max_seconds: float, place: MediaPlace
) -> tuple[np.ndarray, int]:
    track = container.streams.best("audio")
    codec = track and track.codec_context
    if codec is None or codec.name not in SOUND_CODECS:
        raise place.error(f"no sound of the codecs {', '.join(SOUND_CODECS)}, found {codec and codec.name}")
    rate = check_rate(codec.sample_rate, limits, place)
    check_clip_size(1, codec.channels, rate, limits, max_seconds, place)
    header, is_counted = float((track.duration or 0) * track.time_base), container.format.name not in UNCOUNTED_FORMATS
    if codec.name in CUT_CODECS:
        codec.flags2 |= SKIP_MANUAL
    pieces: list[np.ndarray] = []
    heard, packets, broken, count, longest = 0, 0.0, 0, 0, 0.0
    for packet in container.demux(track):
        length = float((packet.duration or 0) * packet.time_base)
        # A wrong count in the header also shortens packets to nothing: those are as long as the others.
        is_short = codec.name in PADDED_CODECS and length < MIN_PACKET_SECONDS and packet.size
        if length < MAX_PACKET_SECONDS:
            longest = max(longest, length)
            packets += longest if is_short else length
        count += packet.size > 0
        is_counted |= packet.has_sidedata("skip_samples")
        try:
            frames = packet.decode()
        except ValueError as cause:
            # PyAV's error for invalid data.
            broken += 1
            if broken > MAX_BROKEN_PACKETS:
                raise place.error(f"more than {MAX_BROKEN_PACKETS} broken packets ({cause})") from cause
            continue
        for frame in frames:
            if not pieces:
                # Of some AAC, half the rate stands in the header.
                rate = check_rate(frame.sample_rate, limits, place)
            if frame.sample_rate != rate:
                raise place.error(f"the rate changes from {rate} to {frame.sample_rate} Hz in the middle of the file")
            samples = frame.to_ndarray()
            if not frame.format.is_planar:
                samples = samples.reshape(-1, frame.layout.nb_channels).T
            pieces.append(float_samples(samples).mean(axis=0))
            heard += frame.samples
        if heard > max_seconds * rate:
            check_clip_size(max(heard, int(header * rate)), codec.channels, rate, limits, max_seconds, place)
    if codec.name == "vorbis":
        # Half of an overlap: no sound yet.
        heard -= len(pieces.pop(0)) if pieces else 0
    if codec.name in CUT_CODECS and 0 < heard - round(header * rate) < MAX_BLOCK_SAMPLES:
        heard = round(header * rate)
    if broken and not heard:
        raise place.error(f"broken sound file: none of {broken} packets can be decoded")
    check_clip_size(heard, codec.channels, rate, limits, max_seconds, place)
    if container.format.name.startswith("mov") and not codec.name.startswith("pcm") and count:
        # An edit list may leave packets out.
        packets *= max(track.frames / count, 1)
    claimed = max(packets, header if is_counted else 0.0)
    is_joined = codec.name == "flac" and 0 < header < heard / rate - 0.05  # a header in between is taken for sound
    padding = PADDING_SECONDS if codec.name in PADDED_CODECS else 0.05
    if (codec.extradata or b"").startswith(b"OpusHead"):
        # Opus says how much of its start is no sound; at the end it is less than a packet.
        padding = int.from_bytes(codec.extradata[10:12], "little") / 48_000 + 2 * longest
    if broken or is_joined or claimed - heard / rate > padding:
        report = f"decoded {heard / rate:.2f} of {claimed:.2f} seconds, {broken} broken packets were skipped"
        logger.warning(str(place.error(report)))
    return np.concatenate(pieces)[:heard], rate
