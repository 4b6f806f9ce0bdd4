"""Processes that share their sequences compute what one process computes; they keep less of it for the backward.

Twenty steps of the Trainer stand beside the other layouts (`test_spread.py`), four processes among the journeys.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from chorus_moe import ChorusForContrastive, ChorusForSequenceClassification
from chorus_moe.training.scale.context import Slices, share_sequences
from tests.conftest import tiny_config
from tests.fresh_process import ROOT, run_ranks
from tests.training.scale.context_runs import CASES

PROGRAM = ROOT / "tests/training/scale/context_runs.py"
# Sums in another order: worst seen is 6e-8.
GRADIENTS = 1e-5


def run_cases(folder: Path, ranks: int) -> list[dict[str, dict[str, Any]]]:
    """What each rank found, by case."""
    done = run_ranks(PROGRAM, [str(folder), *CASES], cwd=folder, ranks=ranks, seconds=300)
    assert [rank.returncode for rank in done] == [0] * ranks, [rank.stderr[-2000:] for rank in done]
    return [json.loads((folder / f"{ranks}-{rank}.json").read_text()) for rank in range(ranks)]


def assert_as_one_process(rank: dict[str, dict[str, Any]]) -> None:
    for case in CASES:
        found = rank[case]
        assert "error" not in found, found["error"]
        assert found["loss"] < GRADIENTS, case
        assert found["gradient"] < GRADIENTS, (case, found["where"])
        # Counters see whole sequences, and evaluation is not shared.
        assert found["choices"] and found["evaluated"] < GRADIENTS, case


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_two_processes_share_sequences(tmp_path: Path) -> None:
    for rank in run_cases(tmp_path, 2):
        assert_as_one_process(rank)
        # Of it are towers, embeddings, the head and the routing, which are whole on both.
        assert rank["plain"]["kept"] < 0.7


def test_slices_make_up_the_sequence() -> None:
    group: Any = None
    slices = [Slices(group, (4, 3, 3), own) for own in range(3)]
    assert [part.place for part in slices] == [slice(0, 4), slice(4, 7), slice(7, 10)]
    assert slices[1].rows(2, "cpu").tolist() == [4, 5, 6, 14, 15, 16]  # type: ignore[arg-type]


def test_heads_that_read_more_than_their_own_sequence_are_refused() -> None:
    classifier = ChorusForSequenceClassification(tiny_config(exit_layers=[1]))
    with pytest.raises(ValueError, match="parallel.context=2: the exits of a classifier read whole sequences"):
        share_sequences(classifier, 2)
    with pytest.raises(ValueError, match="parallel.context=2: a contrastive loss compares the rows of all processes"):
        share_sequences(ChorusForContrastive(tiny_config()), 2)
