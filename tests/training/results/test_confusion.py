"""A confusion counts answers as scikit-learn does, and is drawn up only where answers are classes."""

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix

from chorus_moe.training.results.confusion import OTHER, confusion_of, confusion_table


def test_the_counts_are_those_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    labels = ["cat", "dog", "emu"]
    references, answers = (rng.choice(labels, 60).tolist() for _ in range(2))
    found = confusion_of(answers, references)
    assert found is not None
    assert (found.labels, found.columns) == (labels, labels)
    assert np.array_equal(found.counts, confusion_matrix(references, answers, labels=labels))


def test_what_is_no_reference_is_counted_as_other_and_spelling_as_in_the_accuracy() -> None:
    found = confusion_of(["Yes", " no", "perhaps", "YES"], ["yes", "yes", "no", "no"])
    assert found is not None
    assert found.columns == ["no", "yes", OTHER]
    assert found.counts.tolist() == [[0, 1, 1], [1, 1, 0]]
    assert confusion_table(found) == [
        "| reference, answered | no | yes | (other) |",
        "| --- | --- | --- | --- |",
        "| no |  | 1 | 1 |",
        "| yes | 1 | 1 |  |",
    ]


def test_numbers_stand_in_their_order() -> None:
    found = confusion_of(["9"] * 8, ["10", "9", "two", "-1"] * 2)
    assert found is not None
    assert found.labels == ["-1", "9", "10", "two"]


@pytest.mark.parametrize("references", [["a", "b", "c"], ["a"] * 9, [str(i // 2) for i in range(100)]])
def test_free_text_one_answer_and_many_answers_have_none(references: list[str]) -> None:
    assert confusion_of(references, references) is None
