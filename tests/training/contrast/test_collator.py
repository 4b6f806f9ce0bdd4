"""Batches of pairs: row i of every tensor belongs together, and a bad sample is named or skipped."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainingArguments

from chorus_moe import ChorusForContrastive, ChorusProcessor
from chorus_moe.processors.processing_limits import MediaError
from chorus_moe.training.contrast.collator import PairCollator
from tests.training.contrast.conftest import make_pair

PAIRS = [("text", "image"), ("text", "audio"), ("image", "audio"), ("text", "image", "audio")]


@pytest.mark.parametrize("names", PAIRS, ids="-".join)
def test_row_i_of_every_tensor_belongs_together(processor: ChorusProcessor, names: tuple[str, ...]) -> None:
    collator, rows = PairCollator(processor), [make_pair(index, *names) for index in range(3)]
    batch = collator(rows)
    keys = {"text": "input_ids", "image": "pixel_values", "audio": "input_features"}
    assert {name for name in keys if keys[name] in batch} == set(names)
    for index, row in enumerate(rows):
        alone = collator([row])
        for name in names:
            found, expected = batch[keys[name]][index], alone[keys[name]][0]
            assert torch.equal(found[: len(expected)], expected)
    if "text" in names:
        assert processor.tokenizer.decode(batch["input_ids"][1][batch["attention_mask"][1].bool()]) == "four"


@pytest.mark.parametrize("names", PAIRS, ids="-".join)
def test_the_stock_trainer_trains_and_evaluates_on_pairs(
    contrastive: ChorusForContrastive, processor: ChorusProcessor, names: tuple[str, ...], tmp_path: Any
) -> None:
    rows = [make_pair(index, *names) for index in range(3)]
    settings = {"max_steps": 15, "per_device_train_batch_size": 3, "learning_rate": 1e-3, "logging_steps": 1}
    arguments = TrainingArguments(
        str(tmp_path), remove_unused_columns=False, use_cpu=True, report_to="none", disable_tqdm=True,
        save_strategy="no", lr_scheduler_type="constant", **settings,
    )  # fmt: skip
    trainer = Trainer(
        contrastive, arguments, data_collator=PairCollator(processor), train_dataset=rows, eval_dataset=rows
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (make_pair(1, "text"), "sample 1: key 'text': a pair needs two"),
        (make_pair(1, "image", "audio"), "sample 1: a pair of image and audio, sample 0 has text and image"),
        ({"text": "four", "image": b"broken"}, "sample 1"),
    ],
)
def test_a_bad_sample_is_named_or_skipped(processor: ChorusProcessor, row: dict[str, Any], message: str) -> None:
    rows = [make_pair(0, "text", "image"), row, make_pair(2, "text", "image")]
    with pytest.raises(MediaError, match=message):
        PairCollator(processor)(rows)
    collator = PairCollator(processor, on_bad_media="skip")
    batch = collator(rows)
    assert len(batch["input_ids"]) == len(batch["pixel_values"]) == 2
    assert collator.num_bad_samples == 1


def test_a_batch_of_bad_samples_alone_is_an_error(processor: ChorusProcessor) -> None:
    with pytest.raises(MediaError, match="no sample of a batch could be read"):
        PairCollator(processor, on_bad_media="skip")([make_pair(0, "text")])


def test_a_clip_of_several_windows_is_no_pair(processor: ChorusProcessor) -> None:
    window = processor.feature_extractor.window_frames * processor.feature_extractor.hop_length
    sound = {"array": np.sin(np.arange(window + 1000)).astype(np.float32), "sampling_rate": 16_000}
    rows = [make_pair(0, "text", "audio"), {"text": "four", "audio": sound}]
    with pytest.raises(MediaError, match="sample 1: its clip fills 2 windows, a pair takes a clip of one"):
        PairCollator(processor)(rows)
