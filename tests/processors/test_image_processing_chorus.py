import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from chorus_moe.processors import ChorusImageProcessor, MediaError, MediaLimits
from tests.processors.conftest import picture

SIZE = {"height": 8, "width": 8}


def pixels(image, **settings) -> torch.Tensor:
    processor = ChorusImageProcessor(**{"size": SIZE, **settings})
    return processor(image, return_tensors="pt").pixel_values


@pytest.mark.parametrize("num_channels", [1, 3])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "La", "P", "RGB", "RGBA", "RGBa", "CMYK", "I", "I;16", "F"])
def test_every_mode_gives_the_configured_channels(mode, num_channels):
    if mode == "I;16":
        image = Image.fromarray(np.array(picture().convert("L")).astype(np.uint16) * 257)
    elif mode == "La":
        image = picture().convert("LA").convert("La")
    else:
        image = picture().convert("L").convert(mode) if mode in ("I", "F") else picture().convert(mode)
    values = pixels(image, num_channels=num_channels)
    assert values.shape == (1, num_channels, 8, 8)
    assert values.dtype == torch.float32


def test_white_is_one_and_black_is_minus_one_from_every_source():
    white = np.full((5, 4), 255, dtype=np.uint8)
    sources = [
        white,
        white.astype(bool),
        white.astype(np.uint16) * 257,
        white.astype(np.int64),
        np.ones((5, 4), dtype=np.float32),
        np.full((5, 4), 255.0),
        torch.ones(3, 5, 6),
        np.ones((5, 4, 3)),
        Image.fromarray(white),
        Image.fromarray(white.astype(np.uint16) * 257),
        Image.new("RGBA", (4, 5), (0, 0, 0, 0)),
    ]
    # Bicubic weights sum to 1 within float32 rounding; bytes come out exact.
    torch.testing.assert_close(pixels(sources), torch.ones(len(sources), 3, 8, 8), atol=1e-6, rtol=0)
    assert torch.equal(pixels(np.zeros((5, 4))), -torch.ones(1, 3, 8, 8))


@pytest.mark.parametrize("image", [np.full((4, 4), 300.0), np.full((4, 4), -1.0), np.full((4, 4), np.nan)])
def test_values_that_are_no_picture_are_an_error(image):
    with pytest.raises(MediaError, match="image 1: "):
        pixels([np.zeros((4, 4)), image])


def test_grey_of_sixteen_bits_keeps_its_shades():
    shades = np.linspace(0, 65_535, 64).astype(np.uint16).reshape(8, 8)
    expected = torch.from_numpy((shades // 257).astype(np.float32))
    images = [shades, shades.astype(">u2"), torch.from_numpy(shades)]
    images += [Image.fromarray(values) for values in (shades, shades.astype(">u2"), shades.astype(np.int32))]
    for image in images:
        found = pixels(image, num_channels=1, do_normalize=False)[0, 0] * 255
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", [(), (5,), (5, 6, 7)])
def test_an_array_that_is_no_picture_is_refused_with_its_shape(shape):
    with pytest.raises(MediaError, match=rf"image 0: .*{re.escape(str(shape))}"):
        pixels(np.zeros(shape))


@pytest.mark.parametrize("saved", [True, False])
def test_the_range_of_values_is_that_of_the_call(saved):
    """`do_rescale` of a call stands above the processor's own, also where values are checked."""
    wide = np.full((8, 8, 3), 300.0)
    processor = ChorusImageProcessor(size=SIZE, do_rescale=saved, do_normalize=False)
    found = processor(wide, do_rescale=False, return_tensors="pt").pixel_values
    torch.testing.assert_close(found, torch.full((1, 3, 8, 8), 300.0))
    with pytest.raises(MediaError, match="image 0: "):
        processor(wide, do_rescale=True)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.int64, np.uint32, np.float32, np.float64])
def test_values_up_to_255_are_the_same_picture_in_every_type(dtype):
    shades = np.arange(64).reshape(8, 8) * 4
    images = [shades.astype(dtype), torch.from_numpy(shades.astype(dtype))]
    for image in [*images, Image.fromarray(shades.astype(np.int32)), Image.fromarray(shades.astype(np.float32))]:
        found = pixels(image, num_channels=1, do_normalize=False)[0, 0] * 255
        torch.testing.assert_close(found, torch.from_numpy(shades).float(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("high", [1.0, 1.000001, 1.1])
def test_a_float_hair_above_one_changes_nothing_else(high):
    image = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    image[7, 7] = high
    image[0, 0] = 1 - high
    found = pixels(image, num_channels=1, do_normalize=False)[0, 0]
    torch.testing.assert_close(found, torch.from_numpy(image.clip(0, 1)), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (np.full((8, 8), 200, np.uint16), "nearly black in 0..65535"),
        (np.full((8, 8), 300, np.int32), "expected 0..255, or 0..65535"),
        (np.full((8, 8), -1, np.int16), "lie in -1..-1"),
        (np.linspace(0, 3, 64).reshape(8, 8), "nearly black in 0..255"),
        (np.linspace(-1, 1, 64).reshape(8, 8), "expected 0..1 or 0..255"),
        (np.zeros((8, 8), dtype=complex), "type complex128"),
        (np.full((8, 8), "x"), "no numbers"),
        (np.zeros((3, 50, 3)), "channels first or last"),
        (np.zeros((1, 50, 4)), "channels first or last"),
        (torch.zeros(4, 50, 4), "channels first or last"),
    ],
)
def test_two_readings_of_a_picture_are_an_error(image, reason):
    with pytest.raises(MediaError, match=f"image 1: .*{reason}"):
        pixels([np.zeros((4, 4)), image])


@pytest.mark.parametrize("height", [1, 3, 4])
def test_a_low_picture_is_read_as_it_lies(height):
    """Values follow the row, so a picture that is turned shows."""
    image = np.broadcast_to(np.arange(height, dtype=np.uint8)[:, None, None] * 60, (height, 40, 3)).copy()
    size = {"height": height, "width": 40}
    expected = torch.from_numpy(image).permute(2, 0, 1).float()
    for layout, array in (("channels_last", image), ("channels_first", image.transpose(2, 0, 1))):
        processor = ChorusImageProcessor(size=size, do_normalize=False)
        found = processor(array, input_data_format=layout, return_tensors="pt").pixel_values[0] * 255
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("white", [1.0, 255.0])
def test_transparency_is_laid_over_white_without_rescaling(white):
    rgba = np.zeros((8, 8, 4), dtype=np.float32)
    rgba[:4, :, 3], rgba[:, :, 0] = white, 0.5 * white
    found = pixels(rgba, do_rescale=False, do_normalize=False)[0] / white
    assert torch.allclose(found[:, 0, 0], torch.tensor([0.5, 0.0, 0.0]), atol=1e-6)
    assert torch.allclose(found[:, 7, 0], torch.ones(3), atol=1e-6)
    with pytest.raises(MediaError, match="image 0: .*expected 0..1 or 0..255"):
        pixels(rgba * 2 - white, do_rescale=False)


def test_two_channels_are_an_error():
    with pytest.raises(MediaError, match="1, 3 or 4 channels, found the shape"):
        pixels(np.zeros((2, 50, 2)))


def test_a_picture_does_not_depend_on_its_batch():
    images = [picture(9, 6), picture(20, 30, seed=1), picture(9, 6, seed=2)]
    assert torch.equal(pixels(images), torch.cat([pixels(image) for image in images]))


def test_padding_to_a_square_keeps_the_shape_of_things():
    values = pixels(np.full((2, 8), 255, dtype=np.uint8), do_pad_to_square=True, num_channels=1)[0, 0]
    assert torch.equal(values[3:5], torch.ones(2, 8))
    assert torch.equal(values[:3], -torch.ones(3, 8))


@pytest.mark.parametrize(("height", "width"), [(8, 3), (3, 8), (7, 2)])
def test_padding_to_a_square_is_centred(height, width):
    image = np.full((height, width, 3), 255, dtype=np.uint8)
    side = max(height, width)
    expected = np.zeros((side, side))
    top, left = (side - height) // 2, (side - width) // 2
    expected[top : top + height, left : left + width] = 1
    image = Image.fromarray(image)
    found = pixels(image, size={"height": side, "width": side}, do_pad_to_square=True, do_normalize=False)
    assert np.array_equal(found[0, 0].numpy(), expected)


def test_a_long_picture_is_not_padded_beyond_the_limit():
    processor = ChorusImageProcessor(size=SIZE, do_pad_to_square=True)
    processor.limits = MediaLimits(image_pixels=10_000)
    with pytest.raises(MediaError, match="200 x 200 = 40000 pixels, the limit is 10000"):
        processor(picture(200, 10))


def test_saving_keeps_the_settings_and_never_the_limits(tmp_path):
    processor = ChorusImageProcessor(size=SIZE, num_channels=1, image_mean=[0.2], image_std=[0.4])
    processor.limits = MediaLimits(image_pixels=10)
    processor.save_pretrained(tmp_path)
    loaded = ChorusImageProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == processor.to_dict()
    assert ChorusImageProcessor(size=loaded.size).size == processor.size
    assert loaded.limits == MediaLimits()
    assert "limits" not in json.loads(processor.to_json_string())
    with pytest.raises(MediaError, match="the limit is 10"):
        processor(picture())
