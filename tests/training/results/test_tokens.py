"""Token accuracy is the share of labels that the model's own logits put first, counted by hand here."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

from chorus_moe import ChorusForConditionalGeneration, ChorusProcessor
from chorus_moe.training.collator import ChorusDataCollator
from chorus_moe.training.recipe import TRAINER_SETTINGS
from chorus_moe.training.results.tokens import count_right
from chorus_moe.training.trainer import ChorusTrainer


def by_hand(
    model: ChorusForConditionalGeneration, processor: ChorusProcessor, rows: list[dict[str, Any]]
) -> tuple[int, int]:
    """Right and labelled tokens, row by row."""
    right = labelled = 0
    for row in rows:
        inputs = ChorusDataCollator(processor)([row])
        with torch.no_grad():
            best = model(**inputs).logits[0].argmax(dim=-1).tolist()
        for position, label in enumerate(inputs["labels"][0].tolist()):
            if label != -100:
                right, labelled = right + (best[position - 1] == label), labelled + 1
    return right, labelled


def trainer_of(
    model: ChorusForConditionalGeneration, processor: ChorusProcessor, rows: list[dict[str, Any]], folder: Path
) -> ChorusTrainer:
    arguments = TrainingArguments(
        str(folder),
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        # A rate of zero: every batch meets the same weights, so the count by hand holds for all steps.
        learning_rate=0.0,
        max_steps=3,
        per_device_train_batch_size=3,
        per_device_eval_batch_size=4,
        gradient_accumulation_steps=2,
        logging_steps=3,
        eval_strategy="steps",
        eval_steps=2,
        **TRAINER_SETTINGS,
    )
    return ChorusTrainer(model, arguments, ChorusDataCollator(processor), train_dataset=rows, eval_dataset=rows[:3])


def test_logs_and_evaluations_count_the_tokens_that_are_right(
    model: ChorusForConditionalGeneration, processor: ChorusProcessor, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    # Some are right and some wrong: the most frequent first token of an answer becomes the likely one.
    with torch.no_grad():
        model.lm_head.weight[processor.tokenizer("three")["input_ids"][0]] *= 30
    right, labelled = by_hand(model, processor, rows)
    assert 0 < right < labelled
    trainer = trainer_of(model, processor, rows, tmp_path)
    trainer.train()
    # Six rows a step, so every row three times. The evaluation in between neither counts nor clears anything.
    logged = [entry["token_accuracy"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == [pytest.approx(right / labelled)]
    first = by_hand(model, processor, rows[:3])
    evaluated = [e["eval_token_accuracy"] for e in trainer.state.log_history if "eval_loss" in e]
    # At step two and at the end.
    assert evaluated == [pytest.approx(first[0] / first[1])] * 2
    assert trainer.evaluate(rows[:3], metric_key_prefix="eval_image")["eval_image_token_accuracy"] == evaluated[0]


def test_heads_that_predict_no_token_are_not_counted() -> None:
    classes = {"logits": torch.zeros(2, 3)}
    assert count_right(classes, torch.zeros(2, dtype=torch.long)) is None
    assert count_right({"loss": torch.zeros(())}, torch.zeros(2, 4, dtype=torch.long)) is None
    unlabelled = count_right({"logits": torch.zeros(1, 4, 5)}, torch.full((1, 4), -100))
    assert unlabelled is not None
    assert unlabelled.tolist() == [0, 0]
