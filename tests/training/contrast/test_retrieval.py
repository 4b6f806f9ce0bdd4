"""Recall at k against the mean over all orders of ties, and against scikit-learn where there are none."""

import itertools

import numpy as np
import pytest
import torch
from sklearn.metrics import top_k_accuracy_score

from chorus_moe.training.contrast import retrieval as module
from chorus_moe.training.contrast.embeddings import Embedded
from chorus_moe.training.contrast.retrieval import recall_at, retrieval


def test_recall_is_the_mean_over_all_orders_of_ties() -> None:
    rng = np.random.default_rng(0)
    scores, right = rng.integers(0, 3, (20, 6)), rng.random((20, 6)) < 0.3
    right[np.arange(20), rng.integers(0, 6, 20)] = True
    found = recall_at(torch.tensor(scores, dtype=torch.float32), torch.tensor(right), (1, 2, 5, 6))
    orders = list(itertools.permutations(range(6)))
    for k, recall in found.items():
        # Each order of the candidates breaks the ties in another way.
        hits = [
            np.array([row[list(order)][np.argsort(-s[list(order)], kind="stable")[:k]].any() for order in orders])
            for s, row in zip(scores, right, strict=True)
        ]
        np.testing.assert_allclose(recall.numpy(), [hit.mean() for hit in hits], atol=1e-12)


def embedded(vectors: torch.Tensor, items: list[int]) -> Embedded:
    return Embedded(torch.nn.functional.normalize(vectors, dim=-1), torch.tensor(items))


def test_without_ties_it_is_scikit_learns_top_k_accuracy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 7)
    generator = torch.Generator().manual_seed(0)
    parts = {n: embedded(torch.randn(30, 4, generator=generator), list(range(30))) for n in ("text", "image", "audio")}
    found = retrieval(parts, (1, 5, 10))
    assert len(found) == 6
    for name, figures in found.items():
        query, _, candidate = name.partition("_to_")
        scores = (parts[query].vectors @ parts[candidate].vectors.T).numpy()
        for k in (1, 5, 10):
            expected = top_k_accuracy_score(np.arange(30), scores, k=k, labels=np.arange(30))
            assert figures[f"recall@{k}"] == pytest.approx(expected, abs=1e-12)
        assert (figures["num_queries"], figures["num_candidates"]) == (30, 30)


def test_any_partner_of_an_item_is_right() -> None:
    """One caption of two images, one of one."""
    images = embedded(torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]]), [0, 1, 2])
    texts = embedded(torch.tensor([[0.8, 0.2], [0.1, 1.0]]), [0, 0, 1])
    found = retrieval({"text": texts, "image": images}, (1,))
    assert found["text_to_image"] == {"recall@1": 1.0, "num_queries": 2, "num_candidates": 3}
    assert found["image_to_text"] == {"recall@1": 1.0, "num_queries": 3, "num_candidates": 2}


def test_a_model_that_answers_all_alike_scores_as_one_that_guesses() -> None:
    same = embedded(torch.ones(20, 4), list(range(20)))
    found = retrieval({"text": same, "audio": same}, (1, 5, 20))
    for figures in found.values():
        assert [figures[f"recall@{k}"] for k in (1, 5, 20)] == pytest.approx([1 / 20, 5 / 20, 1.0])


@pytest.mark.parametrize(("ks", "message"), [((0,), "k of 1 or more, found"), ((), "found"), ((1, 4), "found 3 diff")])
def test_a_k_that_cannot_be_is_refused(ks: tuple[int, ...], message: str) -> None:
    parts = {"text": embedded(torch.eye(3), [0, 1, 2, 0]), "image": embedded(torch.eye(4), [0, 1, 2, 3])}
    with pytest.raises(ValueError, match=message):
        retrieval(parts, ks)
