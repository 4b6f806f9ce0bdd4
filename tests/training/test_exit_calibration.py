"""Thresholds of exits: what is promised holds, and a larger allowance saves no less."""

import pytest
import torch

from chorus_moe import ChorusForSequenceClassification
from chorus_moe.training.exit_calibration import ExitAnswers, calibrate_exits, find_thresholds
from tests.conftest import tiny_batch, tiny_config


def answers(seed: int, rows: int = 400) -> ExitAnswers:
    """Exits that are the more often right the surer they are, and the deeper."""
    generator = torch.Generator().manual_seed(seed)
    sure = torch.rand(rows, 4, generator=generator)
    right = torch.rand(rows, 4, generator=generator) < sure * torch.tensor([0.6, 0.8, 0.9, 0.1]) + torch.tensor(
        [0.0, 0.1, 0.1, 0.9]
    )
    return ExitAnswers([2, 4, 6, 8], sure, right)


@pytest.mark.parametrize("drop", [0.0, 0.005, 0.05, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_accuracy_falls_by_no_more_than_was_allowed(seed: int, drop: float):
    found = answers(seed)
    thresholds = find_thresholds(found, drop)
    assert found.accuracy(thresholds) >= found.is_right_NX[:, -1].float().mean() - drop - 1e-6


@pytest.mark.parametrize("seed", range(5))
def test_all_leave_at_once_where_any_loss_is_allowed(seed: int):
    found = answers(seed)
    assert found.mean_layers(find_thresholds(found, 1.0)) == 2
    assert found.mean_layers(find_thresholds(found, 0.05)) < 8


def test_nobody_leaves_by_exits_that_are_always_wrong():
    found = answers(0)
    found.is_right_NX[:, :-1], found.is_right_NX[:, -1] = False, True
    assert found.mean_layers(find_thresholds(found, 0.0)) == 8


def classifier() -> ChorusForSequenceClassification:
    torch.manual_seed(0)
    config = tiny_config(exit_layers=[1, 2])
    config.num_labels = 5
    return ChorusForSequenceClassification(config)


def test_the_model_does_what_the_calibration_says():
    model = classifier()
    batches = [tiny_batch(model.config, seed) | {"labels": torch.tensor([0, 4, 2])} for seed in range(4)]
    found = calibrate_exits(model, batches, max_accuracy_drop=0.3)
    assert model.config.exit_thresholds == found.thresholds and model.training
    model.eval()
    with torch.no_grad():
        outputs = [model(**batch) for batch in batches]
    right = torch.cat([out.logits.argmax(-1) == batch["labels"] for out, batch in zip(outputs, batches, strict=True)])
    assert right.float().mean().item() == pytest.approx(found.accuracy)
    left = torch.cat([out.left_after for out in outputs])
    assert left.float().mean().item() == pytest.approx(found.mean_layers)
    assert found.mean_layers < 3


@pytest.mark.parametrize("drop", [-0.1, 1.5])
def test_an_allowance_that_is_no_share_is_refused(drop: float):
    with pytest.raises(ValueError, match=f"max_accuracy_drop={drop}"):
        calibrate_exits(classifier(), [], drop)


def test_calibration_needs_rows_and_labels():
    model = classifier()
    with pytest.raises(ValueError, match="no rows"):
        calibrate_exits(model, [])
    batch = {name: value for name, value in tiny_batch(model.config).items() if name != "labels"}
    with pytest.raises(ValueError, match="without labels"):
        calibrate_exits(model, [batch])
