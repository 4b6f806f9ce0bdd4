"""Statistics of counts whose answer is known, and how many of them are logged."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from chorus_moe import ChorusConfig, ChorusForConditionalGeneration
from chorus_moe.training.routing.counters import BankCounters
from chorus_moe.training.routing.observer import RoutingObserver
from chorus_moe.training.routing.statistics import (
    NAMED_BANKS,
    BankStatistics,
    RoutingSummary,
    bank_statistics,
    dead_experts,
    load_entropy,
    mutual_information,
    routing_metrics,
    routing_shares,
    strongest_share,
    summarise,
)


@pytest.mark.parametrize(
    ("count", "entropy", "dead", "strongest"),
    [([5, 5, 5, 5], 1.0, 0, 0.25), ([7, 0, 0, 0], 0.0, 3, 1.0), ([3, 3, 0, 0], 0.5, 2, 0.5)],
)
def test_the_load_of_known_counts(count: list[int], entropy: float, dead: int, strongest: float) -> None:
    count_E = np.array(count)
    assert load_entropy(count_E) == pytest.approx(entropy)
    assert (dead_experts(count_E), strongest_share(count_E)) == (dead, strongest)


def test_no_choice_has_no_entropy() -> None:
    assert math.isnan(load_entropy(np.zeros(4))) and math.isnan(strongest_share(np.zeros(4)))


@pytest.mark.parametrize(
    ("joint", "bits"),
    [([[4, 0], [0, 4]], 1.0), ([[2, 2], [2, 2]], 0.0), ([[1, 3], [2, 6]], 0.0), ([[8, 0, 0], [0, 4, 4]], 1.0)],
)
def test_mutual_information_in_bits(joint: list[list[int]], bits: float) -> None:
    assert mutual_information(np.array(joint)) == pytest.approx(bits, abs=1e-12)


def test_mutual_information_is_biased_upwards_as_documented() -> None:
    """Independent modality and expert: the mean estimate is what Miller's formula says."""
    rng, n = np.random.default_rng(0), 200
    tables = [rng.multinomial(n, np.full(24, 1 / 24)).reshape(3, 8) for _ in range(400)]
    bias = (3 - 1) * (8 - 1) / (2 * math.log(2) * n)
    # The formula's next term is of order 1 / n^2; seen: 0.0515 for 0.0505.
    assert np.mean([mutual_information(table) for table in tables]) == pytest.approx(bias, rel=0.05)


def test_a_collapsed_bank_is_not_hidden_by_its_neighbour(
    model: ChorusForConditionalGeneration, batch: dict[str, torch.Tensor]
) -> None:
    with RoutingObserver(model) as observer:
        model(**batch)
    text, common = observer.counters.banks[1]["text"], observer.counters.banks[1]["common"]
    text.choices_ME.zero_()
    common.choices_ME.zero_()
    text.choices_ME[0, 0] = common.choices_ME[0, 1] = 100
    metrics = routing_metrics(summarise(observer.counters))
    assert metrics["routing_load_entropy_text"] == metrics["routing_load_entropy_common"] == 0
    assert metrics["routing_strongest_share"] == 1


def statistics(layer: int, bank: str, entropy: float) -> BankStatistics:
    return BankStatistics(layer, bank, 8, 10, entropy, 0, 0.5, 0.5, 2.0, math.nan, math.nan, math.nan)


def test_the_number_of_logged_metrics_is_bounded() -> None:
    banks = [statistics(layer, f"bank{i}", i / 40 + layer / 1e4) for layer in range(48) for i in range(40)]
    metrics = routing_metrics(RoutingSummary(banks, dict.fromkeys(range(48), 0.25)))
    named = [name for name in metrics if name.startswith("routing_load_entropy_bank")]
    assert named == [f"routing_load_entropy_bank{i}" for i in range(NAMED_BANKS)]
    assert metrics["routing_load_entropy_bank3"] == 3 / 40
    assert len(metrics) <= NAMED_BANKS + 9


def test_what_was_not_measured_is_left_out(
    model: ChorusForConditionalGeneration, batch: dict[str, torch.Tensor]
) -> None:
    observer = RoutingObserver(model)
    assert routing_metrics(summarise(observer.counters)) == {}
    with observer:
        model(**batch)
    summary = summarise(observer.counters)
    assert "routing_dropped" not in routing_metrics(summary)
    assert all(math.isfinite(value) for value in routing_metrics(summary).values())
    json.dumps(summary.to_dict(), allow_nan=False)


def test_banks_of_one_modality_tell_it_apart(
    model: ChorusForConditionalGeneration, batch: dict[str, torch.Tensor]
) -> None:
    """A gate that ignores the common bank sends every modality to a bank of its own: all bits of the modality."""
    with RoutingObserver(model) as observer:
        model(**batch)
    banks = observer.counters.banks[1]
    for bank in banks.values():
        bank.gate_M.copy_(banks["common"].tokens_M if bank.bank.name != "common" else 0.0 * bank.gate_M)
        bank.gate_M.mul_(torch.tensor([name in bank.bank.modalities for name in ("text", "image", "audio")]))
    share = banks["common"].tokens_M.numpy() / int(banks["common"].tokens_M.sum())
    entropy = -(share * np.log2(share)).sum()
    assert summarise(observer.counters).bank_information[1] == pytest.approx(entropy)


def test_the_shares_of_a_layer_and_modality_sum_to_one(
    model: ChorusForConditionalGeneration, batch: dict[str, torch.Tensor]
) -> None:
    with RoutingObserver(model) as observer:
        model(**batch)
    shares = routing_shares(observer.counters)
    assert {name: share.shape for name, share in shares.items()} == dict.fromkeys(shares, (2, 3, 4))
    np.testing.assert_allclose(sum(share.sum(axis=2) for share in shares.values()), 1.0, rtol=1e-12)


@pytest.mark.parametrize("capacity", [None, 1.0])
def test_the_statistics_of_counts_by_hand(capacity: float | None, config: ChorusConfig) -> None:
    bank = next(bank for bank in config.text_config.banks if bank.name == "common").of_layer(1, [1, 2])
    counters = BankCounters(dataclasses.replace(bank, num_experts=4, expert_capacity=capacity))
    counters.tokens_M += torch.tensor([6, 2, 0])
    counters.choices_ME[:2] += torch.tensor([[6, 2, 0, 0], [0, 4, 0, 0]])
    counters.entropy_M += torch.tensor([3.0, 1.0, 0.0])
    counters._overflow += torch.tensor([2, 4])
    found = bank_statistics(5, counters)
    assert (found.layer, found.bank, found.num_experts, found.tokens) == (5, "common", 4, 8)
    assert (found.experts_per_token, found.router_entropy, found.dead_experts) == (12 / 8, 4 / 8, 2)
    # Of the twelve choices and the four that were dropped.
    shares = [found.rerouted, found.dropped]
    assert shares == [2 / 16, 4 / 16] if capacity else all(map(math.isnan, shares))
    assert found.strongest_share == 6 / 12
