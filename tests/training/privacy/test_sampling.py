"""Each row takes part apart from all others, and comes in a batch of its own."""

import pytest
import torch

from tests.training.privacy.conftest import REASON

pytest.importorskip("opacus", reason=REASON)

from chorus_moe.training.privacy.sampling import PoissonBatches, RowByRow  # noqa: E402


def test_an_update_takes_each_row_with_the_rate_and_none_twice() -> None:
    batches = PoissonBatches(50, 0.1, 2000, 2, torch.Generator().manual_seed(0))
    found = list(batches)
    assert len(found) == len(batches) == 4000
    updates = [found[index] + found[index + 1] for index in range(0, 4000, 2)]
    assert all(len(set(rows)) == len(rows) for rows in updates)
    taken = torch.zeros(2000, 50)
    for update, rows in enumerate(updates):
        taken[update, rows] = 1
    # 2,000 draws of 0.1: a standard error of 0.007 for a row; of two rows together 0.01, 0.002.
    assert float((taken.mean(dim=0) - 0.1).abs().max()) < 0.03
    assert float((taken[:, 0] * taken[:, 1]).mean()) == pytest.approx(0.01, abs=0.008)
    # Sizes vary, and micro-batches of one update by one row at most.
    sizes = taken.sum(dim=1)
    assert float(sizes.var()) == pytest.approx(50 * 0.1 * 0.9, rel=0.15)
    assert all(0 <= len(found[index]) - len(found[index + 1]) <= 1 for index in range(0, 4000, 2))
    assert any(not batch for batch in found)


def test_rows_are_collated_one_by_one() -> None:
    collate = RowByRow(lambda rows: {"count": len(rows), "row": rows[0]})
    assert collate([3, 4]) == {"rows": [{"count": 1, "row": 3}, {"count": 1, "row": 4}]}
    assert collate([]) == {"rows": []}
