"""Rows of cached features as `cache-features` writes them: token ids, labels, and the states of the towers."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from chorus_moe.processors.processing_media import MEDIA

if TYPE_CHECKING:
    import datasets

FACTS = "features.json"
VERSION = 1
# Key of a row under which the shapes of its states stand; no other row has it.
SHAPES = "feature_shapes"


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
    """Raises ValueError: what `pack` has not written, or what was damaged since."""
    try:
        # No pickle: this format holds names, shapes and numbers only.
        found = safetensors.torch.load(packed)
        states = [found[str(index)] for index in range(len(found))]
        for state in states:
            # Without a width, a few bytes could claim any number of tokens.
            if state.ndim != 2 or not state.shape[1] or not state.is_floating_point():
                raise TypeError(f"{state.dtype} of shape {tuple(state.shape)} is no (tokens, width)")
    except (SafetensorError, KeyError, TypeError) as error:
        size = f"{len(packed):,} bytes" if isinstance(packed, bytes) else f"type {type(packed).__name__}"
        raise ValueError(f"cached features of {size} are damaged: {error}; write them again") from error
    return states


def read_row(row: Mapping[str, Any], facts: Facts) -> dict[str, Any]:
    """A row of the table: `input_ids` and `labels`, lists of equal length, its `images` and `audio` as states `(tokens,
    width)` of each image or window of sound, the `SHAPES` of all towers, and the columns of the row it was made of."""
    media = {medium.column: unpack(row[name]) if name in facts.towers else [] for name, medium in MEDIA.items()}
    tokens = {name: row[name] for name in ("input_ids", "labels", "task")}
    return {**json.loads(row["rest"]), **tokens, **media, SHAPES: facts.shapes}


def is_feature_row(row: Mapping[str, Any]) -> bool:
    return SHAPES in row
