import base64
import io
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from chorus_moe.processors.processing_limits import MediaError, MediaLimits, MediaPlace, decode_sound, load_image
from tests.processors.conftest import picture, tone, wav_bytes

LIMITS = MediaLimits()
IMAGE, CLIP = MediaPlace("image", 1, sample=2), MediaPlace("audio", 0, sample=2)


def png_header(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims any size."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(64))) + chunk(b"IEND", b"")
    )


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("side", [9_000, 19_000])
def test_a_huge_picture_of_few_bytes_is_refused_by_its_header(side):
    start = time.perf_counter()
    with pytest.raises(MediaError, match=r"sample 2, image 1: .*the limit is 64000000"):
        load_image(png_header(side, side), LIMITS, IMAGE)
    assert time.perf_counter() - start < 1.0


def test_a_truncated_picture_names_its_sample():
    with pytest.raises(MediaError, match=r"sample 2, image 1: broken or truncated") as caught:
        load_image(encoded(picture(200, 200))[:2000], LIMITS, IMAGE)
    assert (caught.value.sample, caught.value.modality) == (2, "image")


def test_an_animation_is_refused():
    frames = [picture(seed=seed) for seed in range(3)]
    with pytest.raises(MediaError, match="animated"):
        load_image(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), LIMITS, IMAGE)


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        ("https://example.org/a.png", "never fetched"),
        ("no_such_file.png", "no such file"),
        (b"", "file is empty"),
        (b"not a picture", "not a readable image"),
        (np.zeros((2, 300)), "aspect ratio of 150"),
        (np.zeros((0, 5)), "empty image"),
        (np.zeros((1, 2, 3, 4, 5)), "2 or 3 axes"),
        ({"width": 3}, "a dict needs"),
        (3.5, "found float"),
        ("data:image/png;base64,@@", "no valid base64"),
    ],
)
def test_a_bad_image_gets_one_clear_reason(item, reason):
    with pytest.raises(MediaError, match=rf"sample 2, image 1: .*{reason}"):
        load_image(item, LIMITS, IMAGE)


def test_bytes_paths_dicts_and_data_addresses_give_the_same_picture(tmp_path):
    content = encoded(picture())
    path = tmp_path / "a.png"
    path.write_bytes(content)
    address = "data:image/png;base64," + base64.b64encode(content).decode()
    for item in (content, path, str(path), {"bytes": content, "path": None}, {"path": str(path)}, address):
        assert np.array_equal(load_image(item, LIMITS, IMAGE), picture())


def test_file_size_is_checked_before_decoding():
    with pytest.raises(MediaError, match="bytes, the limit is 10"):
        load_image(encoded(picture()), MediaLimits(image_bytes=10), IMAGE)


def test_a_phone_picture_is_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert load_image(encoded(picture(9, 6), "JPEG", exif=exif), LIMITS, IMAGE).size == (6, 9)


def test_a_wav_that_claims_four_gigabytes_is_read_no_further_than_it_goes():
    content = bytearray(wav_bytes(tone(0.1)))
    content[4:8] = content[40:44] = b"\xff\xff\xff\xff"
    start = time.perf_counter()
    samples, rate = decode_sound(bytes(content), LIMITS, 300.0, CLIP)
    assert time.perf_counter() - start < 1.0
    assert (len(samples), rate) == (1600, 16_000)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (wav_bytes(tone(0.2), 100), "sampling rate 100 Hz"),
        (wav_bytes(tone(0.2), 10**6), "sampling rate 1000000 Hz"),
        (wav_bytes(np.ones((50, 9), dtype=np.float32)), "9 channels, the limit is 8"),
        (wav_bytes(tone(3.0)), "3.00 seconds, the limit max_audio_seconds is 2"),
        (wav_bytes(tone(0.1)[:0]), "empty clip"),
        (b"RIFFnonsense", "soundfile cannot read it"),
    ],
)
def test_a_bad_sound_file_gets_one_clear_reason(content, reason):
    with pytest.raises(MediaError, match=rf"sample 2, audio 0: .*{reason}"):
        decode_sound(content, LIMITS, 2.0, CLIP)
