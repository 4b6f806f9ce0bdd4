"""Rows of training data from a local file or folder, or from the Hub, with undecoded media.

A row has `messages` (chat turns), `images` and `audio` (lists; may be missing); `layouts` reads those of other projects
as such rows. In local data a media item is a path below the data file's folder, and rows may name no file elsewhere:
who wrote the data set would otherwise choose which files of this machine are read. In Parquet files and on the Hub it
may be the file itself. Nothing is decoded here: the processor decodes within its limits.
"""

import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import unquote

from torch.utils.data import Dataset

from chorus_moe.processors.processing_media import MEDIA
from chorus_moe.processors.processing_messages import MEDIA_KEYS
from chorus_moe.training.features.rows import is_cache, read_facts, read_row, read_table
from chorus_moe.training.layouts import AS_DOCUMENTS, DOCUMENT, TASK, LayoutError, explain, is_learned, standard_row
from chorus_moe.training.loading import is_remote

if TYPE_CHECKING:
    import datasets

    Table = TypeVar("Table", datasets.Dataset, datasets.IterableDataset)

# Column of a table -> the type of the parts that its items belong to.
MEDIA_KINDS = {row.column: name for name, row in MEDIA.items()}
FORMATS = (".jsonl", ".json", ".parquet")
# Keys of a part whose text may be the path of a file.
PATH_KEYS = {key for row in MEDIA.values() for key in row.keys} - {"base64", "bytes", "array"} | {
    "image_url",
    "audio_url",
}
# Enough to see a wrong format. All rows would mean to read the whole data set before the first step.
CHECKED_ROWS = 16
# In a stream, in the place of a row that a resumed run has learned.
SKIPPED: dict[str, Any] = {"skipped": True}


def local_path(item: str | os.PathLike[str]) -> str:
    """The path of a file, also from its `file://` address, which writes a blank as %20."""
    path = os.fspath(item)
    return unquote(path[7:]) if path.startswith("file://") else path


class RowReader:
    """Reads rows of a table in our layout. Relative media paths are resolved against `folder`; None for tables from the
    Hub.

    A row that cannot be read holds a LayoutError under `error`, which the collator raises or skips.

    Args:
        columns: our name of a column -> its name in the table.
        markers, documents: what `<image>` and `<audio>` in a string are, and which rows are documents, see
            `layouts.convert`.
    """

    def __init__(
        self,
        folder: Path | None,
        columns: Mapping[str, str] | None = None,
        markers: str = "media",
        documents: bool = False,
    ):
        self.folder = folder
        self.columns = columns
        self.markers = markers
        self.documents = documents

    def read(self, values: Mapping[str, Any], index: int) -> dict[str, Any]:
        """The row of these values; `index` is what errors call it."""
        try:
            row = standard_row(values, self.columns, self.markers, self.documents)
        except LayoutError as error:
            return {"messages": [], "error": LayoutError(f"row {index}, {error}")}
        for column in MEDIA_KINDS:
            row[column] = [self._resolve(item, f"row {index}, key {column!r}") for item in row.get(column) or []]
        row["messages"] = [self._with_paths(turn, f"row {index}, key 'messages'") for turn in row["messages"]]
        return row

    def explain(self, rows: Iterable[Mapping[str, Any]]) -> str:
        """What was recognised in rows of a table, in a line."""
        return explain(rows, self.columns, self.markers, self.documents)

    def _with_paths(self, turn: Any, where: str) -> Any:
        """A turn whose parts name media by resolved paths."""
        if not isinstance(turn, Mapping) or not isinstance(turn.get("content"), list | tuple):
            return turn
        return {**turn, "content": [self._part_with_paths(part, where) for part in turn["content"]]}

    def _part_with_paths(self, part: Any, where: str) -> Any:
        if not isinstance(part, Mapping) or part.get("type") == "text":
            return part
        found = dict(part)
        # `base64` is data in words; every other text may be a path.
        for key, value in part.items():
            if key in PATH_KEYS and isinstance(value, Mapping) and isinstance(value.get("url"), str):
                found[key] = {**value, "url": self._resolve(value["url"], where)}
            elif key in PATH_KEYS and isinstance(value, str | Mapping):
                found[key] = self._resolve(value, where)
        return found

    def _resolve(self, item: Any, where: str) -> Any:
        """A path below the folder in place of one in the data; anything else as it is.

        Raises:
            ValueError: a path outside the folder, or any in a table from the Hub.
        """
        is_file = isinstance(item, Mapping) and item.get("bytes") is None and item.get("path") is not None
        path = item["path"] if is_file else item
        # Web addresses pass here and are refused by the processor, which names the sample.
        if not isinstance(path, str) or path.startswith(("data:", "http://", "https://")):
            return item
        if self.folder is None:
            # A path in a data set of the Hub would read a file of this machine, which its author may choose.
            if is_file:
                return item
            raise ValueError(f"{where}: {path!r} is a path, but a Hub data set carries its files")
        folder = self.folder.resolve()
        # Links are followed first: a data set may bring one that leads elsewhere.
        found = (folder / local_path(path)).resolve()
        if not found.is_relative_to(folder):
            raise ValueError(
                f"{where}: {path!r} lies outside {str(folder)!r}; rows may name files below that folder only, which "
                "data.media_folder sets"
            )
        return str(found)


class RowDataset(RowReader, Dataset):
    """The rows of a table, see `RowReader`."""

    def __init__(
        self,
        table: "datasets.Dataset",
        folder: Path | None,
        columns: Mapping[str, str] | None = None,
        markers: str = "media",
        documents: bool = False,
    ):
        super().__init__(folder, columns, markers, documents)
        self.table = table

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.read(self.table[int(index)], index)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    def tasks(self) -> list[Any]:
        """The `task` of every row, None where it has none; no other column is read."""
        column = (self.columns or {}).get(TASK, TASK)
        return list(self.table[column]) if column in self.table.column_names else [None] * len(self)


class FeatureRows(RowDataset):
    """Rows that `cache-features` has written, for `FeatureCollator`: features of frozen towers in the place of media.

    Raises:
        ValueError: no such split, or a file that is not whole.
    """

    def __init__(self, folder: Path, split: str):
        self.facts = read_facts(folder)
        super().__init__(read_table(folder, split, self.facts), folder)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return read_row(self.table[int(index)], self.facts)


def load_rows(
    source: str | os.PathLike[str],
    split: str = "train",
    *,
    columns: Mapping[str, str] | None = None,
    media_markers: str = "media",
    media_folder: str | os.PathLike[str] | None = None,
    documents: bool = False,
) -> RowDataset:
    """The rows of `source`, the first of them checked. Local files are read without a network.

    Says on standard error what was recognised in rows of another project's layout.

    Args:
        source: a .jsonl, .json or .parquet file; a folder with `{split}.jsonl` and so on, or one that
            `Dataset.save_to_disk` or `cache-features` wrote; or the id of a data set on the Hub.
        split: which part, where `source` has several.
        columns: our name of a column -> its name in the data, such as `{"messages": "dialogue"}`.
        media_markers: what `<image>` and `<audio>` in a string are: the places of "media", or "text".
        media_folder: where relative media paths begin, and the only folder whose files rows may name; that of the
            data file if None.
        documents: rows of `text`, of media alone, and of one turn that is not the assistant's are documents, whose
            whole text is learned.

    Raises:
        FileNotFoundError: a path that is not there, or a folder without such a split.
        ValueError: a row that cannot be trained on, by its number and key.
    """
    path = Path(source)
    if is_cache(path):
        if columns or media_folder is not None or media_markers != "media" or documents:
            raise ValueError(
                f"{source}: columns, media_markers, media_folder and documents were read when features were cached; "
                "leave them out"
            )
        return FeatureRows(path, split)
    table, folder = read_source(source, split)
    folder = folder if media_folder is None else Path(media_folder)
    rows = RowDataset(table, folder, columns, media_markers, documents)
    check_rows([rows[i] for i in range(min(len(rows), CHECKED_ROWS))], str(source))
    found = rows.explain(rows.table[i] for i in range(min(len(rows), CHECKED_ROWS)))
    if found:
        print(f"{source}: {len(rows):,} rows; {found}", file=sys.stderr)
    return rows


def read_source(source: str | os.PathLike[str], split: str) -> tuple["datasets.Dataset", Path | None]:
    """The table of `load_rows` with undecoded media, and the folder where its paths begin; None from the Hub."""
    import datasets

    path = Path(source)
    folder: Path | None
    if path.is_dir() and ((path / "state.json").is_file() or (path / "dataset_dict.json").is_file()):
        table, folder = datasets.load_from_disk(str(path)), path
        if isinstance(table, datasets.DatasetDict):
            if split not in table:
                raise ValueError(f"{str(source)!r} has no split {split!r}; it has {', '.join(table)}")
            table = table[split]
    elif path.exists():
        files = data_files(path, split)
        # `load_dataset` would count the download of its reader, over the network.
        read = datasets.Dataset.from_parquet if files[0].suffix == ".parquet" else datasets.Dataset.from_json
        try:
            table, folder = read([str(f) for f in files]), files[0].parent
        # The reason is the cause: the error itself says only that generating the data set failed.
        except (datasets.exceptions.DatasetGenerationError, ValueError) as error:
            names = ", ".join(map(str, files))
            raise ValueError(f"{names}: no readable {files[0].suffix} file: {error.__cause__ or error}") from error
    # A misspelt path must not be asked for on the Hub.
    elif path.suffix in FORMATS or not is_remote(str(source)):
        raise FileNotFoundError(f"no data at {str(source)!r}")
    else:
        table, folder = datasets.load_dataset(str(source), split=split), None
    return undecoded(table), folder


def data_files(path: Path, split: str) -> list[Path]:
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


def undecoded(table: "Table") -> "Table":
    """The table with every image and audio feature as undecoded files: no ffmpeg or torchcodec is needed."""
    from datasets import Audio, Image, List

    # A stream of JSON does not know its columns.
    for column in table.features or ():
        feature = table.features[column]
        inner = feature.feature if isinstance(feature, List) else feature
        if isinstance(inner, Audio | Image):
            # Decoding belongs to the processor, which applies its limits first.
            plain = type(inner)(decode=False)
            table = table.cast_column(column, List(plain) if isinstance(feature, List) else plain)
    return table


def check_rows(rows: Sequence[Mapping[str, Any]], source: str) -> None:
    """Check rows, the first ones of a source, so that a mistake in the format shows before a model is loaded.

    Raises:
        ValueError: naming the source, the row, the key and what is wrong.
    """
    if len(rows) == 0:
        raise ValueError(f"{source}: there are no rows")
    for index, row in enumerate(rows):
        if problem := find_problem(row):
            raise ValueError(f"{source}, row {index}, {problem}")


def find_problem(row: Mapping[str, Any]) -> str | None:
    """What is wrong with a row, in words that begin with the key; None if it can be trained on."""
    if row.get("error") is not None:
        # Without the number, which whoever asks knows.
        return str(row["error"]).partition(", ")[2]
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        return f"key 'messages': expected a list of turns, found {messages!r:.60}"
    wanted = dict.fromkeys(MEDIA_KINDS, 0)
    for number, message in enumerate(messages):
        where = f"key 'messages', turn {number}"
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            return f"{where}: expected a 'role' and a 'content', found {message!r:.60}"
        if beside := [key for key in MEDIA_KEYS if message.get(key)]:
            return f"{where}, {beside[0]!r}: media are parts of the content, or columns of the row"
        content = message.get("content")
        if not isinstance(content, str | list):
            return f"{where}, 'content': expected a text or a list of parts, found {content!r:.60}"
        for part in content if isinstance(content, list) else []:
            kind = part.get("type") if isinstance(part, Mapping) else "text"
            if kind not in ("text", *MEDIA_KINDS.values(), "image_url", "audio_url", "input_audio"):
                return f"{where}, 'content': unknown part {part!r:.60}; the types are text, image and audio"
            for column, medium in MEDIA_KINDS.items():
                # Arrow fills missing keys with None, and `sampling_rate` describes data without being any.
                has_data = isinstance(part, Mapping) and any(
                    value is not None for key, value in part.items() if key not in ("type", "sampling_rate")
                )
                wanted[column] += kind == medium and not has_data
    roles = [message["role"] for message in messages]
    if DOCUMENT in roles and len(roles) > 1:
        return f"key 'messages': a document is a row of one turn, found {len(roles)}"
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers and DOCUMENT not in roles:
        return f"key 'messages': no turn has the role 'assistant', so there is nothing to learn, {AS_DOCUMENTS}"
    try:
        if answers and not any(map(is_learned, answers)):
            return "key 'messages': every turn of the assistant is left out of learning"
    except LayoutError as error:
        return f"key 'messages': {error}"
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
