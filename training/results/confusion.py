"""Which answer is given in the place of which: a table for questions with few different answers."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# More do not fit a page; and where most references occur once, no answer is a class.
MAX_LABELS, MIN_ROWS_PER_LABEL = 40, 2
OTHER = "(other)"


class Confusion(NamedTuple):
    """`counts[i, j]`: how often `labels[i]` was right and `columns[j]` was answered.

    Columns are the labels, and `OTHER` last if an answer was none of them.
    """

    labels: list[str]
    columns: list[str]
    counts: np.ndarray


def confusion_of(answers: Sequence[str], references: Sequence[str]) -> Confusion | None:
    """The confusion of answers, compared as `is_same` compares them; None where the references are not few.

    Few are at most `MAX_LABELS`, each of them the right one of `MIN_ROWS_PER_LABEL` rows in the mean.
    """
    given, right = [plain(answer) for answer in answers], [plain(reference) for reference in references]
    labels = sorted(set(right), key=_rank)
    if not 2 <= len(labels) <= min(MAX_LABELS, len(right) / MIN_ROWS_PER_LABEL):
        return None
    columns = labels + ([OTHER] if set(given) - set(labels) else [])
    counts = np.zeros((len(labels), len(columns)), dtype=np.int64)
    for (reference, answer), count in Counter(zip(right, given, strict=True)).items():
        column = columns.index(answer if answer in labels else OTHER)
        counts[labels.index(reference), column] += count
    return Confusion(labels, columns, counts)


def plain(text: str) -> str:
    """A text without the differences that `is_same` ignores."""
    return " ".join(text.casefold().split())


def _rank(label: str) -> tuple[bool, float, str]:
    """Numbers in their order, then words in that of the alphabet."""
    is_number = label.removeprefix("-").isdecimal()
    return not is_number, float(label) if is_number else 0.0, label


def confusion_table(confusion: Confusion) -> list[str]:
    """Lines of Markdown; a row is a reference, a cell without a number is zero."""
    cells = [[str(count) if count else "" for count in row] for row in confusion.counts.tolist()]
    heads = [cell_of(name) for name in confusion.columns]
    return [
        f"| reference, answered | {' | '.join(heads)} |",
        "| --- " * (len(heads) + 1) + "|",
        *(f"| {cell_of(label)} | {' | '.join(row)} |" for label, row in zip(confusion.labels, cells, strict=True)),
    ]


def cell_of(text: str, longest: int = 60) -> str:
    """A text as a cell of a Markdown table: on one line, cut at `longest` characters, the cut shown."""
    line = " ".join(text.split())
    line = line if len(line) <= longest else f"{line[: longest - 1]}…"
    return line.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;") or "(nothing)"
