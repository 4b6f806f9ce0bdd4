import numpy as np
import pytest

from chorus_moe.processors import MediaError, MediaLimits
from chorus_moe.processors.processing_placement import nest_media
from tests.processors.conftest import picture

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
