"""Rows whose text, image and clip belong together, at least two of the three.

Such a row has `text` (or `caption`), `image` and `audio`; of rows with messages the text is the last turn of the
assistant. All rows of a data set have the same modalities, since each is a negative for the others.
"""

import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from chorus_moe.processors.processing_media import MEDIA
from chorus_moe.training.data import CHECKED_ROWS, RowDataset, read_source
from chorus_moe.training.evaluate import text_of
from chorus_moe.training.features.rows import is_cache
from chorus_moe.training.layouts import LAYOUTS, MEDIA_COLUMNS, LayoutError, standard_row

TEXT_COLUMNS = ("text", "caption")
MODALITIES = ("text", *MEDIA)


class PairDataset(RowDataset):
    """Rows of a table as `{"text": str, "image": item, "audio": item}`, without what they lack.

    A row that cannot be read, or has other modalities than the first, holds a LayoutError under `error`, which the
    collator raises or skips. Arguments are those of [`RowDataset`].
    """

    @cached_property
    def modalities(self) -> tuple[str, ...]:
        """Those of the first row."""
        return tuple(pair_of(self.table[0], self.columns, self.markers))

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            row = pair_of(self.table[int(index)], self.columns, self.markers)
            if tuple(row) != self.modalities:
                raise LayoutError(
                    f"a pair of {' and '.join(row)}, the first row has {' and '.join(self.modalities)}; rows of one "
                    "data set have the same modalities"
                )
        except LayoutError as error:
            return {"error": LayoutError(f"row {index}, {error}")}
        media = {name: self._resolve(row[name], f"row {index}, key {name!r}") for name in MEDIA if name in row}
        return row | media


def load_pairs(
    source: str | os.PathLike[str],
    split: str = "train",
    *,
    columns: Mapping[str, str] | None = None,
    media_markers: str = "media",
    media_folder: str | os.PathLike[str] | None = None,
    documents: bool = False,
) -> PairDataset:
    """The rows of pairs of `source`, the first of them checked. Arguments are those of `load_rows`; `columns` may name
    the column of the text, as in `{"text": "sentence"}`.

    Raises:
        FileNotFoundError: a path that is not there, or a folder without such a split.
        ValueError: cached features; a row that is no pair, by its number and key, or has other modalities than the
            first.
    """
    if documents:
        raise ValueError(f"{source}: data.documents is for rows whose text is learned, not for pairs")
    if is_cache(Path(source)):
        raise ValueError(f"{source}: cached features stand in conversations, not in pairs; give the rows themselves")
    table, folder = read_source(source, split)
    rows = PairDataset(table, folder if media_folder is None else Path(media_folder), columns, media_markers)
    if len(rows) == 0:
        raise ValueError(f"{source}: there are no rows")
    for index in range(min(len(rows), CHECKED_ROWS)):
        row = rows[index]
        if "error" in row:
            raise ValueError(f"{source}, {row['error']}")
        for name in MEDIA:
            path = row.get(name)
            if isinstance(path, str) and not path.startswith(("data:", "http")) and not os.path.isfile(path):
                raise ValueError(f"{source}, row {index}, key {name!r}: no such file {path!r}")
    return rows


def pair_of(row: Mapping[str, Any], columns: Mapping[str, str] | None = None, markers: str = "media") -> dict[str, Any]:
    """What of a row belongs together, by modality, in the order of `MODALITIES`. A pair stays as it is.

    Raises:
        LayoutError: fewer than two modalities, several images or clips, or what `standard_row` refuses.
    """
    if isinstance(row.get("error"), LayoutError):
        raise row["error"]
    columns = dict(columns or {})
    named = columns.pop("text", None)
    layouts = [[columns.get(name, name) for name in names] for names in LAYOUTS]
    is_chat = named is None and any(all(row.get(name) is not None for name in names) for names in layouts)
    text, plain = _chat_text(row, columns, markers) if is_chat else _caption(row, named, columns)
    found = {"text": text} if text and text.strip() else {}
    for name, medium in MEDIA.items():
        items = plain[medium.column]
        if len(items) > 1:
            raise LayoutError(f"key {medium.column!r}: {len(items)} {medium.plural}; a pair has one at most")
        if items:
            found[name] = items[0]
    if len(found) < 2:
        raise LayoutError(
            f"key {'messages' if is_chat else 'text'!r}: a pair needs two of {', '.join(MODALITIES)}, found "
            f"{' and '.join(found) or 'none'}; the row has {sorted(row)}. A column of another name is given by "
            "data.columns, as in {text: sentence}"
        )
    return found


def _caption(
    row: Mapping[str, Any], named: str | None, columns: Mapping[str, str]
) -> tuple[str | None, dict[str, Any]]:
    """The text of a row without turns, and the row with its media in lists."""
    texts = [named] if named else [name for name in TEXT_COLUMNS if row.get(name) is not None]
    if len(texts) > 1:
        raise LayoutError(
            f"keys {texts[0]!r} and {texts[1]!r} both hold a text; data.columns says which, as in {{text: caption}}"
        )
    text = row.get(texts[0]) if texts else None
    if text is not None and not isinstance(text, str) or (named and named not in row):
        raise LayoutError(f"key {texts[0]!r}: expected a text, found {text!r:.60}; the row has {sorted(row)}")
    # One home for the names and forms of media columns: the row as an answer that shows them.
    known = {*columns.values(), *(name for names in MEDIA_COLUMNS.values() for name in names)}
    media = {name: value for name, value in row.items() if name in known}
    turns = [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}]
    return text, standard_row({**media, "messages": turns}, columns, "text")


def _chat_text(row: Mapping[str, Any], columns: Mapping[str, str], markers: str) -> tuple[str | None, dict[str, Any]]:
    """The assistant's last words in a row with turns, and the row in our layout."""
    plain = standard_row(row, columns, markers)
    turns = [turn for turn in plain["messages"] if isinstance(turn, Mapping)]
    contents = [turn["content"] for turn in turns if isinstance(turn.get("content"), list)]
    parts = [part.get("type") for content in contents for part in content if isinstance(part, Mapping)]
    for name, medium in MEDIA.items():
        if parts.count(name) != len(plain[medium.column]):
            raise LayoutError(
                f"key {medium.column!r}: {len(plain[medium.column])} items for {parts.count(name)} {name} parts in "
                "'messages'; the media of a pair stand in their column"
            )
    answers = [turn for turn in turns if turn.get("role") == "assistant"]
    return (text_of(answers[-1]) if answers else None), plain
