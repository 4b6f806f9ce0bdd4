"""What an evaluation leaves on disk holds every answer, and figures that follow from the answers."""

import json
from pathlib import Path

import pytest
from PIL import Image

from chorus_moe.training.evaluate import Evaluation
from chorus_moe.training.results import answers
from chorus_moe.training.results.answers import answer_rows_of, wilson_interval, write_results

REFERENCES = ["one", "two", "one", "two"]


def evaluation(given: list[str], tasks: list[str | None] | None = None, question: str = "which?") -> Evaluation:
    right = sum(a == b for a, b in zip(given, REFERENCES, strict=True)) / 4
    media = ["image", "text", "image", "image+audio"]
    return Evaluation(right, 0.5, 4, given, REFERENCES, [question] * 4, tasks or [None] * 4, media)


def test_mistakes_come_first_and_no_answer_is_left_out() -> None:
    rows = answer_rows_of(evaluation(["one", "one", "ONE ", "three"]))
    assert [(row["row"], row["correct"]) for row in rows] == [(1, False), (3, False), (0, True), (2, True)]
    assert [row["answer"] for row in rows] == ["one", "three", "one", "ONE "]


def test_the_files_hold_the_same_figures(tmp_path: Path) -> None:
    found = evaluation(["one", "one", "one", "three"], ["count", "count", None, "count"])
    paths = write_results(tmp_path / "out", found, {"model": "m", "data": "d", "split": "test"})

    assert [path.name for path in paths] == ["answers.jsonl", "results.json", "results.md", "confusion.png"]
    figures = json.loads(paths[1].read_text())
    assert (figures["model"], figures["accuracy"], figures["num_rows"]) == ("m", 0.5, 4)
    assert figures["accuracy_by_task"] == {"count": 1 / 3, "": 1.0}
    assert figures["accuracy_by_medium"] == {"image": 1.0, "image+audio": 0.0, "text": 0.0}
    labels, columns = ["one", "two"], ["one", "two", "(other)"]
    assert figures["confusion"] == {"labels": labels, "columns": columns, "counts": [[2, 0, 0], [1, 0, 1]]}
    text = paths[2].read_text()
    # Wilson's interval for 1 of 3 at 95%: 6.1 to 79.2%.
    assert "| count | 3 | 33.3% | 6.1 to 79.2% |" in text
    assert "| (none) | 1 | 100.0% |" in text
    assert "| two | 1 |  | 1 |" in text
    assert "| 3 | which? | three | two |" in text
    with Image.open(paths[3]) as picture:
        picture.verify()


def test_texts_cannot_break_a_table(tmp_path: Path) -> None:
    write_results(tmp_path, evaluation(["a | b\n\n# c", "", "<b>", "x" * 500], question="a\n|b"), {})
    lines = (tmp_path / "results.md").read_text().splitlines()
    assert "| 0 | a \\|b | a \\| b # c | one |" in lines
    assert "| 1 | a \\|b | (nothing) | two |" in lines
    assert "| 2 | a \\|b | &lt;b> | one |" in lines
    assert f"| 3 | a \\|b | {'x' * 59}… | two |" in lines


def test_without_matplotlib_there_is_no_picture_and_no_link_to_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_results(tmp_path, evaluation(REFERENCES), {})
    monkeypatch.setattr("chorus_moe.training.results.pictures.can_draw", lambda: False)
    names = [path.name for path in write_results(tmp_path, evaluation(REFERENCES), {})]
    assert answers.PICTURE not in names
    # Nor is that of the evaluation before left.
    assert not (tmp_path / answers.PICTURE).exists()
    assert "png" not in (tmp_path / "results.md").read_text()


def test_the_interval_holds_the_accuracy_and_stays_within_0_and_1() -> None:
    low, high = wilson_interval([True] * 97 + [False] * 3)
    assert low < 0.97 < high
    assert wilson_interval([True] * 50)[1] == pytest.approx(1.0)
    # Wilson's interval for 0 of 50 at 95%: 0 to 0.071.
    assert wilson_interval([False] * 50)[1] == pytest.approx(0.0713, abs=1e-3)


@pytest.mark.parametrize(("wrong", "shown"), [(1, 1), (20, 20), (21, 20)])
def test_twenty_mistakes_are_shown_and_all_are_counted(wrong: int, shown: int, tmp_path: Path) -> None:
    rows = wrong + 1
    given = ["one"] + ["two"] * wrong
    found = Evaluation(1 / rows, 0.5, rows, given, ["one"] * rows, ["q"] * rows, [None] * rows, ["text"] * rows)
    write_results(tmp_path, found, {})
    lines = (tmp_path / "results.md").read_text().splitlines()
    assert f"{shown} of {wrong}; all are in `answers.jsonl`." in lines
    assert sum(line.endswith("| q | two | one |") for line in lines) == shown
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == rows
