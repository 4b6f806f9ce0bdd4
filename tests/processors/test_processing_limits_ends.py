"""Both ends of every limit, every form of a place and of a source."""

import base64
import io
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from chorus_moe.processors import processing_limits as module
from chorus_moe.processors.processing_limits import (
    BOUNDS,
    MediaError,
    MediaLimits,
    MediaPlace,
    check_clip_size,
    check_image_size,
    check_rate,
    check_settings,
    decode_sound,
    float_samples,
    is_channels_first,
    load_image,
    open_source,
    unpack_file_dict,
)
from tests.processors.conftest import picture, tone, wav_bytes

PLACE = MediaPlace("image", 1, sample=2)

ENDS = {
    "size": (1, 4_096), "crop_size": (1, 4_096), "num_image_tokens": (1, 65_536), "frames_per_token": (1, 65_536),
    "audio_convolutions": (1, 65_536), "feature_size": (1, 1_024), "sampling_rate": (1_000, 768_000),
    "n_fft": (1, 65_536), "hop_length": (1, 65_536), "dynamic_range": (0.1, 40), "max_seconds": (0, 600),
    "max_audio_seconds": (0, 86_400),
}  # fmt: skip


@pytest.mark.parametrize("name", ENDS)
def test_a_setting_may_be_both_ends_of_its_range(name: str) -> None:
    low, high = ENDS[name]
    for value in (low, high, [low, high], {"height": low}, None, [None, low]):
        check_settings({name: value}, ())
    for value in (low - 0.5, high + 0.5, [low, high + 1], {"height": low, "width": low - 1}, "x", True):
        with pytest.raises(ValueError, match=f"^{name}=.*: expected finite numbers from {low:g} to {high:g}$"):
            check_settings({name: value}, ())
    assert set(ENDS) == set(BOUNDS)


def test_a_name_is_taken_for_a_misspelt_one_where_it_is_close() -> None:
    check_settings({"image_mean": 1, "imag_men": 1, "whatever": "x"}, ("image_mean",))
    with pytest.raises(ValueError, match="^unknown setting image_meen=1; image_mean is meant$"):
        check_settings({"image_meen": 1}, ("image_mean", "image_std"))


@pytest.mark.parametrize(
    ("place", "where"),
    [
        (MediaPlace(), ""),
        (MediaPlace("image"), ""),
        (MediaPlace("image", 0), "image 0: "),
        (MediaPlace("audio", 3, sample=0), "sample 0, audio 3: "),
        (MediaPlace("text", sample=1, message=0), "sample 1, message 0: "),
        (MediaPlace("text", message=2), "message 2: "),
    ],
)
def test_an_error_begins_with_what_is_known_of_its_place(place: MediaPlace, where: str) -> None:
    error = place.error("it broke")
    assert (str(error), error.sample, error.modality) == (f"{where}it broke", place.sample, place.modality)
    assert isinstance(error, ValueError) and MediaError("x").sample is MediaError("x").modality is None


def test_a_source_is_as_large_as_its_limit_and_no_larger(tmp_path: Path) -> None:
    content = bytes(range(9))
    path, address = tmp_path / "a", "data:;base64," + base64.b64encode(content).decode()
    path.write_bytes(content)
    for item in (content, bytearray(content), path, str(path), f"file://{path}", address):
        found = open_source(item, 9, PLACE)
        assert (found.getvalue() if isinstance(found, io.BytesIO) else Path(found).read_bytes()) == content
        with pytest.raises(MediaError, match="^sample 2, image 1: 9 bytes, the limit is 8$"):
            open_source(item, 8, PLACE)
    path.write_bytes(b"")
    for item in (b"", path, "data:,"):
        with pytest.raises(MediaError, match="the file is empty"):
            open_source(item, 9, PLACE)
    os.mkfifo(tmp_path / "pipe")
    for item in (tmp_path, tmp_path / "pipe", "x" * 300):
        with pytest.raises(MediaError, match=f"^sample 2, image 1: no such file: '{str(item)[:200]}'$"):
            open_source(item, 9, PLACE)


def test_an_address_is_refused_by_its_length_before_it_is_decoded() -> None:
    head = "data:;base64,"
    whole = head + "A" * (3 * 4 // 3 + 256 - len(head))
    with pytest.raises(MediaError, match="no valid base64|bytes, the limit is 3"):
        open_source(whole, 3, PLACE)
    with pytest.raises(MediaError, match="261 characters of base64, the limit is 3 bytes"):
        open_source(whole + "A", 3, PLACE)
    for address in ("http://x/a.png", "https://x/" + "y" * 200):
        with pytest.raises(MediaError, match=f"download the file first: '{address[:80]}'$"):
            open_source(address, 3, PLACE)


@pytest.mark.parametrize(
    ("item", "found"),
    [
        ({"bytes": b"x", "path": "y"}, b"x"),
        ({"bytes": b"", "path": "y"}, b""),
        ({"bytes": None, "path": "y"}, "y"),
        ({"path": "y"}, "y"),
        ("y", "y"),
        (5, 5),
    ],
)
def test_a_file_of_datasets_is_its_bytes_or_its_path(item: Any, found: object) -> None:
    assert unpack_file_dict(item, PLACE) == found
    array = {"array": 1, "bytes": None}
    assert unpack_file_dict(array, PLACE) is array
    with pytest.raises(MediaError, match=r"found the keys \['1', 'bytes'\]$"):
        unpack_file_dict({"bytes": None, 1: 2}, PLACE)


def test_a_picture_may_have_the_last_pixel_and_no_more() -> None:
    limits = MediaLimits(image_pixels=100, image_aspect_ratio=4.0)
    for width, height in ((10, 10), (20, 5), (5, 20), (1, 1)):
        check_image_size(width, height, limits, PLACE)
    for width, height, reason in (
        (0, 5, "empty image of 0 x 5 pixels"),
        (5, 0, "empty image of 5 x 0 pixels"),
        (101, 1, "101 x 1 = 101 pixels, the limit is 100"),
        (21, 4, "21 x 4: aspect ratio 5, the limit is 4"),
        (1, 5, "1 x 5: aspect ratio 5, the limit is 4"),
    ):
        with pytest.raises(MediaError, match=f"^sample 2, image 1: {reason}$"):
            check_image_size(width, height, limits, PLACE)


@pytest.mark.parametrize("end", [1, 3, 4])
def test_channels_stand_at_the_end_that_has_one_three_or_four(end: int) -> None:
    assert is_channels_first((end, 9, 9)) and not is_channels_first((9, 9, end))
    for other in (1, 3, 4):
        with pytest.raises(MediaError, match=rf"^the shape \({end}, 9, {other}\) can be channels first or last"):
            is_channels_first((end, 9, other))
        assert is_channels_first((end, 9, other), "channels_first")
        assert not is_channels_first((end, 9, other), "channels_last")
    for layout in ("channels_first", SimpleNamespace(value="channels_first")):
        with pytest.raises(MediaError, match=r"^an image has 1, 3 or 4 channels, found the shape \(9, 9"):
            is_channels_first((9, 9, end), layout)
    for size in (0, 2, 5):
        with pytest.raises(MediaError, match="an image has 1, 3 or 4 channels"):
            is_channels_first((size, 9, size))


@pytest.mark.parametrize("rate", [1_000, 768_000, 16_000.0, np.int64(8_000), np.float32(8_000)])
def test_a_rate_is_a_whole_number_within_both_ends(rate: Any) -> None:
    found = check_rate(rate, MediaLimits(), PLACE)
    assert found == rate and type(found) is int


@pytest.mark.parametrize(
    ("rate", "reason"),
    [
        (999, "sampling rate 999 is outside 1000..768000 Hz"),
        (768_001, "sampling rate 768001 is outside 1000..768000 Hz"),
        (True, "the sampling rate must be a whole number of Hz, found True"),
        (1_000.5, "the sampling rate must be a whole number of Hz, found 1000.5"),
        ("8000", "the sampling rate must be a whole number of Hz, found '8000'"),
        (None, "the sampling rate must be a whole number of Hz, found None"),
    ],
)
def test_a_rate_that_is_none_is_named(rate: Any, reason: str) -> None:
    with pytest.raises(MediaError, match=f"^sample 2, image 1: {reason}$"):
        check_rate(rate, MediaLimits(), PLACE)


def test_a_clip_may_have_the_last_sample_and_the_last_channel() -> None:
    check_clip_size(1, 8, 8_000, MediaLimits(), 2.0, PLACE)
    check_clip_size(16_000, 1, 8_000, MediaLimits(), 2.0, PLACE)
    for samples, channels, reason in (
        (0, 1, "empty clip of 0 samples"),
        (1, 9, "9 channels, the limit is 8"),
        (16_001, 1, "2.00 seconds, the limit max_audio_seconds is 2"),
        (20_000, 1, "2.50 seconds, the limit max_audio_seconds is 2"),
    ):
        with pytest.raises(MediaError, match=f"^sample 2, image 1: {reason}$"):
            check_clip_size(samples, channels, 8_000, MediaLimits(), 2.0, PLACE)


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        (np.array([-1.5, 0.25], np.float64), [-1.5, 0.25]),
        (np.array([-32_768, 0, 16_384], np.int16), [-1.0, 0.0, 0.5]),
        (np.array([-(2**31), 2**30], np.int32), [-1.0, 0.5]),
        (np.array([0, 128, 192, 255], np.uint8), [-1.0, 0.0, 0.5, 127 / 128]),
        (np.array([-128, 64], np.int8), [-1.0, 0.5]),
    ],
)
def test_samples_of_every_type_are_between_minus_one_and_one(samples: np.ndarray, expected: list[float]) -> None:
    found = float_samples(samples)
    assert found.dtype == np.float32 and found.tolist() == expected


def test_the_size_of_an_array_is_that_of_its_picture() -> None:
    limits = MediaLimits(image_pixels=60)
    for shape in ((6, 10), (3, 6, 10), (6, 10, 3), (1, 6, 10)):
        for array in (np.zeros(shape), torch.zeros(shape)):
            assert load_image(array, limits, PLACE) is array
            with pytest.raises(MediaError, match="^sample 2, image 1: 10 x 6 = 60 pixels, the limit is 59$"):
                load_image(array, MediaLimits(image_pixels=59), PLACE)
    low = np.zeros((3, 6, 3))
    for layout, size in (("channels_first", "3 x 6"), ("channels_last", "6 x 3")):
        with pytest.raises(MediaError, match=f"^sample 2, image 1: {size} = 18 pixels"):
            load_image(low, MediaLimits(image_pixels=17), PLACE, layout)
    for shape in ((4,), (1, 2, 3, 4)):
        with pytest.raises(MediaError, match=r"an image array has 2 or 3 axes, found the shape"):
            load_image(np.zeros(shape), limits, PLACE)


def test_a_jpeg_may_have_sixty_four_scans(monkeypatch: pytest.MonkeyPatch) -> None:
    assert module.MAX_JPEG_SCANS == 64
    buffer = io.BytesIO()
    picture(64, 64).save(buffer, "JPEG", progressive=True)
    content = buffer.getvalue()
    scans = content.count(b"\xff\xda")
    monkeypatch.setattr(module, "MAX_JPEG_SCANS", scans)
    assert load_image(content, MediaLimits(), PLACE).size == (64, 64)
    monkeypatch.setattr(module, "MAX_JPEG_SCANS", scans - 1)
    with pytest.raises(MediaError, match=f"{scans} scans in a JPEG, the limit is {scans - 1}"):
        load_image(content, MediaLimits(), PLACE)


def test_a_second_picture_of_a_phone_is_no_animation() -> None:
    buffer = io.BytesIO()
    first, second = picture(16, 8), picture(16, 8, seed=1)
    first.save(buffer, "MPO", save_all=True, append_images=[second])
    found = load_image(buffer.getvalue(), MediaLimits(), PLACE)
    assert found.size == (16, 8)
    with Image.open(buffer) as file:
        assert file.format == "MPO" and np.array_equal(found, file)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_every_common_format_is_read(kind: str) -> None:
    buffer = io.BytesIO()
    picture(12, 9).convert("P" if kind == "GIF" else "RGB").save(buffer, kind)
    assert load_image(buffer.getvalue(), MediaLimits(), PLACE).size == (12, 9)


def test_a_format_that_is_not_on_the_list_is_refused() -> None:
    buffer = io.BytesIO()
    picture(16, 16).save(buffer, "ICO")
    with pytest.raises(MediaError, match="not a readable image of the formats PNG, JPEG, JPEG2000, WEBP, AVIF, GIF, B"):
        load_image(buffer.getvalue(), MediaLimits(), PLACE)


@pytest.mark.parametrize("seconds", [0.5, 1.0])
def test_a_file_may_be_as_long_as_its_limit(seconds: float) -> None:
    content = wav_bytes(tone(seconds))
    assert len(decode_sound(content, MediaLimits(), seconds, PLACE)[0]) == 16_000 * seconds
    with pytest.raises(MediaError, match=f"{seconds:.2f} seconds, the limit max_audio_seconds is {seconds - 0.25:g}"):
        decode_sound(content, MediaLimits(), seconds - 0.25, PLACE)


def test_channels_of_a_file_are_averaged() -> None:
    both = np.stack([tone(0.1), 0.5 * tone(0.1, 300)], axis=1)
    found, _ = decode_sound(wav_bytes(both, subtype="FLOAT"), MediaLimits(), 1.0, PLACE)
    np.testing.assert_allclose(found, both.mean(axis=1), atol=1e-7)


def test_a_forked_process_works_on_one_thread() -> None:
    """Its parent's threads are not there, and it would wait for them."""
    reader, writer = os.pipe()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        child = os.fork()
        if child == 0:
            os.write(writer, bytes([torch.get_num_threads()]))
            os._exit(0)
        os.waitpid(child, 0)
        assert os.read(reader, 1) == b"\x01"
    finally:
        torch.set_num_threads(threads)
        os.close(reader), os.close(writer)


@pytest.mark.parametrize("cause", [ImportError("no module"), OSError("libavcodec.so: cannot open shared object file")])
def test_a_reader_of_sound_that_cannot_be_loaded_is_named(cause: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    class Refuses:
        def find_spec(self, name: str, *rest: object) -> None:
            if name == "av":
                raise cause

    monkeypatch.delitem(sys.modules, "av", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Refuses(), *sys.meta_path])
    with pytest.raises(ImportError, match="sound files need `pip install av`; arrays work without it"):
        decode_sound(wav_bytes(tone(0.1)), MediaLimits(), 10.0, MediaPlace("audio", 0))
