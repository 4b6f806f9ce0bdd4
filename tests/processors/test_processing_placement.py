from pathlib import Path

import numpy as np
import pytest
import torch

from chorus_moe.processors import MediaError, MediaLimits
from chorus_moe.processors.processing_placement import flatten_media, is_media_item, nest_media
from tests.processors.conftest import picture, tone

LIMITS = MediaLimits()
A, B, C = picture(seed=1), picture(seed=2), picture(seed=3)


def nest(images, texts, limits=LIMITS):
    return nest_media(images, texts, "<image>", "image", limits)


@pytest.mark.parametrize(
    ("images", "texts", "expected"),
    [
        (A, ["<image>"], [[A]]),
        ([A, B], ["<image> <image>"], [[A, B]]),
        ([A, B, C], ["<image>", "", "<image><image>"], [[A], [], [B, C]]),
        ([[A], [], [B, C]], ["<image>", "", "<image><image>"], [[A], [], [B, C]]),
        ([A, None, [B, C]], ["<image>", "", "<image><image>"], [[A], [], [B, C]]),
        (None, ["", "x"], [[], []]),
        ([], ["", "x"], [[], []]),
        ([[], []], ["", "x"], [[], []]),
    ],
)
def test_flat_nested_and_missing_media_find_their_samples(images, texts, expected):
    assert nest(images, texts) == expected


def test_a_batch_array_is_a_list_of_images():
    assert [len(row) for row in nest(np.zeros((2, 4, 4, 3)), ["<image>", "<image>"])] == [1, 1]


@pytest.mark.parametrize(
    ("images", "texts", "sample", "reason"),
    [
        (
            [[A], [], [B, C]],
            ["<image>", "", "<image>"],
            2,
            "found 1 image placeholder for 2 images; write <image> once",
        ),
        (
            [[A], [], []],
            ["<image>", "", "<image>"],
            2,
            "found 1 image placeholder for 0 images; an item is missing, or a",
        ),
        ([A], ["<image>", "<image>"], 1, "found 1 image placeholder for 0 images"),
        ([A, B, C], ["<image>", "<image>"], 1, "found 1 image placeholder for 2 images"),
        ([[A], [B]], ["<image>"], 1, "found 2 lists of images for 1 texts"),
    ],
)
def test_a_mismatch_names_the_sample_and_both_numbers(images, texts, sample, reason):
    with pytest.raises(MediaError, match=reason) as caught:
        nest(images, texts)
    assert (caught.value.sample, caught.value.modality) == (sample, "image")


def test_the_number_of_items_of_a_sample_is_limited():
    with pytest.raises(MediaError, match="sample 1: 3 images, the limit is 2"):
        nest([[A], [A, B, C]], ["<image>", "<image>" * 3], MediaLimits(images_per_sample=2))


def test_no_image_is_an_error_of_its_own():
    with pytest.raises(MediaError, match="found int"):
        nest(5, ["<image>"])


CLIP = tone(0.01)


class Decoder:
    """Like torchcodec's."""

    def get_all_samples(self):
        return CLIP


ITEMS = ["a.wav", b"x", bytearray(b"x"), Path("a"), {"path": "x"}, CLIP, torch.ones(3), A, Decoder(), [0.5], (1, 2)]


@pytest.mark.parametrize("item", [*ITEMS, [np.float32(1)]], ids=lambda item: type(item).__name__)
def test_one_item_is_no_list_of_items(item):
    assert is_media_item(item)
    assert flatten_media(item, "audio") == [item] and flatten_media([item, [item]], "audio") == [item, item]


@pytest.mark.parametrize("other", [None, [], (), [A], [[0.5]], 5, object()])
def test_what_is_no_item(other):
    assert not is_media_item(other)


def test_an_array_with_four_axes_is_a_batch_of_images_and_one_clip():
    batch = np.zeros((2, 4, 4, 3))
    for array in (batch, torch.zeros(2, 3, 4, 4)):
        assert len(flatten_media(array, "image")) == 2 and len(flatten_media([array, array], "image")) == 4
    assert len(flatten_media(batch, "audio")) == 1 and len(flatten_media(batch[0], "image")) == 1
    assert flatten_media(None, "image") == [] == flatten_media([None, []], "image")
    with pytest.raises(MediaError, match="^clips must be one item, a list, or a list per sample, found set$") as caught:
        flatten_media([{3}], "audio")
    assert caught.value.modality == "audio"


def test_as_many_items_as_the_limit_are_taken():
    assert nest([[A, B]], ["<image>" * 2], MediaLimits(images_per_sample=2)) == [[A, B]]
    assert nest_media(
        [[CLIP] * 2], ["<audio><audio>"], "<audio>", "audio", MediaLimits(clips_per_sample=2, images_per_sample=1)
    )
    with pytest.raises(MediaError, match="^sample 0: 3 clips, the limit is 2$"):
        nest_media([CLIP] * 3, ["<audio>" * 3], "<audio>", "audio", MediaLimits(clips_per_sample=2))


@pytest.mark.parametrize(
    ("media", "texts", "sample", "reason"),
    [
        (
            [A, B],
            [""],
            0,
            "found 0 image placeholders for 2 images; write <image> once per item, or drop the surplus im",
        ),
        (
            [],
            ["<image><image>"],
            0,
            "found 2 image placeholders for 0 images; an item is missing, or a person typed <im",
        ),
        (
            [[A]],
            ["", "<image>"],
            1,
            "found 1 lists of images for 2 texts; the number of <image> tokens in the prompts s",
        ),
        ([[A], [B], [C]], ["<image>"] * 2, 2, "found 3 lists of images for 2 texts"),
    ],
)
def test_both_numbers_and_the_way_out_are_said(media, texts, sample, reason):
    with pytest.raises(MediaError, match=reason) as caught:
        nest(media, texts)
    assert caught.value.sample == sample
