"""Which numbers are which picture: ranges at their ends, every mode and layout, against numpy and Pillow."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from chorus_moe.processors import ChorusImageProcessor, MediaError, MediaLimits
from chorus_moe.processors.image_processing_chorus import (
    array_to_tensor,
    image_to_tensor,
    match_channels,
    pad_to_square,
    white_of,
)
from chorus_moe.processors.processing_limits import MediaPlace
from tests.processors.conftest import picture


def test_settings_where_nothing_was_said() -> None:
    processor = ChorusImageProcessor()
    assert dict(processor.size) == {"height": 224, "width": 224} and processor.resample == Image.Resampling.BICUBIC
    assert (processor.do_resize, processor.do_rescale, processor.do_normalize) == (True, True, True)
    assert (processor.num_channels, processor.do_pad_to_square) == (3, False)
    found = processor(Image.new("RGB", (5, 5), (255, 0, 51)), return_tensors="pt").pixel_values
    assert found.shape == (1, 3, 224, 224)
    # (x / 255 - 0.5) / 0.5
    for channel, value in enumerate((1.0, -1.0, -0.6)):
        torch.testing.assert_close(found[0, channel], torch.full((224, 224), value), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("low", "high", "white"),
    [(0, 1, 1), (-0.125, 1.125, 1), (0.4, 0.4, 1), (0, 255, 255), (-31.875, 8, 255), (0, 286.875, 255), (0, 8, 255)],
)
def test_white_is_one_or_255_with_room_for_an_eighth(low: float, high: float, white: float) -> None:
    assert white_of(torch.tensor([[low, (low + high) / 2, high]])) == white


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ([-0.126, 0.5, 1.0], r"values lie in -0.126\.\.1, expected 0\.\.1 or 0\.\.255; pass do_rescale=False"),
        ([-1.0, 0.0, 7.9], r"values lie in -1\.\.7.9, expected"),
        ([-32.0, 0.0, 255.0], r"values lie in -32\.\.255, expected"),
        ([0.0, 1.0, 287.0], r"values lie in 0\.\.287, expected"),
        ([0.0, 0.5, 1.2], r"image values lie in 0\.\.1.2: too bright for 0\.\.1 or nearly black in 0\.\.255"),
        ([0.0, 0.5, 7.5], r"image values lie in 0\.\.7.5: too bright"),
    ],
)
def test_numbers_with_no_reading_or_two_are_refused(values: list[float], reason: str) -> None:
    with pytest.raises(MediaError, match=f"^{reason}"):
        white_of(torch.tensor(values))


def test_whole_numbers_below_eight_are_a_dark_picture() -> None:
    assert white_of(torch.tensor([0.0, 2.0, 7.0])) == 255.0
    assert white_of(torch.tensor([0.5, 2.0, 8.0])) == 255.0


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.array([[0, 255]], np.int64), [0, 255]),
        (np.array([[0, 65_535]], np.uint16), [0, 255]),
        (np.array([[257, 514]], np.uint16), [1, 2]),
        (np.array([[256, 513]], np.uint16), [0, 1]),
        (np.array([[0, 0]], np.uint16), [0, 0]),
        (np.array([[True, False]]), [255, 0]),
        (np.array([[7, 200]], np.uint8), [7, 200]),
        (np.array([[0, 0.5, 1]], np.float64), [0, 127.5, 255]),
        (np.array([[0, 100.0, 300]], np.float32) * 0.85, [0, 85, 255]),
        (np.array([[0, 1]], np.dtype(">i4")), [0, 1]),
        (np.array([[0, 1.0]], np.longdouble), [0, 255]),
    ],
)
def test_an_array_of_any_type_is_in_bytes(array: np.ndarray, expected: list[float]) -> None:
    found = array_to_tensor(array, in_bytes=True)
    assert found.shape == (1, 1, len(expected)) and found.flatten().tolist() == pytest.approx(expected, abs=1e-4)
    assert found.dtype == (torch.float32 if array.dtype.kind == "f" else torch.uint8)


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.array([[0, 256]], np.int32), r"image values lie in 0\.\.256, expected 0\.\.255, or 0\.\.65535 in an array"),
        (np.array([[-1, 5]], np.int32), r"image values lie in -1\.\.5, expected"),
        (np.array([[0, 255]], np.uint16), r"16-bit image values lie in 0\.\.255: 0\.\.255, or nearly black"),
        (np.array([[0, 1]], np.uint16), r"16-bit image values lie in 0\.\.1"),
        (np.array([[0, np.nan]]), "the image holds NaN or infinite values"),
        (np.array([["a"]]), "image values of type <U1 are no numbers of a picture"),
    ],
)
def test_an_array_that_is_no_picture_is_named(array: np.ndarray, reason: str) -> None:
    with pytest.raises(MediaError, match=f"^{reason}"):
        array_to_tensor(array, in_bytes=True)


def test_floats_that_are_scaled_already_stay() -> None:
    wide = np.array([[-7.0, 900.0]])
    assert array_to_tensor(wide, in_bytes=False).flatten().tolist() == [-7.0, 900.0]
    with pytest.raises(MediaError, match="NaN or infinite"):
        array_to_tensor(np.array([[np.inf]]), in_bytes=False)


MODES = [
    "L",
    "RGB",
    "RGBA",
    "LA",
    "P",
    "PA",
    "1",
    "CMYK",
    "YCbCr",
    "HSV",
    "LAB",
    "RGBX",
    "RGBa",
    "La",
    "I",
    "F",
    "I;16",
]


@pytest.mark.parametrize("mode", MODES)
def test_a_picture_of_any_mode_is_what_pillow_shows(mode: str) -> None:
    source = picture(6, 4).convert("RGBA")
    source.putalpha(Image.fromarray(np.linspace(0, 255, 24).astype(np.uint8).reshape(4, 6)))
    if mode in ("I", "F", "I;16"):
        grey = np.asarray(source.convert("L")).astype(np.float64)
        values = {
            "I": grey.astype(np.int32),
            "F": (grey / 255).astype(np.float32),
            "I;16": (grey * 257).astype(np.uint16),
        }
        image, expected = Image.fromarray(values[mode]), grey[None]
    elif mode in ("La", "RGBa"):
        plain = source.convert("LA") if mode == "La" else source
        image = plain.convert(mode)
        expected = np.asarray(image.convert("LA" if mode == "La" else "RGBA").convert("RGBA")).transpose(2, 0, 1)
    else:
        image = source.convert("P" if mode == "PA" else mode)
        image = image.convert("PA") if mode == "PA" else image
        as_shown = {"L": "L", "1": "L", "LA": "RGBA", "PA": "RGBA", "RGBA": "RGBA"}.get(mode, "RGB")
        expected = np.atleast_3d(np.asarray(image.convert(as_shown))).transpose(2, 0, 1)
    found = image_to_tensor(image, in_bytes=True)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-3)


def test_a_transparent_palette_keeps_its_transparency() -> None:
    image = picture(6, 4).convert("P")
    image.info["transparency"] = 0
    assert len(image_to_tensor(image, in_bytes=True)) == 4


@pytest.mark.parametrize(("high", "bytes_of"), [(255, 255), (256, 0), (65_535, 255)])
def test_sixteen_bits_that_pillow_reads_as_thirty_two_are_sixteen(high: int, bytes_of: int) -> None:
    values = np.array([[0, high]], np.int32)
    assert int(image_to_tensor(Image.fromarray(values), in_bytes=True).max()) == bytes_of
    for other in (np.array([[-1, 300]], np.int32), np.array([[0, 65_536]], np.int32)):
        with pytest.raises(MediaError, match="expected 0..255, or 0..65535"):
            image_to_tensor(Image.fromarray(other), in_bytes=True)


@pytest.mark.parametrize("white", [255.0, 1.0])
def test_alpha_is_laid_over_white_and_channels_match(white: float) -> None:
    torch.manual_seed(0)
    colour, alpha = torch.rand(3, 4, 5) * white, torch.rand(1, 4, 5) * white
    alpha[0, 0, 0], colour[0, 0, 0] = white, white
    share = alpha / white
    expected = colour * share + white * (1 - share)
    found = match_channels(torch.cat((colour, alpha)), 3, in_bytes=white == 255)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * white)
    grey = match_channels(torch.cat((colour, alpha)), 1, in_bytes=white == 255)
    luma = torch.tensor([0.2989, 0.587, 0.114])[:, None, None]
    torch.testing.assert_close(grey, (expected * luma).sum(0, keepdim=True), rtol=0, atol=2e-3 * white)
    assert torch.equal(match_channels(colour[:1], 3), colour[:1].expand(3, -1, -1))
    assert match_channels(colour, 3) is colour and torch.equal(match_channels(colour[:1], 1), colour[:1])


def test_alpha_in_bytes_is_rounded_and_not_cut() -> None:
    pixel = torch.tensor([100, 0, 255, 128], dtype=torch.uint8).view(4, 1, 1)
    expected = [round(value * 128 / 255 + 255 * (1 - 128 / 255)) for value in (100, 0, 255)]
    for in_bytes in (True, False):
        found = match_channels(pixel, 3, in_bytes)
        assert found.dtype == torch.uint8 and found.flatten().tolist() == expected


@pytest.mark.parametrize("shape", [(3, 7, 2), (1, 2, 7), (3, 5, 5), (3, 4, 1)])
def test_a_square_has_the_picture_in_its_middle(shape: tuple[int, int, int]) -> None:
    image = torch.rand(shape) + 1
    channels, height, width = shape
    side = max(height, width)
    expected = np.zeros((channels, side, side), np.float32)
    top, left = (side - height) // 2, (side - width) // 2
    expected[:, top : top + height, left : left + width] = image.numpy()
    assert np.array_equal(pad_to_square(image).numpy(), expected)


@pytest.mark.parametrize("channels", [0, 2, 4])
def test_a_model_sees_one_channel_or_three(channels: int) -> None:
    processor = ChorusImageProcessor(num_channels=channels)
    if channels == 0:  # of a call that does not say, the processor's own
        assert processor.process_image(picture(), num_channels=1, do_rescale=True).shape[0] == 1
        return
    with pytest.raises(MediaError, match=f"num_channels must be 1 or 3, found {channels}"):
        processor(picture())


def test_a_short_edge_makes_a_long_picture_no_larger_than_the_limit() -> None:
    processor = ChorusImageProcessor()
    processor.limits = MediaLimits(image_pixels=1_000)
    size = SimpleNamespace(shortest_edge=10)
    for wide in (np.zeros((3, 30), np.uint8), np.zeros((30, 3), np.uint8)):
        assert processor.process_image(wide, size=size, do_rescale=True).shape == (3, *wide.shape)
        with pytest.raises(MediaError, match="^an image is resized to 1210 pixels, the limit is 1000$"):
            processor.process_image(wide, size=SimpleNamespace(shortest_edge=11), do_rescale=True)
    square = np.zeros((31, 3), np.uint8)
    assert processor.process_image(square, do_pad_to_square=True, do_rescale=True).shape == (3, 31, 31)
    with pytest.raises(MediaError, match="^padded image 0: 32 x 32 = 1024 pixels, the limit is 1000$"):
        processor.process_image(np.zeros((32, 3), np.uint8), do_pad_to_square=True, do_rescale=True)
    # Channels are no pixels.
    processor.limits = MediaLimits(image_pixels=4)
    assert processor.process_image(np.zeros((1, 2), np.uint8), do_pad_to_square=True).shape == (3, 2, 2)


def test_files_in_lists_are_decoded_where_they_stand(tmp_path: Path) -> None:
    processor, path = ChorusImageProcessor(), tmp_path / "a.png"
    picture().save(path)
    found: Any = processor.fetch_images([str(path), [path.read_bytes()]])
    assert all(np.array_equal(image, picture()) for image in (found[0], found[1][0], processor.fetch_images(path)))
    with pytest.raises(MediaError, match="^image 0: no such file"):
        processor.fetch_images("nothing.png")


@pytest.mark.parametrize(("own", "asked", "refused"), [(True, None, True), (False, None, False), (True, False, False)])
def test_values_are_checked_where_they_will_be_rescaled(own: bool, asked: bool | None, refused: bool) -> None:
    processor = ChorusImageProcessor(do_rescale=own)
    place = MediaPlace("image", 3, sample=1)
    for wide in (np.full((4, 4), 900.0), Image.fromarray(np.full((4, 4), 900.0, np.float32))):
        if refused:
            with pytest.raises(MediaError, match="^sample 1, image 3: values lie in 900..900, expected"):
                processor.load(wide, place, asked)
        else:
            assert processor.load(wide, place, asked) is not None
