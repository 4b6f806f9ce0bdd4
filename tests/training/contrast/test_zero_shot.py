"""The label with the nearest text, against the vectors of the model themselves."""

from typing import Any

import numpy as np
import pytest
import torch

from chorus_moe import ChorusForContrastive, ChorusProcessor
from chorus_moe.training.contrast.zero_shot import zero_shot
from tests.training.contrast.conftest import TEXTS, make_pair

LABELS = ["three", "four", "five", "four five"]


def vectors(model: ChorusForContrastive, processor: ChorusProcessor, rows: list[dict[str, Any]]) -> np.ndarray:
    with torch.no_grad():
        images = [processor(images=row["image"], return_tensors="pt")["pixel_values"] for row in rows]
        return torch.cat([model.get_image_features(image) for image in images]).numpy()


@pytest.mark.parametrize("template", ["{}", "it is {}"])
def test_accuracy_is_that_of_the_nearest_text(
    contrastive: ChorusForContrastive, processor: ChorusProcessor, template: str
) -> None:
    rows = [make_pair(index, "text", "image") for index in range(6)]
    found = zero_shot(contrastive, processor, rows, LABELS, template=template, batch_size=4, progress=False)
    with torch.no_grad():
        texts = [processor(text=template.format(label), return_tensors="pt")["input_ids"] for label in LABELS]
        labels = torch.cat([contrastive.get_text_features(ids) for ids in texts]).numpy()
    best = (vectors(contrastive, processor, rows) @ labels.T).argmax(axis=1)
    marks = [LABELS[number] == text for number, text in zip(best, TEXTS, strict=True)]
    assert found["image"]["accuracy"] == pytest.approx(np.mean(marks))
    for label in LABELS:
        of_label = [mark for mark, text in zip(marks, TEXTS, strict=True) if text == label]
        assert found["image"][f"accuracy {label}"] == pytest.approx(np.mean(of_label))


def test_progress_is_shown_unless_it_is_not_wanted(
    contrastive: ChorusForContrastive, processor: ChorusProcessor, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [make_pair(0, "text", "image")]
    zero_shot(contrastive, processor, rows, LABELS)
    assert "1/1" in capsys.readouterr().err
    zero_shot(contrastive, processor, rows, LABELS, progress=False)
    assert capsys.readouterr().err == ""


def test_ties_count_by_chance(contrastive: ChorusForContrastive, processor: ChorusProcessor) -> None:
    with torch.no_grad():
        contrastive.projections["text"].weight.zero_()
    rows = [make_pair(index) for index in range(6)]
    found = zero_shot(contrastive, processor, rows, LABELS, progress=False)
    assert found["image"]["accuracy"] == found["audio"]["accuracy"] == 0.25


def test_a_row_may_hold_the_filled_template(contrastive: ChorusForContrastive, processor: ChorusProcessor) -> None:
    rows = [make_pair(index, "text", "image") for index in range(3)]
    filled = [row | {"text": f"It is  {row['text']}"} for row in rows]
    options: dict[str, Any] = {"template": "it is {}", "progress": False}
    plain, other = (zero_shot(contrastive, processor, given, LABELS, **options) for given in (rows, filled))
    assert plain == other


@pytest.mark.parametrize(
    ("labels", "template", "message"),
    [
        ([], "{}", "needs two labels or more"),
        (["three"], "{}", "needs two labels or more"),
        (["three", ""], "{}", "none of them empty"),
        (["three", "Three"], "{}", "the label 'three' is given twice"),
        (LABELS, "a photo", "must hold {} once"),
        (["three", "four"], "{}", "row 2: its text 'five' is none of the labels"),
    ],
)
def test_bad_labels_are_refused(
    contrastive: ChorusForContrastive, processor: ChorusProcessor, labels: list[str], template: str, message: str
) -> None:
    rows = [make_pair(index, "text", "image") for index in range(3)]
    with pytest.raises(ValueError, match=message):
        zero_shot(contrastive, processor, rows, labels, template=template, progress=False)


def test_a_row_without_a_text_has_no_right_label(contrastive: ChorusForContrastive, processor: ChorusProcessor) -> None:
    with pytest.raises(ValueError, match="row 0: no text says which label is right; it has image, audio"):
        zero_shot(contrastive, processor, [make_pair(0, "image", "audio")], LABELS, progress=False)
