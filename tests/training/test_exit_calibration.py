"""Thresholds of exits: what is promised holds on rows never seen, and a larger allowance saves no less."""

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from scipy.special import xlogy
from scipy.stats import binom, norm
from transformers import Trainer, TrainerCallback, TrainingArguments

from chorus_moe import ChorusForSequenceClassification
from chorus_moe.training.exit_calibration import (
    THRESHOLDS,
    ExitAnswers,
    calibrate_depth,
    calibrate_exits,
    find_thresholds,
    is_kept,
    lowest,
    p_value,
    rows_needed,
)
from chorus_moe.training.recipe import TRAINER_SETTINGS
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
def test_without_an_error_rate_accuracy_on_these_rows_falls_by_no_more_than_was_allowed(seed: int, drop: float):
    found = answers(seed)
    thresholds = find_thresholds(found, drop, error_rate=None)
    assert found.accuracy(thresholds) >= found.is_right_NX[:, -1].float().mean() - drop - 1e-6


@pytest.mark.parametrize("seed", range(5))
def test_all_leave_at_once_where_any_loss_is_allowed(seed: int):
    found = answers(seed)
    assert found.mean_layers(find_thresholds(found, 1.0)) == 2
    assert found.mean_layers(find_thresholds(found, 0.05, error_rate=None)) < 8


@pytest.mark.parametrize("seed", range(5))
def test_the_margin_never_lets_more_leave_than_no_margin(seed: int):
    found = answers(seed)
    chosen = [find_thresholds(found, 0.05, error_rate)[0] for error_rate in (0.01, 0.05, 0.2, None)]
    assert chosen == sorted(chosen, reverse=True)
    assert chosen[0] > chosen[-1]


def test_nobody_leaves_by_exits_that_are_always_wrong():
    found = answers(0, rows=800)
    found.is_right_NX[:, :-1], found.is_right_NX[:, -1] = False, True
    assert found.mean_layers(find_thresholds(found, 0.0, error_rate=None)) == 8
    assert found.mean_layers(find_thresholds(found, 0.005)) == 8


# Rates of lost and won rows, and numbers of rows, over two orders of magnitude. The worst sum seen is 0.92 of the rate.
@pytest.mark.parametrize("error_rate", [0.01, 0.05, 0.1])
@pytest.mark.parametrize("drop", [0.005, 0.02, 0.05])
def test_a_loss_above_the_allowance_is_accepted_less_often_than_the_error_rate(drop: float, error_rate: float):
    least = rows_needed(drop, error_rate)
    for rows in (least, round(1.6 * least), 3 * least):
        for won_rate in (0.0, 0.001, 0.003, 0.01):
            most = round(6 * math.sqrt(rows * won_rate) + rows * won_rate + 8)
            wrong = 0.0
            for won in range(most + 1):
                kept = [n for n in range(won + round(rows * drop) + 1) if is_kept(n, won, rows, drop, error_rate)]
                if kept:
                    lost_rate = (won_rate + drop) / (1 - won_rate)
                    wrong += binom.pmf(won, rows, won_rate) * binom.cdf(kept[-1], rows - won, lost_rate)
            assert wrong <= error_rate


def test_the_promise_holds_on_fresh_draws():
    """Calibrated on 1,000 rows of a law, measured on 100,000 others: at most 5% of calibrations may break it."""
    law = sharp_answers(seed=99, rows=100_000)

    @functools.cache
    def true_drop(threshold: float) -> float:
        return law.accuracy([1.0] * 3) - law.accuracy([threshold] * 3)

    broken, broken_without_margin, layers = 0, 0, 0.0
    for seed in range(100):
        found = sharp_answers(seed, rows=1000)
        chosen = find_thresholds(found, 0.01)
        layers += found.mean_layers(chosen) / 100
        broken += true_drop(chosen[0]) > 0.01
        broken_without_margin += true_drop(find_thresholds(found, 0.01, error_rate=None)[0]) > 0.01
    # A rate of exactly 5% breaks more than ten of a hundred promises once in a hundred times.
    assert broken <= 10
    # A bound on the rows alone does not carry over, which is what the margin is for.
    assert broken_without_margin > 30
    assert layers < 7


def test_the_p_value_falls_with_won_rows_and_rises_with_lost_ones():
    values = [p_value(lost, won, 2000, 0.005) for lost, won in ((0, 0), (2, 0), (4, 0), (4, 4), (6, 4), (40, 0))]
    assert values[1] < values[2] and values[3] < values[2] and values[3] < values[4]
    assert 0 < values[0] < 0.01 and values[5] > 0.999


@pytest.mark.parametrize("drop", [0.005, 0.05, 0.3])
@pytest.mark.parametrize(("lost", "won"), [(0, 0), (3, 0), (0, 3), (7, 4), (40, 12), (60, 60)])
def test_the_p_value_is_that_of_a_score_test_with_a_likelihood_maximised_by_scipy(lost: int, won: int, drop: float):
    """Rows are lost, won or neither. Under the null hypothesis the rates of the first two differ by `drop`."""
    rows = 700
    kept = rows - lost - won

    def unlikelihood(rate: float) -> float:
        return -(xlogy(lost, rate + drop) + xlogy(won, rate) + xlogy(kept, 1 - 2 * rate - drop))

    limits = (0.0, (1 - drop) / 2)
    rate = minimize_scalar(unlikelihood, bounds=limits, method="bounded", options={"xatol": 1e-14}).x
    # The variance of lost - won: each row adds 1, -1 or 0.
    rates = [rate + drop, rate, 1 - 2 * rate - drop]
    mean, square = drop, rates[0] + rates[1]
    found = norm.cdf(lost + 0.5 - won, loc=rows * mean, scale=math.sqrt(rows * (square - mean**2)))
    assert p_value(lost, won, rows, drop) == pytest.approx(found, rel=1e-4)


def test_few_rows_cannot_promise_a_small_drop():
    found = answers(0)
    with pytest.raises(ValueError, match=r"400 rows cannot promise a drop of at most 0.005 .* takes 725 rows"):
        find_thresholds(found, 0.005)
    with pytest.raises(ValueError, match="takes inf rows"):
        find_thresholds(found, 0.0)


@pytest.mark.parametrize("drop", [0.002, 0.005, 0.1, 0.5])
def test_the_rows_needed_are_the_fewest_that_can_promise(drop: float):
    least = rows_needed(drop, 0.05)
    assert is_kept(0, 0, int(least), drop, 0.05)
    assert not is_kept(0, 0, int(least) - 1, drop, 0.05)


def sharp_answers(seed: int, rows: int) -> ExitAnswers:
    """Exits that are nearly always right when they are sure, and a full depth that is right in 95% of the rows."""
    generator = torch.Generator().manual_seed(seed)
    sure = torch.rand(rows, 4, generator=generator) ** 0.25
    wrong = torch.tensor([0.5, 0.3, 0.2, 0.0]) * (1 - sure) + torch.tensor([0.01, 0.01, 0.01, 0.05])
    return ExitAnswers([2, 4, 6, 8], sure, torch.rand(rows, 4, generator=generator) > wrong)


def classifier() -> ChorusForSequenceClassification:
    torch.manual_seed(0)
    config = tiny_config(exit_layers=[1, 2])
    config.num_labels = 5
    return ChorusForSequenceClassification(config)


def test_the_model_does_what_the_calibration_says():
    model = classifier()
    batches = [tiny_batch(model.config, seed) | {"labels": torch.tensor([0, 4, 2])} for seed in range(4)]
    found = calibrate_exits(model, batches, max_accuracy_drop=0.3, error_rate=None)
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
    with pytest.raises(ValueError, match="has no labels"):
        calibrate_exits(model, [batch])


@pytest.mark.parametrize("error_rate", [0.0, 0.9])
def test_an_error_rate_that_is_none_is_refused(error_rate: float):
    with pytest.raises(ValueError, match=f"error_rate={error_rate}"):
        calibrate_exits(classifier(), [], 0.1, error_rate)


def test_a_model_whose_exits_may_not_be_used_is_pointed_out():
    model = classifier()
    with torch.no_grad():
        for head in model.exits:
            head.score.weight.mul_(1000)
    batch = tiny_batch(model.config)
    model.eval()
    with torch.no_grad():
        labels = model(**{name: value for name, value in batch.items() if name != "labels"}).logits.argmax(-1)
    with pytest.warns(UserWarning, match="no sample leaves early: 3 rows"):
        calibrate_exits(model, [batch | {"labels": labels}], 0.0, error_rate=None)
    assert model.config.exit_thresholds == [1.0, 1.0]


def test_hard_rows_go_deep_in_the_share_that_was_asked_for():
    model = classifier()
    batches = [tiny_batch(model.config, seed) | {"labels": torch.tensor([0, 4, 2])} for seed in range(12)]
    found = calibrate_depth(model, batches, layers=1, share=0.7)
    assert found.left_after[1] <= 0.3
    assert found.thresholds[0] < 1
    with pytest.raises(ValueError, match="36 rows cannot promise a drop of at most 0.02"):
        calibrate_depth(model, batches, layers=1)


class HeadGradients(TrainerCallback):
    """The largest gradient of each exit at every optimizer step."""

    def __init__(self) -> None:
        self.steps: list[list[float]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.steps.append([head.score.weight.grad.abs().max().item() for head in model.exits])


@torch.no_grad()
def losses(model: Any, rows: list[dict[str, torch.Tensor]]) -> list[float]:
    """Of every exit and of the head, on all rows."""
    model.eval()
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    labels = batch.pop("labels")
    outputs = model(**batch, output_exit_logits=True)
    return [F.cross_entropy(logits, labels).item() for logits in (*outputs.exit_logits, outputs.logits)]


def test_a_stock_trainer_trains_every_exit_and_the_head_together(tmp_path: Path):
    model = classifier()
    model.config.text_config.exit_loss_coef = 1.0
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(5, (32,), generator=generator)
    # The label is the one word of five that the text holds.
    words = torch.randint(20, 128, (32, 8), generator=generator)
    words[torch.arange(32), torch.randint(8, (32,), generator=generator)] = 10 + labels
    rows = [
        {"input_ids": w, "attention_mask": torch.ones_like(w), "labels": n} for w, n in zip(words, labels, strict=True)
    ]
    before, gradients = losses(model, rows), HeadGradients()
    settings = {
        "max_steps": 24,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "save_strategy": "no",
    }
    settings |= {"learning_rate": 1e-2, "report_to": "none", "use_cpu": True, "disable_tqdm": True, **TRAINER_SETTINGS}
    Trainer(model, TrainingArguments(str(tmp_path), **settings), train_dataset=rows, callbacks=[gradients]).train()
    assert len(gradients.steps) == 24 and min(map(min, gradients.steps)) > 0
    # Chance is log 5 = 1.61.
    assert all(after < 0.5 * start for start, after in zip(before, losses(model, rows), strict=True))


def test_thresholds_fall_by_a_twentieth_of_a_power_of_ten_to_zero() -> None:
    left = [1 - value for value in THRESHOLDS]
    assert THRESHOLDS[0] == 1 - 1e-6 and THRESHOLDS[-1] == 0
    assert [after / before for before, after in zip(left, left[1:], strict=False)] == pytest.approx([10**0.05] * 120)
    tried: list[float] = []
    # All keep: the last one; none does: 1, and no other is tried; then the one before the first that does not.
    assert lowest(lambda value: tried.append(value) is None) == 0 and tried == list(THRESHOLDS)
    assert lowest(lambda value: False) == 1
    assert lowest(lambda value: value > 0.5) == min(value for value in THRESHOLDS if value > 0.5)
