"""The answers of an evaluation as files: every answer with its reference, accuracy by task and medium, a confusion.

`answers.jsonl` holds a row for each question, mistakes first; `results.json` and `results.md` the figures, the
latter to be read; `confusion.png` the table of `results.md` as a picture.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from chorus_moe.training.evaluate import Evaluation, is_same
from chorus_moe.training.results.confusion import cell_of, confusion_of, confusion_table
from chorus_moe.training.results.pictures import draw_confusion

ANSWERS, FIGURES, TABLES, PICTURE = "answers.jsonl", "results.json", "results.md", "confusion.png"
SHOWN_MISTAKES = 20


def wilson_interval(marks: Sequence[bool], z: float = 1.96) -> tuple[float, float]:
    """95% interval of an accuracy (Wilson 1927), which stays within 0..1 also at 100%."""
    n, p = len(marks), sum(marks) / len(marks)
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    # Not the normal interval, which has width zero at 100%.
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def answer_rows_of(evaluation: Evaluation) -> list[dict[str, Any]]:
    """One row a question, those with a wrong answer first, each group in the order of the data."""
    rows = [
        {
            "row": number,
            "correct": is_same(answer, reference),
            "answer": answer,
            "reference": reference,
            "task": task,
            "medium": medium,
            "question": question,
        }
        for number, (answer, reference, task, medium, question) in enumerate(
            zip(
                evaluation.answers,
                evaluation.references,
                evaluation.tasks,
                evaluation.media,
                evaluation.questions,
                strict=True,
            )
        )
    ]
    return sorted(rows, key=lambda row: row["correct"])


def write_results(folder: Path, evaluation: Evaluation, source: Mapping[str, Any]) -> list[Path]:
    """Write the files of this module into `folder`, over those of an earlier evaluation; returns their paths.

    Args:
        source: what was evaluated, by name: model, data, split.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows, confusion = answer_rows_of(evaluation), confusion_of(evaluation.answers, evaluation.references)
    picture = draw_confusion(folder / PICTURE, {} if confusion is None else {"": confusion})
    figures: dict[str, Any] = {**source, **evaluation.to_dict()}
    lines = ["# Results", "", *(f"- {name}: {value}" for name, value in source.items()), ""]
    lines += [f"Loss {evaluation.loss:.4f}. Answers count when they equal the reference up to case and spaces.", ""]
    lines += _share_table("answers", evaluation.marks_by(lambda number: "all"))
    for title, names in (("task", evaluation.tasks), ("medium", evaluation.media)):
        if any(name is not None for name in names):
            lines += [f"## By {title}", "", *_share_table(title, evaluation.marks_by(names.__getitem__))]
    if confusion is not None:
        figures["confusion"] = confusion._asdict() | {"counts": confusion.counts.tolist()}
        lines += ["## Confusion", "", *confusion_table(confusion), ""]
        lines += [f"![Answers by reference]({PICTURE})", ""] if picture else []
    mistakes = [row for row in rows if not row["correct"]]
    if mistakes:
        shown = [
            f"| {row['row']} | {cell_of(row['question'])} | {cell_of(row['answer'])} | {cell_of(row['reference'])} |"
            for row in mistakes[:SHOWN_MISTAKES]
        ]
        lines += ["## Mistakes", "", f"{len(shown)} of {len(mistakes)}; all are in `{ANSWERS}`.", ""]
        lines += ["| row | question | answer | reference |", "| --- | --- | --- | --- |", *shown, ""]
    (folder / ANSWERS).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    (folder / FIGURES).write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / TABLES).write_text("\n".join(lines), encoding="utf-8")
    names = [ANSWERS, FIGURES, TABLES, *([PICTURE] if picture else [])]
    return [folder / name for name in names]


def _share_table(title: str, marks: Mapping[str | None, Sequence[bool]]) -> list[str]:
    """Accuracy with its 95% interval (Wilson), a line each."""
    lines = [f"| {title} | rows | accuracy | 95% interval |", "| --- | --- | --- | --- |"]
    for name, right in marks.items():
        low, high = wilson_interval(right)
        shown, share = "(none)" if name is None else cell_of(str(name)), sum(right) / len(right)
        lines.append(f"| {shown} | {len(right):,} | {100 * share:.1f}% | {100 * low:.1f} to {100 * high:.1f}% |")
    return [*lines, ""]
