"""Rows of training data from a local file or folder, or from the Hub, with undecoded media.

A row has `messages` (chat turns), `images` and `audio` (lists; may be missing). In local data a media item is a path
relative to the data file's folder; in Parquet files and on the Hub it may be the file itself. Nothing is decoded here:
the processor decodes within its limits.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from chorus_moe.processors.processing_media import MEDIA

# Column of a table -> the type of the parts that its items belong to.
MEDIA_KINDS = {row.column: name for name, row in MEDIA.items()}
FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
# Enough to see a wrong format. All rows would mean to read the whole data set before the first step.
CHECKED_ROWS = 16


class RowDataset(Dataset):
    """Rows of a table; relative media paths are resolved against `folder`, None for tables from the Hub."""

    def __init__(self, table: Any, folder: Path | None):
        self.table = table
        self.folder = folder

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = dict(self.table[int(index)])
        for column in MEDIA_KINDS:
            row[column] = [self._resolve(item, index, column) for item in row.get(column) or []]
        return row

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    def _resolve(self, item: Any, index: int, column: str) -> Any:
        is_file = isinstance(item, Mapping) and item.get("bytes") is None and item.get("path") is not None
        path = item["path"] if is_file else item
        # Web addresses pass here and are refused by the processor, which names the sample.
        if not isinstance(path, str) or path.startswith(("data:", "http://", "https://")):
            return item
        if self.folder is not None:
            return str(self.folder / path)
        # A path in a data set of the Hub would read a file of this machine, which its author may choose.
        if not is_file:
            raise ValueError(f"row {index}, key {column!r}: {path!r} is a path, but a Hub data set carries its files")
        return item


def load_rows(source: str | os.PathLike[str], split: str = "train") -> RowDataset:
    """The rows of `source`, the first of them checked.

    Args:
        source: a .jsonl, .json or .parquet file; a folder with `{split}.jsonl` and so on, or one that
            `Dataset.save_to_disk` wrote; or the id of a data set on the Hub.
        split: which part, where `source` has several.

    Raises:
        FileNotFoundError: a path that is not there, or a folder without such a split.
        ValueError: a row that cannot be trained on, by its number and key.
    """
    import datasets

    path = Path(source)
    if path.is_dir() and ((path / "state.json").is_file() or (path / "dataset_dict.json").is_file()):
        table, folder = datasets.load_from_disk(str(path)), path
        table = table[split] if isinstance(table, datasets.DatasetDict) else table
    elif path.exists():
        files = _data_files(path, split)
        table = datasets.load_dataset(FORMATS[files[0].suffix], data_files=[str(f) for f in files], split="train")
        folder = files[0].parent
    # A misspelt path must not be asked for on the Hub.
    elif path.suffix in FORMATS or path.is_absolute() or str(source).startswith("."):
        raise FileNotFoundError(f"no data at {str(source)!r}")
    else:
        table, folder = datasets.load_dataset(str(source), split=split), None
    rows = RowDataset(_undecoded(table), folder)
    check_rows(rows, str(source))
    return rows


def _data_files(path: Path, split: str) -> list[Path]:
    """The file itself, or the files of a folder that hold the split (`train.jsonl`, `train-00000-of-00002.parquet`)."""
    if path.is_file():
        if path.suffix not in FORMATS:
            raise ValueError(f"{str(path)!r} has an unknown suffix; known are {', '.join(FORMATS)}")
        return [path]
    named = (path / f"{split}{suffix}" for suffix in FORMATS)
    files = [file for file in named if file.is_file()][:1] or sorted(path.glob(f"{split}-*.parquet"))
    if not files:
        raise FileNotFoundError(f"the folder {str(path)!r} has no {split}.jsonl, {split}.json or {split}*.parquet")
    return files


def _undecoded(table: Any) -> Any:
    """The table with every image and audio feature as undecoded files: no ffmpeg or torchcodec is needed."""
    from datasets import Audio, Image, List

    for column in set(MEDIA_KINDS) & set(table.features):
        feature = table.features[column]
        inner = feature.feature if isinstance(feature, List) else feature
        if isinstance(inner, Audio | Image):
            # Decoding belongs to the processor, which applies its limits first.
            plain = type(inner)(decode=False)
            table = table.cast_column(column, List(plain) if isinstance(feature, List) else plain)
    return table


def check_rows(rows: RowDataset, source: str) -> None:
    """Check the first rows, so that a mistake in the format shows before a model is loaded.

    Raises:
        ValueError: naming the source, the row, the key and what is wrong.
    """
    if len(rows) == 0:
        raise ValueError(f"{source}: there are no rows")
    for index in range(min(len(rows), CHECKED_ROWS)):
        if problem := find_problem(rows[index]):
            raise ValueError(f"{source}, row {index}, {problem}")


def find_problem(row: Mapping[str, Any]) -> str | None:
    """What is wrong with a row, in words that begin with the key; None if it can be trained on."""
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        return f"key 'messages': expected a list of turns, found {messages!r:.60}"
    wanted = dict.fromkeys(MEDIA_KINDS, 0)
    for number, message in enumerate(messages):
        where = f"key 'messages', turn {number}"
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            return f"{where}: expected a 'role' and a 'content', found {message!r:.60}"
        content = message.get("content")
        if not isinstance(content, str | list):
            return f"{where}, 'content': expected a text or a list of parts, found {content!r:.60}"
        for part in content if isinstance(content, list) else []:
            kind = part.get("type") if isinstance(part, Mapping) else "text"
            if kind not in ("text", *MEDIA_KINDS.values()):
                return f"{where}, 'content': unknown part {part!r:.60}; the types are text, image and audio"
            for column, medium in MEDIA_KINDS.items():
                # Arrow fills missing keys with None, and `sampling_rate` describes data without being any.
                has_data = isinstance(part, Mapping) and any(
                    value is not None for key, value in part.items() if key not in ("type", "sampling_rate")
                )
                wanted[column] += kind == medium and not has_data
    if not any(message["role"] == "assistant" for message in messages):
        return "key 'messages': no turn has the role 'assistant', so there is nothing to learn"
    for column, count in wanted.items():
        items = row.get(column) or []
        if len(items) != count:
            return f"key {column!r}: {len(items)} items for {count} {MEDIA_KINDS[column]} parts in 'messages'"
    for column in MEDIA_KINDS:
        for number, item in enumerate(row.get(column) or []):
            path = item if isinstance(item, str) else None
            if path and not path.startswith(("data:", "http")) and not os.path.isfile(path):
                return f"key {column!r}, item {number}: no such file {path!r}"
    return None
