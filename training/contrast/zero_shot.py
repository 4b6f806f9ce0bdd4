"""Zero-shot classification: the label whose text is nearest to an image or clip."""

from collections.abc import Mapping, Sequence
from typing import Any

from chorus_moe.processors.processing_chorus import ChorusProcessor
from chorus_moe.processors.processing_media import MEDIA
from chorus_moe.training.contrast.embeddings import embed_pairs, embed_texts
from chorus_moe.training.contrast.pairs import PairDataset
from chorus_moe.training.loading import ModelOrAdapter


def zero_shot(
    model: ModelOrAdapter,
    processor: ChorusProcessor,
    rows: Sequence[Mapping[str, Any]] | PairDataset,
    labels: Sequence[str],
    *,
    template: str = "{}",
    batch_size: int = 64,
    progress: bool = True,
) -> dict[str, dict[str, float]]:
    """Accuracy of the label with the nearest text, by modality.

    Where several labels are nearest, the right one counts by its chance among them.

    Args:
        model: a ChorusForContrastive in evaluation mode, with or without an adapter.
        rows: pairs with a text, which is the right label or the template filled with it.
        labels: all of them, two at least.
        template: text of a label, with `{}` in its place.

    Returns:
        `"image"` -> `accuracy`, and `accuracy LABEL` of each label that rows have; and so on.

    Raises:
        ValueError: fewer than two labels, one twice, a template without `{}`, or a row whose text is no label.
    """
    plain = [_plain(label) for label in labels]
    if len(labels) < 2 or not all(plain):
        raise ValueError(f"zero-shot classification needs two labels or more, none of them empty; found {list(labels)}")
    if twice := next((label for label in plain if plain.count(label) > 1), None):
        raise ValueError(f"the label {twice!r} is given twice")
    if template.count("{}") != 1:
        raise ValueError(f"template={template!r} must hold {{}} once, where the label goes")
    texts = [template.replace("{}", label) for label in labels]
    numbers = {_plain(text): number for number, text in enumerate(texts)} | {p: n for n, p in enumerate(plain)}
    wanted = [_number(rows[index], index, numbers, labels) for index in range(len(rows))]
    embedded = embed_pairs(model, processor, rows, batch_size=batch_size, progress=progress)
    label_vectors = embed_texts(model, processor, texts)
    results: dict[str, dict[str, float]] = {}
    for name in (name for name in MEDIA if name in embedded):
        scores = (embedded[name].vectors @ label_vectors.T)[embedded[name].items]
        is_best = scores == scores.amax(dim=1, keepdim=True)
        marks = [float(best[number]) / float(best.sum()) for best, number in zip(is_best, wanted, strict=True)]
        by_label: dict[str, list[float]] = {labels[number]: [] for number in sorted(set(wanted))}
        for number, mark in zip(wanted, marks, strict=True):
            by_label[labels[number]].append(mark)
        results[name] = {"accuracy": _mean(marks)} | {
            f"accuracy {label}": _mean(found) for label, found in by_label.items()
        }
    return results


def _number(row: Mapping[str, Any], index: int, numbers: Mapping[str, int], labels: Sequence[str]) -> int:
    if "error" in row:
        raise ValueError(str(row["error"]))
    if "text" not in row:
        raise ValueError(f"row {index}: no text says which label is right; it has {', '.join(row)}")
    number = numbers.get(_plain(row["text"]))
    if number is None:
        raise ValueError(f"row {index}: its text {row['text']!r:.60} is none of the labels {list(labels)}")
    return number


def _plain(text: str) -> str:
    """As `is_same` compares answers: up to case and white space."""
    return " ".join(text.casefold().split())


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
