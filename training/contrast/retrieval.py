"""Retrieval: how often an item's partner is among the k candidates of another modality that are nearest to it.

Unusual here:
- equal items, such as one caption of many images, are one candidate, and any partner of a query is right;
- of candidates with equal scores nobody knows the order: recall is its mean over all orders, so that a model which
  gives every item the same vector scores as one that guesses.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import Any

import torch
from torch import Tensor

from chorus_moe.training.contrast.embeddings import Embedded

KS = (1, 5, 10)
# Rows of scores that are held at a time.
CHUNK = 1024


def retrieval(embedded: dict[str, Embedded], ks: Sequence[int] = KS) -> dict[str, dict[str, Any]]:
    """Recall in both directions of every pair of modalities.

    Args:
        embedded: what `embed_pairs` returns.
        ks: how many candidates count.

    Returns:
        `"image_to_text"` -> `recall@K` of each k, `num_queries` and `num_candidates`, and so on.

    Raises:
        ValueError: a k that is not positive, or above the number of candidates.
    """
    check_ks(ks, {f"different {name} items": len(found.vectors) for name, found in embedded.items()})
    return {
        f"{query}_to_{candidate}": {
            **{f"recall@{k}": recall for k, recall in _recalls(embedded[query], embedded[candidate], ks).items()},
            "num_queries": len(embedded[query].vectors),
            "num_candidates": len(embedded[candidate].vectors),
        }
        for query, candidate in permutations(embedded, 2)
    }


def check_ks(ks: Sequence[int], counts: Mapping[str, int]) -> None:
    """Refuse a k that is not positive, or above a number of candidates. Raises ValueError."""
    if not ks or min(ks) < 1:
        raise ValueError(f"recall@k needs a k of 1 or more, found {list(ks)}")
    for what, count in counts.items():
        if max(ks) > count:
            raise ValueError(
                f"recall@{max(ks)} needs {max(ks)} candidates or more, found {count} {what}; ask for a smaller k, or "
                "evaluate more rows"
            )


def _recalls(queries: Embedded, candidates: Embedded, ks: Sequence[int]) -> dict[int, float]:
    sums = dict.fromkeys(ks, 0.0)
    for start in range(0, len(queries.vectors), CHUNK):
        scores = queries.vectors[start : start + CHUNK] @ candidates.vectors.T
        right = torch.zeros_like(scores, dtype=torch.bool)
        here = (queries.items >= start) & (queries.items < start + CHUNK)
        right[queries.items[here] - start, candidates.items[here]] = True
        for k, recall in recall_at(scores, right, ks).items():
            sums[k] += float(recall.sum())
    return {k: total / len(queries.vectors) for k, total in sums.items()}


def recall_at(scores_QC: Tensor, right_QC: Tensor, ks: Sequence[int]) -> dict[int, Tensor]:
    """For each query the chance that one of its right candidates is among the k best, if ties are broken at random.

    Args:
        scores_QC: of Q queries with C candidates each.
        right_QC: bool, which candidates are right; at least one in each row.

    Returns:
        k -> `(Q,)` float64, 0 or 1 where no tie decides.
    """
    best_Q1 = scores_QC.masked_fill(~right_QC, -math.inf).amax(dim=1, keepdim=True)
    above_Q = (scores_QC > best_Q1).sum(dim=1)
    is_tied_QC = scores_QC == best_Q1
    tied_Q, wrong_Q = is_tied_QC.sum(dim=1), (is_tied_QC & ~right_QC).sum(dim=1)
    counts = list(zip(above_Q.tolist(), tied_Q.tolist(), wrong_Q.tolist(), strict=True))
    return {k: torch.tensor([_chance(k - a, t, w) for a, t, w in counts], dtype=torch.float64) for k in ks}


def _chance(places: int, tied: int, wrong: int) -> float:
    """That a right one of `tied` candidates, of which `wrong` are not, is among `places` of them drawn at random."""
    if places <= 0:
        return 0.0
    if places > wrong:
        return 1.0
    return 1 - math.comb(wrong, places) / math.comb(tied, places)
