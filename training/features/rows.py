"""Rows of cached features as `cache-features` writes them: token ids, labels, and the states of the towers."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import safetensors.torch
from torch import Tensor

if TYPE_CHECKING:
    import datasets

FACTS = "features.json"
VERSION = 1


class Facts(NamedTuple):
    """What made the features of a folder.

    Args:
        model: its name or path.
        towers: modality -> hash of its tower, see `identity.py`.
        processor: hash of the processor.
        shapes: modality -> tokens and width of one image or window; a window of sound has one token at least.
        splits: split -> its rows, those left out as unreadable not counted.
        version: of the format.
    """

    model: str
    towers: dict[str, str]
    processor: str
    shapes: dict[str, list[int]]
    splits: dict[str, int]
    version: int = VERSION


class FeatureRow(dict[str, Any]):
    """A row with `input_ids` and `labels`, lists of equal length, its `images` and `audio` as states of the towers, and
    all other columns of the row that it was made of.

    Args:
        shapes: of the states, as in `Facts`, of all towers of the model.
        states: modality -> states `(tokens, width)` of each image or window of sound.
    """

    def __init__(self, values: Mapping[str, Any], shapes: dict[str, list[int]], states: dict[str, list[Tensor]]):
        super().__init__(values)
        self.shapes, self.states = shapes, states


def is_cache(folder: Path) -> bool:
    """Whether `cache-features` has written a folder."""
    return (folder / FACTS).is_file()


def read_facts(folder: Path) -> Facts:
    """Raises ValueError: no file of this format."""
    try:
        found = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        if found.get("version") != VERSION:
            raise ValueError(f"version {found.get('version')!r}, this package reads {VERSION}")
        return Facts(**found)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / FACTS}: not what cache-features writes: {error}") from error


def read_table(folder: Path, split: str, facts: Facts) -> "datasets.Dataset":
    """The rows of a split, mapped into memory.

    Raises:
        ValueError: there is no such split, or its file is not whole.
    """
    import datasets

    if split not in facts.splits:
        raise ValueError(f"{str(folder)!r} has no split {split!r}; it has {', '.join(facts.splits)}")
    path = folder / f"{split}.arrow"
    try:
        table = datasets.Dataset.from_file(str(path))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: no readable Arrow file: {error}") from error
    if len(table) != facts.splits[split]:
        raise ValueError(f"{path}: found {len(table)} rows, {FACTS} says {facts.splits[split]}")
    return table


def pack(states: Sequence[Tensor]) -> bytes:
    """States as the content of a safetensors file, which keeps shapes and number types."""
    return safetensors.torch.save({str(index): state.contiguous() for index, state in enumerate(states)})


def unpack(packed: bytes) -> list[Tensor]:
    found = safetensors.torch.load(packed)
    return [found[str(index)] for index in range(len(found))]


def read_row(row: Mapping[str, Any], facts: Facts) -> FeatureRow:
    """A row of the table with its states."""
    states = {name: unpack(row[name]) for name in facts.towers}
    media = {"images": states.get("image", []), "audio": states.get("audio", [])}
    rest = json.loads(row["rest"])
    found = {name: row[name] for name in ("input_ids", "labels", "task")}
    return FeatureRow({**rest, **found, **media}, facts.shapes, states)
