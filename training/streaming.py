"""Training data that are read while the model trains: Parquet and JSON files, WebDataset shards, folders of media.

Unusual here:
- one pass follows another without an end, each in an order of its own; `max_steps` ends the run;
- a resumed run reads the rows that were learned again, and does nothing with them: a buffer of shuffled rows cannot be
  continued in any other way with the same rows in the same order;
- the order does not depend on the number of workers. Each reads all rows and prepares its share of the batches.
"""

import json
import sys
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import count, groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from chorus_moe.training.checkpoints import STATE
from chorus_moe.training.contrast.setup import is_contrastive, reader_of
from chorus_moe.training.data import (
    CHECKED_ROWS,
    FORMATS,
    SKIPPED,
    RowDataset,
    RowReader,
    check_rows,
    data_files,
    undecoded,
)
from chorus_moe.training.layouts import LayoutError
from chorus_moe.training.loading import is_remote
from chorus_moe.training.objectives.served import check_served
from chorus_moe.training.recipe import DataArguments, Recipe, RunArguments
from chorus_moe.training.scale.ranks import num_data_ranks

if TYPE_CHECKING:
    import datasets

SHARD = ".tar"
# Of a stream, whether any row has what an objective needs.
SEARCHED_ROWS = 1000
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
    """

    def __init__(
        self,
        table: "datasets.IterableDataset",
        folder: Path | None,
        *,
        batch: int,
        seed: int,
        buffer: int,
        **options: Any,
    ):
        super().__init__(folder, **options)
        self.table, self.batch, self.seed, self.buffer = table, batch, seed, buffer
        # Rows that a resumed run has learned.
        self.start = 0

    def head(self, number: int) -> Iterator[dict[str, Any]]:
        """The first rows in the order of the files, each once."""
        return (self.read(values, index) for index, values in enumerate(self.table.take(number)))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        for place, (index, values) in enumerate(self._passes()):
            if place // self.batch % workers == number:
                yield SKIPPED if place < self.start else self.read(values, index)

    def _passes(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        for number in count():
            is_empty = True
            # Not `iter(rows)`: in a worker, `datasets` would read a part of the files only.
            for index, batch in enumerate(self._shuffled(number).iter(batch_size=1)):
                is_empty = False
                yield index, {name: column[0] for name, column in batch.items()}
            if is_empty:
                raise ValueError("the streamed data have no rows any more")

    def _shuffled(self, number: int) -> "datasets.IterableDataset":
        """The rows in the order of a pass."""
        if self.buffer == 1:
            return self.table
        # Not by `set_epoch`: `datasets` keeps the epoch in memory that all workers share; each would set the others'.
        return self.table.shuffle(generator=np.random.default_rng((self.seed, number)), buffer_size=self.buffer)


def training_rows(recipe: Recipe) -> RowDataset | StreamedRows:
    """The training data of a recipe.

    Raises:
        ValueError: there are none; as `load_rows` and `stream_rows`; or no row has what an objective needs.
    """
    data = recipe.data
    if data.train_data is None:
        raise ValueError("data.train_data is missing: a file, a folder or a Hub id")
    if data.streaming:
        if is_contrastive(recipe):
            raise ValueError("data.streaming: model.head: contrastive reads pairs from a table; leave it out")
        rows = stream_rows(data, recipe.training)
        check_served(recipe.objectives, rows.head(SEARCHED_ROWS), f"the first {SEARCHED_ROWS:,} rows")
        return rows
    table = reader_of(recipe)(data.train_data, data.train_split, **data.to_options())
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
    table, folder = _open(source, data.train_split)
    rows = StreamedRows(
        undecoded(table),
        folder if media_folder is None else Path(media_folder),
        batch=arguments.train_batch_size * num_data_ranks(arguments),
        seed=arguments.seed if arguments.data_seed is None else arguments.data_seed,
        buffer=data.shuffle_buffer,
        columns=options["columns"],
        markers=options["media_markers"],
        documents=options["documents"],
    )
    check_rows(list(rows.head(CHECKED_ROWS)), source)
    if arguments.process_index == 0 and (found := rows.explain(rows.table.take(CHECKED_ROWS))):
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


def _open(source: str, split: str) -> tuple["datasets.IterableDataset", Path | None]:
    """A stream, and where its relative paths begin."""
    import datasets

    path = Path(source)
    if not path.exists():
        # A misspelt path must not be asked for on the Hub.
        if path.suffix in (*FORMATS, SHARD) or not is_remote(source):
            raise FileNotFoundError(f"no data at {source!r}")
        return datasets.load_dataset(source, split=split, streaming=True), None
    # Not by the builders of `datasets`: they want torchcodec for sound, and the same files in every sample of a shard.
    if shards := _shards(path, split):
        table = datasets.IterableDataset.from_generator(read_shards, gen_kwargs={"shards": shards})
        return table, path if path.is_dir() else path.parent
    try:
        files = data_files(path, split)
    except FileNotFoundError as error:
        folder = path / split if (path / split).is_dir() else path
        items = _media_below(folder, split)
        if not items:
            raise FileNotFoundError(f"{error}, no {split}-*{SHARD}, and no images or sound") from error
        return datasets.IterableDataset.from_generator(read_items, gen_kwargs={"items": items}), folder
    read = datasets.Dataset.from_parquet if files[0].suffix == ".parquet" else datasets.Dataset.from_json
    return read([str(file) for file in files], streaming=True), files[0].parent


def read_items(items: Sequence[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    """Rows of one file each: column and path."""
    return ({column: [path]} for column, path in items)


def read_shards(shards: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The samples of WebDataset shards: neighbouring files whose names are the same up to the first dot.

    Raises:
        ValueError: naming a shard that cannot be read.
    """
    for shard in shards:
        try:
            with tarfile.open(shard) as tar:
                members = (member for member in tar if member.isfile() and not Path(member.name).name.startswith("."))
                for _, files in groupby(members, key=lambda member: _split_name(member.name)[0]):
                    yield sample_of({_split_name(file.name)[1]: _read(tar, file) for file in files})
        except (tarfile.TarError, EOFError) as error:
            raise ValueError(f"{shard}: no readable shard: {error}") from error


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None  # members are plain files
    return file.read()


def _split_name(name: str) -> tuple[str, str]:
    """`a/0001.left.png` -> `a/0001`, `left.png`."""
    folder, slash, file = name.rpartition("/")
    key, _, suffix = file.partition(".")
    return folder + slash + key, suffix


def sample_of(files: Mapping[str, bytes]) -> dict[str, Any]:
    """The row of a sample's files, by the ends of their names: pictures and clips are `images` and `audio`, `txt` is
    `text`, what a `json` holds is columns, and all else is a column of bytes.

    A row that cannot be read holds a LayoutError under `error`.
    """
    row: dict[str, Any] = {}
    for name, data in files.items():
        suffix = "." + name.rpartition(".")[2].lower()
        column = next((column for column, known in SUFFIXES.items() if suffix in known), None)
        if column is not None:
            row[column] = [*row.get(column, []), {"bytes": data, "path": None}]
            continue
        try:
            found = _columns(name, suffix, data)
        except ValueError as error:
            return {"error": LayoutError(f"key {name!r}: {error}")}
        if twice := sorted(found.keys() & row.keys()):
            return {"error": LayoutError(f"key {name!r}: {twice[0]!r} is in another file of the sample too")}
        row |= found
    return row


def _columns(name: str, suffix: str, data: bytes) -> dict[str, Any]:
    if suffix == ".txt":
        return {"text": data.decode()}
    found = json.loads(data) if suffix == ".json" else {name: data}
    if not isinstance(found, dict):
        raise ValueError(f"expected a mapping of columns, found {found!r:.60}")
    return found


def _shards(path: Path, split: str) -> list[str]:
    if path.is_file():
        return [str(path)] if path.suffix == SHARD else []
    found = sorted(path.glob(f"*{SHARD}"))
    named = [file for file in found if file.stem == split or file.stem.startswith(f"{split}-")]
    return [str(file) for file in named or found if named or file.stem.isdecimal()]


def _media_below(folder: Path, split: str) -> list[tuple[str, str]]:
    """Column and path, relative to the folder, of every picture or every clip."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    found = {column: [file for file in files if file.suffix.lower() in known] for column, known in SUFFIXES.items()}
    captions = [file.name for file in files if file.stem == "metadata"]
    if any(found.values()) and (captions or all(found.values())):
        held = captions[0] if captions else f"{len(found['images'])} images and {len(found['audio'])} clips"
        raise ValueError(
            f"{str(folder)!r} holds {held}: what belongs together is said by a {split}.jsonl that names the files"
        )
    return [(column, str(file.relative_to(folder))) for column, files in found.items() for file in files]
