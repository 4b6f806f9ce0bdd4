"""A stream that goes on with another number of ranks: no row is seen twice, and none is lost."""

from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
from accelerate.data_loader import IterableDatasetShard
from torch.utils.data import DataLoader

from chorus_moe.training.data import SKIPPED
from chorus_moe.training.streaming import StreamedRows
from tests.training.test_streaming import SOURCES, stream_of, texts

ROWS, STEPS = 8, 6


def seen_by(rows: StreamedRows, ranks: int, first: int, last: int) -> list[list[str]]:
    """What some ranks learn in each of the steps from the first to before the last, together, in any order."""
    rows.batch, rows.start = ROWS, first * ROWS
    loaders = []
    for rank in range(ranks):
        shard = IterableDatasetShard(rows, batch_size=ROWS // ranks, num_processes=ranks, process_index=rank)
        loaders.append(iter(DataLoader(shard, ROWS // ranks, collate_fn=list)))
    steps = [[row for loader in loaders for row in next(loader)] for _ in range(last)]
    assert all(row is SKIPPED for step in steps[:first] for row in step)
    return [texts(iter(step)) for step in steps[first:]]


# Not Parquet: at the end of each pass over several such files `datasets` sleeps five seconds, and these are sixty.
@pytest.mark.parametrize("source", ["shards", "jsonl"])
def test_each_row_once_whatever_the_ranks_before_and_after_a_stop(source: str, tmp_path: Path) -> None:
    SOURCES[source](tmp_path)
    rows = stream_of(tmp_path, data={"shuffle_buffer": 3})
    expected = texts(islice(rows, ROWS * STEPS))
    found = seen_by(rows, 4, 0, 2) + seen_by(rows, 2, 2, 3) + seen_by(rows, 1, 3, 4) + seen_by(rows, 8, 4, STEPS)
    assert [sorted(step) for step in found] == [sorted(expected[i : i + ROWS]) for i in range(0, len(expected), ROWS)]
    # 48 rows are six passes over seven rows, and six more.
    counts = Counter(text for step in found for text in step)
    assert sorted(counts.values()) == [6] + [7] * 6
