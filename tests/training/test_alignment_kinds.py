"""Kinds of alignment that are there for comparison."""

import math

import pytest
import torch

from chorus_moe.modeling.configuration_services import SERVICES
from chorus_moe.modeling.losses import alignment_loss
from chorus_moe.training.alignment_kinds import jensen_shannon
from tests.modeling.test_losses import states


def test_an_entropy_floor_adds_what_maps_are_too_flat_by():
    query, key, modality = states()
    maps, floor = (alignment_loss(query, key, modality, None, 0.0, False, kind) for kind in ("maps", "entropy_floor"))
    # Scores of zero: both maps are as flat as can be, half of the entropy too flat each.
    assert (floor - maps).item() == pytest.approx(2 * (1 - 0.5), abs=1e-5)
    sharp = [alignment_loss(query * 100, key, modality, None, 5.0, False, kind) for kind in ("maps", "entropy_floor")]
    assert sharp[1].item() == pytest.approx(sharp[0].item(), abs=0.05)


def test_pooled_maps_are_those_of_neighbours_together():
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 1, 14, 4, generator=generator) for _ in range(2))
    modality = torch.tensor([[1] * 8 + [0] * 6])
    there = (query[0, 0, 8:] @ key[0, 0, :8].T).softmax(dim=-1)
    back = (query[0, 0, :8] @ key[0, 0, 8:].T).softmax(dim=-1).T
    maps = [there, back / back.sum(dim=1, keepdim=True)]
    # Six words are four and two, eight places four and four.
    pooled = [torch.stack((m[:4].mean(dim=0), m[4:].mean(dim=0))).view(2, 2, 4).mean(dim=2) for m in maps]
    p, q = (m / m.sum(dim=1, keepdim=True) for m in pooled)
    expected = sum(0.5 * (x * (x / ((p + q) / 2)).log()).sum(dim=1) for x in (p, q)).mean()
    found = alignment_loss(query, key, modality, None, 1.0, False, "pooled")
    assert found.item() == pytest.approx(expected.item(), abs=1e-6)


def test_without_the_package_they_are_refused_by_name(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(SERVICES, "pooled")
    with pytest.raises(ImportError, match="alignment='pooled' takes the whole package"):
        alignment_loss(*states(), None, 0.5, False, "pooled")


def test_the_divergence_is_that_of_two_distributions_where_it_is_asked_for() -> None:
    p, q = torch.tensor([[0.0, 0.25, 0.75]]), torch.tensor([[0.5, 0.5, 0.0]])
    mask, expected = torch.tensor([[True, True, False]]), 0.0
    for a, b, counts in zip(p[0].tolist(), q[0].tolist(), mask[0].tolist(), strict=True):
        middle = (a + b) / 2
        expected += sum(x * math.log(x / middle) for x in (a, b) if x > 0) / 2 if counts else 0
    assert jensen_shannon(p, q, mask).item() == pytest.approx(expected, rel=1e-5)
    disjoint = torch.tensor([[1.0, 0.0]])
    whole = torch.ones(1, 2, dtype=torch.bool)
    assert jensen_shannon(disjoint, disjoint.flip(1), whole).item() == pytest.approx(math.log(2), rel=1e-6)
