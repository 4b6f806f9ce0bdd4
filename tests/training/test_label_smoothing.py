"""Smoothed losses are the LabelSmoother's, shifted, and the model's own terms stay."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast
from transformers.trainer_pt_utils import LabelSmoother

from chorus_moe import ChorusForSequenceClassification, ChorusProcessor
from chorus_moe.training.label_smoothing import class_loss, smooth_labels, token_loss
from tests.conftest import tiny_config
from tests.training.conftest import make_model, make_rows
from tests.training.test_train import new_trainer

OFF = {"router_aux_loss_coef": 0.0}


@pytest.mark.parametrize("count", [None, 7])
@pytest.mark.parametrize("is_training", [False, True])
def test_the_loss_is_the_label_smoothers_and_the_models_own(
    tokenizer: PreTrainedTokenizerFast, processor: ChorusProcessor, tmp_path: Path, count: int | None, is_training: bool
):
    model = make_model(tokenizer, router_aux_loss_coef=0.5, router_z_loss_coef=0.1)
    trainer = smooth_labels(new_trainer(model, processor, tmp_path, make_rows(4), label_smoothing_factor=0.3))
    batch = trainer.data_collator(make_rows(3))
    loss, outputs = trainer.compute_loss(
        model.train(is_training), batch, True, None if count is None else torch.tensor(count)
    )
    expected = LabelSmoother(0.3)(outputs, batch["labels"], shift_labels=True, num_items_in_batch=count)
    if is_training:
        num_labels = int((batch["labels"][:, 1:] != -100).sum())
        share = 1.0 if count is None else num_labels / count
        expected = expected + share * (0.5 * outputs.aux_loss + 0.1 * outputs.z_loss)
        assert outputs.aux_loss > 0
    torch.testing.assert_close(loss, expected)


def test_classes_are_smoothed_too(tokenizer: PreTrainedTokenizerFast, processor: ChorusProcessor, tmp_path: Path):
    config = tiny_config(vocab_size=len(tokenizer))
    config.num_labels = 3
    model = ChorusForSequenceClassification(config)
    trainer = smooth_labels(new_trainer(model, processor, tmp_path, make_rows(4), label_smoothing_factor=0.3))
    inputs = {"input_ids": torch.randint(5, 90, (4, 6)), "labels": torch.tensor([0, 2, 1, 2])}
    loss, outputs = trainer.compute_loss(model.eval(), dict(inputs), True)
    torch.testing.assert_close(loss, LabelSmoother(0.3)(outputs, inputs["labels"]))
    model.config.problem_type = "regression"
    with pytest.raises(ValueError, match="problem_type='regression' predicts no single token or class"):
        smooth_labels(trainer)


def test_the_stock_trainer_is_refused_before_the_first_step_where_losses_would_vanish(
    tokenizer: PreTrainedTokenizerFast, processor: ChorusProcessor, tmp_path: Path
):
    trainer = new_trainer(make_model(tokenizer), processor, tmp_path, make_rows(4), label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match=r"\['aux_loss'\] would not be learned.*smooth_labels"):
        trainer.train()
    assert trainer.state.global_step == 0
    exits = {"exit_layers": [1], "exit_loss_coef": 1.0}
    trainer = new_trainer(
        make_model(tokenizer, **OFF, **exits), processor, tmp_path, make_rows(4), label_smoothing_factor=0.1
    )
    with pytest.raises(ValueError, match=r"\['exit_loss'\] would not be learned"):
        trainer.train()


def test_without_losses_of_our_own_the_stock_trainer_shifts_the_labels(
    tokenizer: PreTrainedTokenizerFast, processor: ChorusProcessor, tmp_path: Path
):
    model = make_model(tokenizer, **OFF)
    trainer = new_trainer(model, processor, tmp_path, make_rows(4), label_smoothing_factor=0.3)
    batch = trainer.data_collator(make_rows(3))
    loss, outputs = trainer.compute_loss(model.train(), dict(batch), True, torch.tensor(7))
    torch.testing.assert_close(loss, LabelSmoother(0.3)(outputs, batch["labels"], True, 7))


@pytest.mark.parametrize("count", [None, 5, torch.tensor(5)])
@pytest.mark.parametrize("epsilon", [0.0, 0.3])
def test_a_sum_over_labels_is_divided_by_their_number(count: int | torch.Tensor | None, epsilon: float):
    logits, labels = torch.randn(2, 4, 6), torch.tensor([[1, 2, -100, 3], [4, -100, -100, 0]])
    total = 0.0
    for row, position, label in ((0, 0, 2), (0, 2, 3), (1, 2, 0)):
        logs = logits[row, position].log_softmax(-1)
        total -= (1 - epsilon) * logs[label] + epsilon * logs.mean()
    found = token_loss(logits.bfloat16().float(), labels, epsilon=epsilon, num_items_in_batch=count, other=1)
    same = token_loss(logits, labels, epsilon=epsilon, num_items_in_batch=count)
    torch.testing.assert_close(same, torch.as_tensor(total / (3 if count is None else 5)))
    assert found.dtype == torch.float32
    classes = torch.tensor([2, 0])
    expected = -sum(
        (1 - epsilon) * row.log_softmax(-1)[c] + epsilon * row.log_softmax(-1).mean()
        for row, c in zip(logits[:, 0], classes, strict=True)
    )
    torch.testing.assert_close(class_loss(logits[:, 0], classes, epsilon=epsilon), expected / 2)
