"""The command `cache-features`: rows with media to rows with the outputs of the model's towers.

Unusual here:
- what is kept are the states of the towers, before the connectors, so that connectors can be trained on them;
- a tower that in training gives other states than in evaluation (dropout) is refused: no cache could stand for it.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from chorus_moe.processors.processing_chorus import ChorusProcessor
from chorus_moe.processors.processing_media import MEDIA
from chorus_moe.training.collator import ChorusDataCollator
from chorus_moe.training.data import RowDataset
from chorus_moe.training.features.identity import processor_hash, tower_hash, towers_of
from chorus_moe.training.features.rows import FACTS, Facts, pack
from chorus_moe.training.loading import ModelOrAdapter, device_of
from chorus_moe.training.saving import INCOMPLETE, saved_whole

# Columns of a row that its tokens and states stand for, and one that stays a column: what a row is an example of.
REPLACED = {"messages", "error", "task", *(medium.column for medium in MEDIA.values())}
# States are of size 1; float32 sums in another order differ by some 1e-6.
SAME = 1e-4
# Rows of one record batch: some 100 MB of large states.
WRITTEN_ROWS = 32


def cache_features(
    model: ModelOrAdapter,
    processor: ChorusProcessor,
    splits: dict[str, RowDataset],
    out: Path,
    *,
    source: str,
    batch_size: int = 16,
    on_bad_media: str = "raise",
    max_bad_samples: int = 100,
    progress: bool = True,
) -> Facts:
    """Write the rows of some splits with their features into `out`, a new folder.

    Args:
        model: in evaluation mode; its towers are run, nothing else.
        source: the model's name, for those who read the folder later.
        batch_size: rows whose media are encoded at once.
        on_bad_media, max_bad_samples: as in `ChorusDataCollator`.

    Raises:
        ValueError: the folder holds something, the model has no tower, no row is left, or a tower is random in
            training.
        MediaError: a row that cannot be read.
    """
    from datasets import Features, List, Value
    from datasets.arrow_writer import ArrowWriter

    # What a killed call has left is replaced.
    if out.exists() and (not out.is_dir() or any(path.name != INCOMPLETE for path in out.iterdir())):
        raise ValueError(f"{str(out)!r} holds something; choose a new folder")
    towers = towers_of(model)
    if not towers:
        raise ValueError(f"{source}: the model has no tower, so there is nothing to cache")
    columns = {
        "input_ids": List(Value("int32")),
        "labels": List(Value("int32")),
        **{name: Value("large_binary") for name in towers},
        "task": Value("string"),
        "rest": Value("string"),
    }
    collator = ChorusDataCollator(processor, on_bad_media=on_bad_media, max_bad_samples=max_bad_samples)
    encoder, counts = Encoder(towers, device_of(model)), dict[str, int]()
    with saved_whole(out) as aside:
        for split, rows in splits.items():
            writer = ArrowWriter(
                path=str(aside / f"{split}.arrow"), features=Features(columns), writer_batch_size=WRITTEN_ROWS
            )
            read = tqdm(collated(rows, collator), total=len(rows), desc=f"cache {split}", disable=not progress)
            for batch in batches(read, batch_size):
                for row in encoder.rows(batch):
                    writer.write(row)
            counts[split], _ = writer.finalize()
            if not counts[split]:
                raise ValueError(f"split {split!r}: no row is left of {len(rows)}")
        hashes = {name: tower_hash(tower) for name, tower in towers.items()}
        facts = Facts(source, hashes, processor_hash(processor), shapes_of(towers), counts)
        (aside / FACTS).write_text(json.dumps(facts._asdict(), indent=2) + "\n", encoding="utf-8")
    if collator.num_bad_samples:
        print(f"{collator.num_bad_samples} rows could not be read and are left out", file=sys.stderr)
    return facts


def shapes_of(towers: dict[str, nn.Module]) -> dict[str, list[int]]:
    """Modality -> tokens and width of what its tower gives for an image, and at least for a window of sound."""
    configs: dict[str, Any] = {name: tower.config for name, tower in towers.items()}
    return {name: [getattr(config, "num_tokens", 1), config.hidden_size] for name, config in configs.items()}


Collated = tuple[dict[str, Tensor], dict[str, str | None]]


def collated(rows: RowDataset, collator: ChorusDataCollator) -> Iterator[Collated]:
    """Each row that can be read, collated alone, and its further columns: the task, and the rest as JSON.

    Raises:
        ValueError: a column that is no JSON, by its name.
    """
    for number, row in enumerate(rows):
        bad = collator.num_bad_samples
        inputs = collator([row])
        # What stands for a row that was skipped is not one.
        if collator.num_bad_samples == bad:
            rest = {name: value for name, value in row.items() if name not in REPLACED}
            try:
                yield inputs, {"task": row.get("task"), "rest": json.dumps(rest)}
            except TypeError as error:
                raise ValueError(f"row {number}: columns {sorted(rest)} must be plain values: {error}") from error


def batches(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    batch = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


class Encoder:
    """Runs the towers of a model on batches of collated rows.

    Args:
        towers: modality -> tower, in evaluation mode.
    """

    def __init__(self, towers: dict[str, nn.Module], device: torch.device):
        self.towers, self.device = towers, device
        self._checked: set[str] = set()

    def rows(self, batch: Sequence[Collated]) -> Iterator[dict[str, Any]]:
        """The rows of a batch as the table holds them."""
        inputs = [found for found, _ in batch]
        encode = {"image": self._images, "audio": self._sounds}
        states = {name: encode[name](inputs) for name in self.towers}
        for number, (found, further) in enumerate(batch):
            tokens = {name: found[name][0].tolist() for name in ("input_ids", "labels")}
            yield {**tokens, **{name: pack(rows[number]) for name, rows in states.items()}, **further}

    def _images(self, inputs: Sequence[dict[str, Tensor]]) -> list[list[Tensor]]:
        pixels = [found["pixel_values"] for found in inputs if "pixel_values" in found]
        states = list(self._run("image", pixel_values=torch.cat(pixels)).last_hidden_state) if pixels else []
        return _shared_out(states, [len(found.get("pixel_values", ())) for found in inputs])

    def _sounds(self, inputs: Sequence[dict[str, Tensor]]) -> list[list[Tensor]]:
        names, states = ("input_features", "input_features_mask"), []
        windows = {name: [window for found in inputs for window in found.get(name, ())] for name in names}
        if windows["input_features"]:
            padded = {name: pad_sequence(found, batch_first=True) for name, found in windows.items()}
            output = self._run("audio", **padded)
            # Of real tokens only: what a clip is padded to depends on its batch.
            states = [row[keep] for row, keep in zip(output.last_hidden_state, output.attention_mask, strict=True)]
        return _shared_out(states, [len(found.get("input_features", ())) for found in inputs])

    @torch.no_grad()
    def _run(self, name: str, **inputs: Tensor) -> Any:
        tower, inputs = self.towers[name], {key: value.to(self.device) for key, value in inputs.items()}
        output = tower(**inputs)
        if name not in self._checked:
            self._checked.add(name)
            check_steady(name, tower, output.last_hidden_state, inputs)
        return output


def check_steady(name: str, tower: nn.Module, states: Tensor, inputs: dict[str, Tensor]) -> None:
    """Refuse a tower that, frozen but in training mode, gives other states. Raises ValueError naming the difference."""
    trained = [parameter for parameter in tower.parameters() if parameter.requires_grad]
    # Batch norms of a frozen tower keep their statistics in training.
    tower.requires_grad_(False)
    apart = float((states - tower.train()(**inputs).last_hidden_state).abs().max())
    tower.eval()
    for parameter in trained:
        parameter.requires_grad_(True)
    # Turned round, so that NaN counts as apart.
    if not apart <= SAME:
        raise ValueError(
            f"{name} tower: in training its states differ by up to {apart:.2g} from those in evaluation, so a cache "
            "could not stand for it; set its dropout and drop path to 0 in config.json, without which a frozen tower "
            "is better off"
        )


def _shared_out(states: list[Tensor], counts: Sequence[int]) -> list[list[Tensor]]:
    """States of each row, on the CPU, in their order."""
    left = iter(states)
    return [[next(left).cpu() for _ in range(count)] for count in counts]
