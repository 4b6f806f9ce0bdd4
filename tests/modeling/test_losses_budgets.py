"""Budgets, shares and contrastive losses as functions, against their definitions one number at a time."""

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from chorus_moe.modeling import losses
from chorus_moe.modeling.configuration_banks import read_expert_banks
from chorus_moe.modeling.losses import (
    ROUTER_CLASSES,
    balance_loss,
    bank_sums,
    expert_budget_loss,
    infonce_loss,
    mean_over_banks,
    pair_scores,
    rows_of_all_ranks,
    share_of_batch,
    sigmoid_loss,
    skip_budget_loss,
    switch_loss,
    with_sums,
    z_loss,
)
from chorus_moe.modeling.modeling_outputs import BankRouting
from chorus_moe.modeling.moe_routers import SigmoidRouter

SIZES = {"num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 8, "modalities": ["text"]}


def banks(**settings: dict[str, Any]) -> dict[str, Any]:
    return {bank.name: bank for bank in read_expert_banks(settings, SIZES)}


def routing(rows: int, seed: int = 0, mask: list[int] | None = None, asked: list[float] | None = None) -> BankRouting:
    logits = torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    chosen = logits.topk(2, dim=-1)
    token_mask = None if mask is None else torch.tensor(mask, dtype=torch.bool)
    wanted = None if asked is None else torch.tensor(asked, requires_grad=True)
    return BankRouting(logits, chosen.values.softmax(-1), chosen.indices, token_mask, wanted_experts=wanted)


@pytest.mark.parametrize("mask", [None, [1, 0, 1, 1, 0]])
@pytest.mark.parametrize("asked", [None, [1.0, 1.5, 2.0, 1.25, 1.75]])
@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
def test_sums_are_those_of_the_rows_that_count(mask: list[int] | None, asked: list[float] | None, router: str) -> None:
    made = routing(5, mask=mask, asked=asked)
    rows = [row for row in range(5) if mask is None or mask[row]]
    counts, probabilities, squares, visits = [0] * 4, [0.0] * 4, 0.0, 0.0
    for row in rows:
        numbers = made.router_logits[row].tolist()
        weights = [math.exp(x) if router == "softmax" else 1 / (1 + math.exp(-x)) for x in numbers]
        squares += math.log(sum(math.exp(x) for x in numbers)) ** 2
        visits += 0 if asked is None else math.ceil(asked[row])
        for expert in range(4):
            probabilities[expert] += weights[expert] / sum(weights)
            counts[expert] += int(expert in made.selected_experts[row].tolist())
    found = bank_sums(made, ROUTER_CLASSES[router])
    assert found.tolist() == pytest.approx([*counts, *probabilities, visits, squares, len(rows)], rel=1e-5)
    assert bank_sums(made._replace(sums=found)) is found
    if made.wanted_experts is not None:
        # Straight through: what is counted are whole visits, and each asked for part has a gradient of one.
        gradient = torch.autograd.grad(found[-3], made.wanted_experts)[0]
        assert gradient.tolist() == [float(row in rows) for row in range(5)]


def test_sums_of_a_batch_are_exchanged_at_once_and_come_back_to_their_banks(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = banks(a={"router": "softmax"}, b={"router": "sigmoid"}, c={"router": "softmax", "num_experts": 4})
    layers = [{"a": routing(5), "b": routing(3, 1)}, {"c": routing(0, 2)}]
    seen: list[int] = []

    def double(sums: Tensor) -> Tensor:
        seen.append(len(sums))
        return 2 * sums

    alone = with_sums(layers, settings)
    monkeypatch.setitem(losses.SERVICES, "sum_over_batch", double)
    together = with_sums(layers, settings)
    assert seen == [3 * 11]
    for layer, one, both in zip(layers, alone, together, strict=True):
        for name, bank in layer.items():
            router = ROUTER_CLASSES[settings[name].router]
            assert torch.equal(one[name].sums, bank_sums(bank, router))
            assert torch.equal(both[name].sums, 2 * bank_sums(bank, router))
    assert with_sums([{}, {}], settings) == [{}, {}] and seen == [3 * 11]


def test_banks_that_had_tokens_count_alike_and_others_not_at_all() -> None:
    settings = banks(a={}, b={"router": "sigmoid", "balance": "switch"}, c={})
    layers = [{"a": routing(5), "b": routing(3, 1)}, {"c": routing(0, 2), "a": routing(4, 3, mask=[0] * 4)}]
    expected = (switch_loss(layers[0]["a"]) + switch_loss(layers[0]["b"], SigmoidRouter)) / 2
    assert balance_loss(layers, settings).item() == pytest.approx(expected.item(), rel=1e-6)
    mean = (z_loss(layers[0]["a"]) + z_loss(layers[0]["b"])) / 2
    assert mean_over_banks(layers, z_loss).item() == pytest.approx(mean.item(), rel=1e-6)
    assert mean_over_banks(layers[1:], z_loss).item() == 0.0


@pytest.mark.parametrize("rows", [1, 3])
def test_the_skip_budget_is_kept_where_the_open_share_is_the_rest(rows: int) -> None:
    logits = [torch.tensor([[1.0, -1.0, 2.0, -3.0]] * rows), torch.tensor([[1.0, 1.0, 1.0, -3.0]] * rows)]
    assert skip_budget_loss(logits, None, 0.2).item() == pytest.approx((5 / 8 - 0.8) ** 2, rel=1e-5)
    real = torch.tensor([[0, 1, 1, 0]] * rows)
    assert skip_budget_loss(logits, real, 0.2).item() == pytest.approx((3 / 4 - 0.8) ** 2, rel=1e-5)
    # Nothing is real: nothing is open.
    assert skip_budget_loss(logits, 0 * real, 0.2).item() == pytest.approx(0.64, rel=1e-5)


def test_the_skip_budget_of_ranks_weighs_their_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another rank has three open tokens of four."""
    monkeypatch.setitem(losses.SERVICES, "sum_over_batch", lambda sums: sums + torch.tensor([3.0, 4.0]))
    logits = [torch.tensor([[1.0, -1.0]])]
    assert skip_budget_loss(logits, None, 0.5).item() == pytest.approx((4 / 6 - 0.5) ** 2, rel=1e-5)
    real = torch.tensor([[1, 0]])
    assert skip_budget_loss(logits, real, 0.5).item() == pytest.approx((4 / 5 - 0.5) ** 2, rel=1e-5)


def test_the_expert_budget_is_that_of_a_bank_over_its_layers() -> None:
    settings = banks(a={"adaptive_experts": True, "mean_experts": 1.5}, b={"adaptive_experts": True, "mean_experts": 1})
    settings |= banks(c={})
    layers = [
        {"a": routing(2, asked=[1.0, 2.0]), "b": routing(2, asked=[1.0, 1.5]), "c": routing(2)},
        {"a": routing(4, asked=[2.0, 2.0, 2.0, 1.2]), "c": routing(3)},
    ]
    means = ((1 + 2 + 2 + 2 + 2 + 2) / 6 - 1.5) / 2, ((1 + 2) / 2 - 1) / 2
    found = expert_budget_loss(layers, settings)
    assert found.item() == pytest.approx((means[0] ** 2 + means[1] ** 2) / 2, rel=1e-5)
    assert expert_budget_loss([{"c": routing(2)}], settings) is None
    # A bank that no token entered has kept its budget.
    assert expert_budget_loss([{"a": routing(0, asked=[])}], settings).item() == 0.0
    assert expert_budget_loss([{"c": routing(2), "a": routing(2, asked=[1.0, 1.0])}], settings).item() == 0.0625


@pytest.mark.parametrize("items", [4, torch.tensor(4), 0])
def test_a_micro_batch_counts_by_its_labels(items: Any) -> None:
    labels = torch.tensor([[7, -100, 8, 9], [-100, -100, 5, -100]])
    assert float(share_of_batch(labels, items)) == 3 / max(int(items), 1)
    assert share_of_batch(None, items) == share_of_batch(labels, None) == 1.0


SCORES = torch.tensor([[2.0, 0.5, -1.0], [0.0, 1.0, 3.0], [1.5, 0.0, -2.0]])


def test_contrastive_losses_are_those_of_their_papers() -> None:
    rows, clip, siglip = range(3), 0.0, 0.0
    for i in rows:
        clip -= math.log(math.exp(SCORES[i, i]) / sum(math.exp(SCORES[i, j]) for j in rows)) / 6
        clip -= math.log(math.exp(SCORES[i, i]) / sum(math.exp(SCORES[j, i]) for j in rows)) / 6
        for j in rows:
            sign = 1 if i == j else -1
            siglip -= math.log(1 / (1 + math.exp(-sign * SCORES[i, j]))) / 3
    assert infonce_loss(SCORES).item() == pytest.approx(clip, rel=1e-5)
    assert sigmoid_loss(SCORES).item() == pytest.approx(siglip, rel=1e-5)
    # In float32 whatever comes in.
    for loss in losses.CONTRASTIVE_LOSSES.values():
        assert loss(SCORES.bfloat16()).dtype == torch.float32
        torch.testing.assert_close(loss(SCORES.bfloat16()), loss(SCORES.bfloat16().float()), rtol=0, atol=0)


def test_how_much_a_text_looks_at_an_image_is_a_mean_of_logarithms() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4)
    text = torch.tensor([[0, 1, 1, 0, 0], [0, 0, 0, 1, 0]], dtype=torch.bool)
    image = torch.tensor([[1, 0, 0, 1, 1], [0, 1, 0, 0, 0]], dtype=torch.bool)
    found = pair_scores(query, key, text, image, 0.5)
    for i in range(2):
        for j in range(2):
            for head in range(3):
                looks = (query[i, head, text[i]] @ key[j, head, image[j]].T * 0.5).exp().mean(dim=1).log().mean()
                torch.testing.assert_close(found[i, head, j], looks, rtol=1e-5, atol=1e-6)


class Ranks:
    """torch's collectives as one process of several sees them: rows of each, asked by the one that holds `rank`."""

    def __init__(self, rows: list[Tensor], rank: int, monkeypatch: pytest.MonkeyPatch):
        self.rows = rows
        for name, value in (("is_available", True), ("is_initialized", True), ("get_world_size", len(rows))):
            monkeypatch.setattr(dist, name, lambda value=value: value)
        monkeypatch.setattr(dist, "get_rank", lambda: rank)
        monkeypatch.setattr(dist, "all_gather", self.all_gather)

    def all_gather(self, into: list[Tensor], given: Tensor) -> None:
        longest = max(len(rows) for rows in self.rows)
        for place, rows in zip(into, self.rows, strict=True):
            is_count = given.dtype == torch.int64
            place.copy_(torch.tensor([len(rows)]) if is_count else F.pad(rows, (0, 0, 0, longest - len(rows))))


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_rows_of_all_ranks_are_gathered_in_their_order(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [torch.full((count, 2), float(count)) for count in (2, 1, 3)]
    own = rows[rank].clone().requires_grad_()
    Ranks(rows, rank, monkeypatch)
    found = rows_of_all_ranks(own)
    assert torch.equal(found, torch.cat(rows))
    found.sum().backward()
    # Times the ranks, by which gradients are divided afterwards.
    assert own.grad is not None and own.grad.eq(3).all()


@pytest.mark.parametrize("rank", [0, 1, 2, 3])
def test_ranks_that_hold_copies_are_counted_once(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [torch.full((2, 2), float(value)) for value in (1, 1, 5, 5)]
    own = rows[rank].clone().requires_grad_()
    Ranks(rows, rank, monkeypatch)
    found = rows_of_all_ranks(own, copies=2)
    assert torch.equal(found, torch.cat((rows[0], rows[2])))
    found.sum().backward()
    assert own.grad is not None and own.grad.eq(2).all()
    assert rows_of_all_ranks(own, copies=4) is own


def test_one_process_has_its_own_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    own = torch.ones(2, 2)
    assert rows_of_all_ranks(own) is own
    Ranks([own], 0, monkeypatch)
    assert rows_of_all_ranks(own) is own
    Ranks([own, own], 0, monkeypatch)
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    assert rows_of_all_ranks(own) is own
