"""Curves are what the Trainer has logged."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from chorus_moe.training.results.confusion import confusion_of
from chorus_moe.training.results.pictures import curves_of, draw_confusion, draw_curves

HISTORY = [
    {"loss": 3.0, "token_accuracy": 0.1, "step": 1},
    {"eval_loss": 2.5, "eval_image_loss": 9.0, "step": 1},
    {"loss": 2.0, "token_accuracy": 0.4, "step": 2},
    {"train_runtime": 1.0, "train_loss": 2.5, "step": 2},
    {"eval_loss": 2.2, "step": 2},
    # The evaluation after training, at the same step.
    {"eval_loss": 2.1, "eval_token_accuracy": 0.5, "step": 2},
]


def test_the_curves_are_the_logged_values_by_step() -> None:
    assert curves_of(HISTORY).metrics == {
        "loss": {"train": [(1, 3.0), (2, 2.0)], "eval": [(1, 2.5), (2, 2.1)]},
        "token accuracy": {"train": [(1, 0.1), (2, 0.4)], "eval": [(2, 0.5)]},
    }


def test_a_picture_is_drawn_of_two_points_and_none_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "curves.png"
    assert draw_curves(path, curves_of(HISTORY[:2])) is None
    assert draw_curves(path, curves_of(HISTORY)) == path
    with Image.open(path) as picture:
        picture.verify()
    # A loss that is not finite, or below zero, is no reason to fail after a long run.
    broken = [{"loss": float("nan"), "step": 1}, {"loss": float("inf"), "step": 2}, {"loss": -1.0, "step": 3}]
    assert draw_curves(path, curves_of(broken)) == path
    assert draw_curves(path, curves_of(broken[:2])) == path
    monkeypatch.setattr("chorus_moe.training.results.pictures.can_draw", lambda: False)
    assert draw_curves(path, curves_of(HISTORY)) is None


def test_nothing_of_two_confusions_of_ten_labels_is_cut_off(tmp_path: Path) -> None:
    digits = [str(digit) for digit in range(10)] * 2
    confusion = confusion_of(digits, digits)
    assert confusion is not None
    path = draw_confusion(tmp_path / "confusion.png", {"written": confusion, "spoken": confusion})
    assert path is not None
    with Image.open(path) as picture:
        grey = np.asarray(picture.convert("L"))
    # Titles, numbers and names of axes end before the edges do.
    assert all((edge == 255).all() for edge in (grey[0], grey[-1], grey[:, 0], grey[:, -1]))
