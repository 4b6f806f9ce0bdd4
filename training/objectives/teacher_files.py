"""What teachers expect of the rows of a data set, on disk, so that they need not be in memory while a student learns.

A folder holds `teacher.json` and shards of safetensors. A row is found by a hash of its turns and media. The labelled
tokens are kept with it, and the hashes of the teachers, of the processor and of its limit of tokens in `teacher.json`:
what was changed since, the row or anything else, is refused.

Unusual here:
- only the `top_k` most likely tokens of a position are kept, and the probability of all others together;
- probabilities are those at one temperature, since the rest at another cannot be known;
- a row that was written twice, or stands twice in the data, lies here once.

Shape suffixes: B batch, P labelled positions of a sample at most, N positions of a shard, R rows of a shard, K tokens.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from chorus_moe.processors.processing_chorus import ChorusProcessor
from chorus_moe.training.checkpoints import digest
from chorus_moe.training.collator import ChorusDataCollator, Row, clean_messages
from chorus_moe.training.data import MEDIA_KINDS, PATH_KEYS, local_path
from chorus_moe.training.layouts import standard_row
from chorus_moe.training.objectives.divergences import TokenProbabilities
from chorus_moe.training.objectives.teachers import Teacher, base_of
from chorus_moe.training.saving import INCOMPLETE, saved_whole

MANIFEST = "teacher.json"
# Key of a row whose teacher has been found, and of what a collator makes of it.
FOUND, BATCH_KEYS = "teacher", ("teacher_log_probs", "teacher_token_ids", "teacher_log_rest", "teacher_read")
SHARD_BYTES = 512 * 2**20
# Rows whose hashes are compared before the first step; all would mean to read the whole data set.
CHECKED_ROWS = 16


class RowTokens(NamedTuple):
    """What a file holds of one row: `tokens` at its positions and the ids of their `labels` `(n,)`."""

    tokens: TokenProbabilities
    labels: Tensor


def digest_of_row(row: Row) -> bytes:
    """SHA-256 of the turns of a row and of its media. A path stands for what the file holds."""
    row, total = standard_row(row), hashlib.sha256()
    _add(total, clean_messages(row["messages"]))
    for column in MEDIA_KINDS:
        _add(total, [_content(item) for item in row.get(column) or []])
    return total.digest()


def _add(total: Any, value: object) -> None:
    """Add a value, and before it what it is and how long, so that no two values are the same bytes."""
    if isinstance(value, Image.Image):
        value = {"mode": value.mode, "pixels": np.asarray(value)}
    if isinstance(value, Mapping):
        items = sorted((str(key), item) for key, item in value.items() if item is not None)
        total.update(f"m{len(items)}:".encode())
        for key, item in items:
            _add(total, key)
            _add(total, _content(item) if key in PATH_KEYS else item)
    elif isinstance(value, list | tuple):
        total.update(f"l{len(value)}:".encode())
        for item in value:
            _add(total, item)
    elif isinstance(value, np.ndarray | Tensor):
        array = np.ascontiguousarray(value)
        _add(total, [str(array.dtype), str(array.shape), array.tobytes()])
    else:
        data = value if isinstance(value, bytes) else f"{type(value).__name__} {value}".encode()
        total.update(f"b{len(data)}:".encode() + data)


def _content(item: object) -> object:
    """A medium without the place where it lies."""
    if isinstance(item, Mapping):
        if item.get("bytes") is not None:
            return item["bytes"]
        if isinstance(item.get("path"), str) and item.get("array") is None:
            return _content(item["path"])
    if isinstance(item, str | os.PathLike) and os.path.isfile(local_path(item)):
        return Path(local_path(item)).read_bytes()
    return item


def digest_of_processor(processor: ChorusProcessor, max_length: int | None) -> str:
    """SHA-256 of what decides which tokens and features a row becomes."""
    tokenizer: Any = processor.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    # Padding and truncation are those of the last call.
    words = {} if backend is None else json.loads(backend.to_str()) | {"padding": None, "truncation": None}
    settings = {
        "processor": processor.to_dict(),
        "chat_template": processor.chat_template,
        "tokenizer": words or sorted(tokenizer.get_vocab().items()),
        "truncation_side": tokenizer.truncation_side,
        "max_length": max_length,
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


def digest_of_teacher(source: str) -> str:
    """SHA-256 of the weights and configurations of a teacher, and of the model below an adapter."""
    total = hashlib.sha256()
    for name in dict.fromkeys((source, base_of(source))):
        folder = Path(name)
        if not folder.is_dir():
            from huggingface_hub import snapshot_download

            folder = Path(snapshot_download(name, allow_patterns=["*.safetensors", "*config.json"]))
        for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*config.json")]):
            total.update(f"{path.name} {digest(path)}\n".encode())
    return total.hexdigest()


def write_teacher(
    folder: str | os.PathLike[str],
    teacher: Teacher,
    rows: Sequence[Row] | Dataset,
    collator: ChorusDataCollator,
    *,
    top_k: int = 64,
    batch_size: int = 8,
    device: torch.device | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Ask a teacher about every row and keep its answers in a folder, which is whole or not there.

    Args:
        teacher: checked against the student's processor.
        collator: as in training, with the same `max_length`.
        top_k: tokens kept at each position; more than there are keeps all.

    Returns:
        What `teacher.json` holds.

    Raises:
        ValueError: `top_k` below 1, no rows, or a folder that holds something.
        MediaError: a row that cannot be read.
    """
    folder, size = Path(folder), len(rows)  # type: ignore[arg-type]
    if top_k < 1:
        raise ValueError(f"distillation.teacher_top_k={top_k}: keep at least one token")
    if size == 0:
        raise ValueError("there are no rows to ask the teacher about")
    if folder.is_dir() and any(path.name != INCOMPLETE for path in folder.iterdir()):
        raise ValueError(f"{str(folder)!r} holds something already; choose another distillation.teacher_logits")
    top_k = min(top_k, teacher.num_shared)
    manifest: dict[str, Any] = {
        "version": 1,
        "teachers": [{"source": source, "sha256": digest_of_teacher(source)} for source in teacher.sources],
        "processor": digest_of_processor(collator.processor, collator.options.get("max_length")),
        "temperature": teacher.temperature,
        "top_k": top_k,
        "num_shared": teacher.num_shared,
        "reads_media": teacher.reads_media,
    }
    with saved_whole(folder) as aside:
        shard = _Shard(aside, has_rest=top_k < teacher.num_shared)
        seen, skipped = set[bytes](), set[bytes]()
        steps = tqdm(range(0, size, batch_size), desc="teacher", unit="batch", disable=not progress)
        batches = ([rows[index] for index in range(start, min(start + batch_size, size))] for start in steps)
        for key, row in answers(teacher, batches, collator, top_k, device):
            if row is None:
                skipped.add(key)
            elif key not in seen:
                seen.add(key)
                shard.add(key, row)
        shard.write()
        manifest |= {"rows": len(seen), "positions": shard.positions, "shards": shard.names}
        manifest["skipped"] = sorted(key.hex() for key in skipped)
        (aside / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return manifest


def answers(
    teacher: Teacher,
    batches: Iterable[list[Row]],
    collator: ChorusDataCollator,
    top_k: int,
    device: torch.device | None = None,
) -> Iterator[tuple[bytes, RowTokens | None]]:
    """Hash of a row and what the teacher says of it, None for a row that cannot be read; rows with media are left out
    if it reads text alone."""
    collator, keys = copy(collator), list[bytes]()

    def remember(good: Sequence[Row], _: Mapping[str, Tensor]) -> dict[str, Tensor]:
        # Only these rows are in the batch.
        keys.extend(digest_of_row(row) for row in good)
        return {}

    collator.more = (remember,)
    for rows in batches:
        keys.clear()
        batch = collator(rows)
        if len(keys) < len(rows):
            unread = {digest_of_row(row) for row in rows if row.get("error") is None} - set(keys)
            yield from ((key, None) for key in unread)
        output = teacher.read({name: value if device is None else value.to(device) for name, value in batch.items()})
        if output is None or not keys:
            continue
        tokens, stop = output.tokens.top(top_k).each(Tensor.cpu), 0
        for sample, (key, count) in enumerate(zip(keys, output.positions.sum(dim=1).tolist(), strict=True)):
            of_row, stop = slice(stop, stop + count), stop + count
            if output.samples[sample]:
                labels_n = batch["labels"][sample, 1:]
                found = tokens.each(lambda part, of_row=of_row: part[of_row])  # type: ignore[misc]
                yield key, RowTokens(found, labels_n[labels_n != -100])


class _Shard:
    """The shard that is being filled; full ones are on disk."""

    def __init__(self, folder: Path, has_rest: bool):
        self.folder, self.has_rest = folder, has_rest
        self.names: list[str] = []
        self.positions = self._bytes = 0
        self._rows: list[tuple[bytes, RowTokens]] = []

    def add(self, key: bytes, row: RowTokens) -> None:
        self._rows.append((key, row))
        self.positions += len(row.labels)
        self._bytes += 2 * row.tokens.log_probs.nbytes
        if self._bytes >= SHARD_BYTES:
            self.write()

    def write(self) -> None:
        if not self._rows:
            return
        keys, rows = zip(*self._rows, strict=True)
        tokens = [row.tokens for row in rows]
        tensors = {
            "keys": torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).view(-1, 32),
            "ends": torch.tensor([len(row.labels) for row in rows]).cumsum(0),
            "labels": torch.cat([row.labels for row in rows]).int(),
            "log_probs": torch.cat([part.log_probs for part in tokens]),
            "token_ids": torch.cat([part.token_ids for part in tokens if part.token_ids is not None]).int(),
        }
        if self.has_rest:
            tensors["log_rest"] = torch.cat([part.log_rest for part in tokens if part.log_rest is not None])
        self.names.append(f"teacher-{len(self.names):05}.safetensors")
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, self.folder / self.names[-1])
        self._rows, self._bytes = [], 0


class TeacherFiles:
    """A folder that [`write_teacher`] wrote; a row is read when it is asked for.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not whole.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        path = self.folder / MANIFEST
        if not path.is_file():
            raise FileNotFoundError(
                f"distillation.teacher_logits: {str(folder)!r} has no {MANIFEST}; `chorus-moe precompute-teacher` "
                "writes it"
            )
        self.manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        # Hash of a row -> its shard, and where its positions begin and stop.
        self._places: dict[bytes, tuple[str, int, int]] = {}
        for name in self.manifest["shards"]:
            with safe_open(self.folder / name, framework="pt") as file:
                keys, ends = file.get_tensor("keys").numpy(), [0, *file.get_tensor("ends").tolist()]
            for number, key in enumerate(keys):
                self._places[key.tobytes()] = (name, ends[number], ends[number + 1])
        if len(self._places) != self.manifest["rows"]:
            raise ValueError(
                f"{str(folder)!r} holds {len(self._places)} rows, its {MANIFEST} says {self.manifest['rows']}"
            )
        self._skipped = {bytes.fromhex(key) for key in self.manifest["skipped"]}
        self._open: dict[str, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        # A process of a DataLoader opens the files for itself.
        return self.__dict__ | {"_open": {}}

    def __len__(self) -> int:
        return len(self._places)

    @property
    def num_shared(self) -> int:
        """How many ids the teachers' tokenizers share with the student's."""
        return int(self.manifest["num_shared"])

    def check(self, processor: ChorusProcessor, max_length: int | None, temperature: float) -> None:
        """Refuse answers to what another processor made of the rows, or at another temperature. Raises ValueError."""
        if self.manifest["processor"] != digest_of_processor(processor, max_length):
            raise ValueError(
                f"{str(self.folder)!r} was written with another processor or max_length than this run's "
                f"({max_length}), so its rows are other tokens; write it again"
            )
        if self.manifest["temperature"] != temperature:
            raise ValueError(
                f"{str(self.folder)!r} holds probabilities at temperature {self.manifest['temperature']:g}, the "
                f"run asks for {temperature:g}; the rest cannot be known there, write it again"
            )

    def check_teachers(self, sources: Sequence[str]) -> None:
        """Refuse answers of other teachers than these. Raises ValueError."""
        written = [entry["sha256"] for entry in self.manifest["teachers"]]
        if len(written) != len(sources):
            raise ValueError(
                f"{str(self.folder)!r} was written by {len(written)} teachers, the run names {len(sources)}"
            )
        for source, entry in zip(sources, self.manifest["teachers"], strict=True):
            if digest_of_teacher(source) != entry["sha256"]:
                raise ValueError(
                    f"{str(self.folder)!r} was written by {entry['source']!r}, whose weights are not those of teacher "
                    f"{source!r}; write it again, or leave distillation.teachers out"
                )

    def find(self, row: Row) -> RowTokens | None:
        """What the teacher expects of a row; None for one that it could not read, or has media if it reads text alone.

        Raises:
            KeyError: a row that was not there, or was another one, when the teacher was asked.
        """
        if not self.manifest["reads_media"] and has_media(row):
            return None
        key = digest_of_row(row)
        if key in self._skipped:
            return None
        name, start, stop = self._places[key]
        if name not in self._open:
            self._open[name] = safe_open(self.folder / name, framework="pt")
        file = self._open[name]
        parts = {key: file.get_slice(key)[start:stop] for key in set(file.keys()) - {"keys", "ends"}}
        tokens = TokenProbabilities(parts["log_probs"], parts["token_ids"].long(), parts.get("log_rest"))
        return RowTokens(tokens, parts["labels"].long())


def has_media(row: Row) -> bool:
    """Whether a row has an image or a clip, in a column or within a part."""
    row = standard_row(row)
    parts = [part for turn in row["messages"] if isinstance(turn["content"], list) for part in turn["content"]]
    kinds = {part.get("type") for part in parts if isinstance(part, Mapping)}
    return bool(kinds - {"text", None}) or any(row.get(column) for column in MEDIA_KINDS)


class TaughtRows(Dataset):
    """Rows that bring what a teacher expects of them.

    Raises:
        ValueError: a row that is not in the files, by its number; of the first to the last, some are looked up at once.
    """

    def __init__(self, rows: Sequence[Row] | Dataset, files: TeacherFiles):
        self.rows, self.files = rows, files
        for index in sorted({round(i * (len(self) - 1) / CHECKED_ROWS) for i in range(CHECKED_ROWS + 1)}):
            self[index]

    def __len__(self) -> int:
        return len(self.rows)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        # It is the collator's, which raises it or counts it.
        if row.get("error") is not None:
            return dict(row)
        try:
            return {**row, FOUND: self.files.find(row)}
        except KeyError:
            raise ValueError(
                f"row {index} is none of the {len(self.files):,} that {str(self.files.folder)!r} was written for, "
                "or was changed since; run `chorus-moe precompute-teacher` again, into another folder"
            ) from None

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))


def teacher_columns(rows: Sequence[Row], batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The answers of a teacher to the rows of a batch as tensors; none for rows without them, as in evaluation.

    `teacher_log_probs` and `teacher_token_ids` are `(B, P, K)`, `teacher_log_rest` `(B, P)` and `teacher_read` `(B,)`.

    Raises:
        ValueError: labels that are not those the teacher was asked about.
    """
    if not rows or FOUND not in rows[0]:
        return {}
    found: list[RowTokens | None] = [row[FOUND] for row in rows]
    for sample, entry in enumerate(found):
        labels_n = batch["labels"][sample, 1:]
        labels_n = labels_n[labels_n != -100]
        if entry is not None and not labels_n.equal(entry.labels):
            raise ValueError(
                f"sample {sample}: {len(labels_n)} labelled tokens, the teacher was asked about {len(entry.labels)}"
                + (" others" if len(labels_n) == len(entry.labels) else "")
                + "; write distillation.teacher_logits again"
            )
    read = [entry.tokens for entry in found if entry is not None]
    columns = {"teacher_read": torch.tensor([entry is not None for entry in found])}
    if not read:
        return columns
    # Nothing for the others, of the right width.
    nothing = read[0].each(lambda part: part[:0])
    for name, *parts in zip(BATCH_KEYS, *(nothing if entry is None else entry.tokens for entry in found), strict=False):
        if parts[0] is not None:
            columns[name] = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
    return columns
