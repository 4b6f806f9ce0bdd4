import json

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
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "F"])
def test_every_mode_gives_the_configured_channels(mode, num_channels):
    image = picture().convert("L").convert(mode) if mode in ("I;16", "F") else picture().convert(mode)
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
        torch.ones(3, 5, 4),
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


def test_two_channels_are_an_error():
    with pytest.raises(MediaError, match="1, 3 or 4 channels, found 2"):
        pixels(np.zeros((2, 50, 2)))


def test_a_picture_does_not_depend_on_its_batch():
    images = [picture(9, 6), picture(20, 30, seed=1), picture(9, 6, seed=2)]
    assert torch.equal(pixels(images), torch.cat([pixels(image) for image in images]))


def test_padding_to_a_square_keeps_the_shape_of_things():
    values = pixels(np.full((2, 8), 255, dtype=np.uint8), do_pad_to_square=True, num_channels=1)[0, 0]
    assert torch.equal(values[3:5], torch.ones(2, 8))
    assert torch.equal(values[:3], -torch.ones(3, 8))


def test_saving_keeps_the_settings_and_never_the_limits(tmp_path):
    processor = ChorusImageProcessor(size=SIZE, num_channels=1, image_mean=[0.2], image_std=[0.4])
    processor.limits = MediaLimits(image_pixels=10)
    processor.save_pretrained(tmp_path)
    loaded = ChorusImageProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == processor.to_dict()
    assert loaded.limits == MediaLimits()
    assert "limits" not in json.loads(processor.to_json_string())
    with pytest.raises(MediaError, match="the limit is 10"):
        processor(picture())
