"""Training data that are read while the model trains: Parquet and JSON files, WebDataset shards, folders of media.

Unusual here:
- one pass follows another without an end, each in an order of its own; `max_steps` ends the run;
- a resumed run reads the rows that were learned again, and does nothing with them: a buffer of shuffled rows cannot be
  continued in any other way with the same rows in the same order;
- the order does not depend on the number of workers. Each reads all rows and prepares its share of the batches.
"""

import json
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.utils.data import IterableDataset, get_worker_info

from chorus_moe.training.checkpoints import STATE
from chorus_moe.training.data import (
    CHECKED_ROWS,
    FORMATS,
    SKIPPED,
    RowDataset,
    RowReader,
    check_rows,
    data_files,
    load_rows,
    undecoded,
)
from chorus_moe.training.layouts import LayoutError
from chorus_moe.training.loading import is_remote
from chorus_moe.training.objectives.served import check_served
from chorus_moe.training.recipe import DataArguments, Recipe, RunArguments

if TYPE_CHECKING:
    import datasets

SHARD = ".tar"
# Of a stream, whether any row has what an objective needs.
SEARCHED_ROWS = 1000
KEYS_OF_SHARDS = ("__key__", "__url__")
# Column -> suffixes of its files.
SUFFIXES = {
    "images": {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"},
    "audio": {".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a"},
}


class StreamedRows(RowReader, IterableDataset):
    """The rows of a stream, again and again, see `RowReader`.

    Args:
        batch: rows that all ranks take together, before the next ones.
        seed, buffer: of the shuffled order; 1 is the order of the files.
        is_sharded: rows of WebDataset shards, whose columns are named by the suffixes of files.
    """

    def __init__(
        self,
        table: "datasets.IterableDataset",
        folder: Path | None,
        *,
        batch: int,
        seed: int,
        buffer: int,
        is_sharded: bool = False,
        **options: Any,
    ):
        super().__init__(folder, **options)
        self.table, self.batch, self.is_sharded = table, batch, is_sharded
        self.shuffled = table.shuffle(seed=seed, buffer_size=buffer) if buffer > 1 else table
        # Rows that a resumed run has learned.
        self.start = 0

    def head(self, number: int) -> Iterator[dict[str, Any]]:
        """The first rows in the order of the files, each once."""
        return (self.read(values, index) for index, values in enumerate(self.plain_head(number)))

    def plain_head(self, number: int) -> Iterator[Mapping[str, Any]]:
        """As `head`, before rows are read as ours."""
        return (self._plain(values) for values in self.table.take(number))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        for place, (index, values) in enumerate(self._passes()):
            if place // self.batch % workers == number:
                yield SKIPPED if place < self.start else self.read(self._plain(values), index)

    def _passes(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        for number in count():
            self.shuffled.set_epoch(number)
            is_empty = True
            # Not `iter(self.shuffled)`: in a worker, `datasets` would read a part of the files only.
            for index, batch in enumerate(self.shuffled.iter(batch_size=1)):
                is_empty = False
                yield index, {name: column[0] for name, column in batch.items()}
            if is_empty:
                raise ValueError("the streamed data have no rows any more")

    def _plain(self, values: Mapping[str, Any]) -> Mapping[str, Any]:
        return from_shard(values) if self.is_sharded else values


def from_shard(values: Mapping[str, Any]) -> dict[str, Any]:
    """The row of a WebDataset sample, whose columns are suffixes of files: `txt` is `text`, pictures and clips are
    `images` and `audio`, and what a `json` holds is columns."""
    row: dict[str, Any] = {}
    for name, value in values.items():
        # Another sample of the shard has such a file.
        if value is None or name in KEYS_OF_SHARDS:
            continue
        suffix = "." + name.rpartition(".")[2].lower()
        column = next((column for column, known in SUFFIXES.items() if suffix in known), None)
        found = value if suffix == ".json" and isinstance(value, Mapping) else {"text": value}
        if column is not None:
            row[column] = [*row.get(column, []), value]
        elif suffix in (".json", ".txt"):
            if twice := next((key for key in found if key in row), None):
                return {"error": LayoutError(f"key {name!r}: {twice!r} is in another file of the sample too")}
            row |= found
        else:
            row[name] = value
    return row


def training_rows(recipe: Recipe) -> RowDataset | StreamedRows:
    """The training data of a recipe.

    Raises:
        ValueError: there are none; as `load_rows` and `stream_rows`; or no row has what an objective needs.
    """
    data = recipe.data
    if data.train_data is None:
        raise ValueError("data.train_data is missing: a file, a folder or a Hub id")
    if data.streaming:
        rows = stream_rows(data, recipe.training)
        check_served(recipe.objectives, rows.head(SEARCHED_ROWS), f"the first {SEARCHED_ROWS:,} rows")
        return rows
    table = load_rows(data.train_data, data.train_split, **data.to_options())
    check_served(recipe.objectives, table, f"the {len(table):,} rows")
    return table


def stream_rows(data: DataArguments, arguments: RunArguments) -> StreamedRows:
    """The training data of a recipe as a stream, its first rows checked.

    Its source is a .jsonl, .json, .parquet or .tar file; a folder with `{split}.jsonl`, `{split}-*.parquet` or
    `{split}-*.tar` (or shards named by numbers alone), or of images or sound, in `{split}/` or in itself; or the id of
    a data set on the Hub.

    Raises:
        FileNotFoundError: a path that is not there, or a folder with none of these.
        ValueError: no `max_steps`, which alone can end a stream; a buffer below 1; a row that cannot be trained on.
    """
    source = str(data.train_data)
    if arguments.max_steps <= 0:
        raise ValueError("data.streaming: a stream has no length, so training.max_steps must say how long to train")
    if data.shuffle_buffer < 1:
        raise ValueError(f"data.shuffle_buffer must be 1 or more, found {data.shuffle_buffer}")
    options = data.to_options()
    media_folder = options.pop("media_folder")
    table, folder, is_sharded = _open(source, data.train_split)
    rows = StreamedRows(
        undecoded(table),
        folder if media_folder is None else Path(media_folder),
        batch=arguments.train_batch_size * arguments.world_size,
        seed=arguments.seed if arguments.data_seed is None else arguments.data_seed,
        buffer=data.shuffle_buffer,
        is_sharded=is_sharded,
        columns=options["columns"],
        markers=options["media_markers"],
        documents=options["documents"],
    )
    check_rows(list(rows.head(CHECKED_ROWS)), source)
    if arguments.process_index == 0 and (found := rows.explain(rows.plain_head(CHECKED_ROWS))):
        print(f"{source}: {found}", file=sys.stderr)
    # The Trainer's dispatcher would cut the images of a batch by its rows.
    arguments.accelerator_config.dispatch_batches = False
    return rows


def skip_learned(rows: StreamedRows, checkpoint: str, arguments: RunArguments) -> None:
    """Let a stream begin where a checkpoint ended."""
    if arguments.ignore_data_skip:
        return
    step = json.loads((Path(checkpoint) / STATE).read_text(encoding="utf-8"))["global_step"]
    rows.start = step * rows.batch * arguments.gradient_accumulation_steps


def _open(source: str, split: str) -> tuple["datasets.IterableDataset", Path | None, bool]:
    """A stream, where its relative paths begin, and whether it is of shards."""
    import datasets
    from datasets.packaged_modules.audiofolder.audiofolder import AudioFolder
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
    from datasets.packaged_modules.webdataset.webdataset import WebDataset

    path = Path(source)
    if not path.exists():
        # A misspelt path must not be asked for on the Hub.
        if path.suffix in (*FORMATS, SHARD) or not is_remote(source):
            raise FileNotFoundError(f"no data at {source!r}")
        table = datasets.load_dataset(source, split=split, streaming=True)
        return table, None, "__key__" in (table.column_names or ())
    if shards := _shards(path, split):
        return _stream(WebDataset, shards), None, True
    media = {ImageFolder: SUFFIXES["images"], AudioFolder: SUFFIXES["audio"]}
    folder = path / split if (path / split).is_dir() else path
    found = {kind: _below(folder, suffixes) for kind, suffixes in media.items()} if path.is_dir() else {}
    try:
        files = data_files(path, split)
    except FileNotFoundError as error:
        if not any(found.values()):
            raise FileNotFoundError(f"{error}, no {split}-*{SHARD}, and no images or sound") from error
        if all(found.values()):
            raise ValueError(
                f"{str(folder)!r} holds {len(found[ImageFolder])} images and {len(found[AudioFolder])} clips, and "
                f"nothing says which belong together; write a {split}.jsonl that names them"
            ) from error
        kind = next(kind for kind, files in found.items() if files)
        named = [*found[kind], *_below(folder, {".jsonl", ".csv"})]
        return _stream(kind, named, drop_labels=True), folder, False
    read = datasets.Dataset.from_parquet if files[0].suffix == ".parquet" else datasets.Dataset.from_json
    return read([str(file) for file in files], streaming=True), files[0].parent, False


def _stream(kind: type["datasets.DatasetBuilder"], files: Sequence[Path], **options: Any) -> "datasets.IterableDataset":
    """A stream of files by a reader of `datasets`, without the network."""
    builder = kind(data_files={"train": [str(file) for file in files]}, **options)
    return builder.as_streaming_dataset(split="train")


def _shards(path: Path, split: str) -> list[Path]:
    if path.is_file():
        return [path] if path.suffix == SHARD else []
    named = [file for file in path.glob(f"*{SHARD}") if file.stem == split or file.stem.startswith(f"{split}-")]
    return sorted(named or (file for file in path.glob(f"*{SHARD}") if file.stem.isdecimal()))


def _below(folder: Path, suffixes: Collection[str]) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in suffixes)
