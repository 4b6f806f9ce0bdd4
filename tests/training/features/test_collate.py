"""A batch of cached rows is the batch of their media, with states of the towers in the place of pictures and sound."""

from pathlib import Path
from typing import Any

import pytest
import torch

from chorus_moe import ChorusForConditionalGeneration, ChorusProcessor
from chorus_moe.processors.processing_limits import MediaError
from chorus_moe.training.collator import ChorusDataCollator
from chorus_moe.training.data import load_rows
from chorus_moe.training.features.collate import FeatureCollator

OPTIONS: list[dict[str, Any]] = [{}, {"max_length": 20}, {"pad_to_multiple_of": 8}]
MEDIA = {"pixel_values", "input_features", "input_features_mask"}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("numbers", [range(6), [3], [0, 3], [1, 2]])
def test_tokens_labels_and_loss_are_those_of_the_media(
    options: dict[str, Any],
    numbers: list[int],
    model: ChorusForConditionalGeneration,
    processor: ChorusProcessor,
    data: Path,
    cache: Path,
) -> None:
    rows, cached = load_rows(data), load_rows(cache)
    expected = ChorusDataCollator(processor, **options)([rows[n] for n in numbers])
    found = FeatureCollator(processor, **options)([cached[n] for n in numbers])
    assert found.keys() == (expected.keys() - MEDIA) | {"mm_encoder_outputs"}
    for name in expected.keys() - MEDIA:
        assert torch.equal(found[name], expected[name]), name
    for training in (False, True):
        model.train(training)
        # float32 sums in another order: clips are padded to other lengths.
        torch.testing.assert_close(model(**found).loss, model(**expected).loss, atol=1e-6, rtol=0)


def test_a_row_that_is_too_long_is_named_as_with_media(processor: ChorusProcessor, cache: Path) -> None:
    rows = load_rows(cache)
    with pytest.raises(MediaError, match="sample 1: images and clips alone take 8 tokens, max_length is 6"):
        FeatureCollator(processor, max_length=6)([rows[3], rows[4]])
    # Skipped and counted as with media.
    collator = FeatureCollator(processor, max_length=6, on_bad_media="skip")
    assert len(collator([rows[3], rows[4]])["input_ids"]) == 1
    assert collator.num_bad_samples == 1


def test_rows_with_media_are_collated_as_ever_and_never_mixed(
    processor: ChorusProcessor, data: Path, cache: Path
) -> None:
    rows, cached = load_rows(data), load_rows(cache)
    expected = ChorusDataCollator(processor)([rows[0], rows[1]])
    found = FeatureCollator(processor)([rows[0], rows[1]])
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    with pytest.raises(ValueError, match="1 of the 2 rows of a batch hold cached features"):
        FeatureCollator(processor)([rows[0], cached[1]])
