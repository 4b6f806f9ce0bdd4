"""Counters of routing against a loop over tokens: modalities, unused slots, rows that do not count, sums."""

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from chorus_moe.modeling.configuration_banks import LayerBankConfig
from chorus_moe.modeling.modeling_outputs import BankRouting
from chorus_moe.training.routing import counters as module
from chorus_moe.training.routing.counters import BankCounters, RoutingCounters, sum_over_ranks
from tests.conftest import tiny_config

E, K, M = 4, 2, 3


def bank_of(name: str = "common", **settings: Any) -> LayerBankConfig:
    banks = tiny_config(expert_banks={"text": {}, "image": {}, "common": settings}).text_config.banks_of_layer(1)
    return {bank.name: bank for bank in banks}[name]


def routing_of(size: int, seed: int = 0, **fields: Any) -> BankRouting:
    """Random choices; the last slot of the last row is not used."""
    generator = torch.Generator().manual_seed(seed)
    selected = torch.rand(size, E, generator=generator).topk(K).indices
    weights = torch.rand(size, K, generator=generator)
    if size:
        selected[-1, -1], weights[-1, -1] = E, 0.0
    given = {"token_mask": None, "bank_weights": torch.rand(size, generator=generator)} | fields
    return BankRouting(2 * torch.randn(size, E, generator=generator), weights, selected, **given)


def probabilities(logits: list[float], router: str) -> list[float]:
    each = [1 / (1 + math.exp(-x)) if router == "sigmoid" else math.exp(x) for x in logits]
    return [value / sum(each) for value in each]


def by_hand(routing: BankRouting, column_T: list[int], router: str) -> dict[str, Tensor]:
    """What counters hold, one token after the other."""
    found = {name: torch.zeros(M, E, dtype=torch.float64) for name in ("choices_ME", "weights_ME", "probabilities_ME")}
    found |= {name: torch.zeros(M, dtype=torch.float64) for name in ("tokens_M", "entropy_M", "gate_M")}
    for token, column in enumerate(column_T):
        if column == M:
            continue
        gate = 1.0 if routing.bank_weights is None else float(routing.bank_weights[token])
        found["tokens_M"][column] += 1
        found["gate_M"][column] += 0.0 if routing.bank_weights is None else gate
        each = probabilities(routing.router_logits[token].tolist(), router)
        found["probabilities_ME"][column] += torch.tensor(each, dtype=torch.float64)
        found["entropy_M"][column] -= sum(p * math.log(p) for p in each) / math.log(E)
        for expert, weight in zip(
            routing.selected_experts[token].tolist(), routing.routing_weights[token].tolist(), strict=True
        ):
            if expert < E:
                found["choices_ME"][column, expert] += 1
                found["weights_ME"][column, expert] += gate * weight
    return found


def check(counters: BankCounters, expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        # float32 probabilities, summed in float64.
        torch.testing.assert_close(getattr(counters, name).double(), value, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
@pytest.mark.parametrize("has_gate", [True, False])
def test_counts_are_those_of_a_loop_over_tokens(router: str, has_gate: bool) -> None:
    counters, total = BankCounters(bank_of(router=router)), None
    for seed in (0, 1):
        column_T = [0, 2, 1, 0, 3, 2, 0]
        routing = routing_of(len(column_T), seed, **({} if has_gate else {"bank_weights": None}))
        counters.count(routing, torch.tensor(column_T))
        found = by_hand(routing, column_T, router)
        total = found if total is None else {name: total[name] + found[name] for name in found}
    assert total is not None
    check(counters, total)
    assert (counters.rerouted, counters.dropped) == (0, 0)


@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows_are_counted(rows: int) -> None:
    counters, routing = BankCounters(bank_of()), routing_of(rows)
    counters.count(routing, torch.full((rows,), 1))
    check(counters, by_hand(routing, [1] * rows, "softmax"))


def test_a_router_that_is_sure_has_no_entropy_and_one_that_is_not_has_all() -> None:
    counters, even = BankCounters(bank_of()), routing_of(2)
    logits = torch.tensor([[0.0, 0, 0, 0], [1e4, 0, 0, 0]])
    counters.count(even._replace(router_logits=logits), torch.tensor([0, 1]))
    # Of the sure one, probabilities of zero are taken for the smallest number.
    torch.testing.assert_close(counters.entropy_M, torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64))


def test_choices_without_room_add_up_and_only_where_both_are_known() -> None:
    counters, column = BankCounters(bank_of()), torch.zeros(3, dtype=torch.int64)
    for rerouted, dropped in ((1, 5), (2, 0)):
        both = {"num_rerouted": torch.tensor(rerouted), "num_dropped": torch.tensor(dropped)}
        counters.count(routing_of(3, **both), column)
    counters.count(routing_of(3, num_rerouted=torch.tensor(7)), column)
    counters.count(routing_of(3, num_dropped=torch.tensor(7)), column)
    assert (counters.rerouted, counters.dropped) == (3, 5)


def test_counters_add_clear_and_move_with_all_that_they_hold() -> None:
    first, second = BankCounters(bank_of()), BankCounters(bank_of())
    column_T = torch.tensor([0, 1, 2, 3])
    both = {"num_rerouted": torch.tensor(1), "num_dropped": torch.tensor(2)}
    first.count(routing_of(4, 0, **both), column_T)
    second.count(routing_of(4, 1, **both), column_T)
    expected = {name: getattr(first, name) + getattr(second, name) for name in by_hand(routing_of(1), [0], "softmax")}
    first.add(second)
    check(first, {name: value.double() for name, value in expected.items()})
    assert (first.rerouted, first.dropped) == (2, 4)
    first.to("cpu")
    check(first, {name: value.double() for name, value in expected.items()})
    first.to("meta")
    assert first.choices_ME.device.type == first.gate_M.device.type == "meta"
    second.clear()
    assert not second.integers.any() and not second.reals.any() and not second.choices_ME.any()
    assert (second.integers.dtype, second.reals.dtype) == (torch.int64, torch.float64)


def test_counters_follow_the_device_of_the_rows() -> None:
    counters = BankCounters(bank_of(), device="meta")
    moved: list[object] = []
    counters.to = moved.append  # type: ignore[method-assign, assignment]
    with pytest.raises(RuntimeError):
        counters.count(routing_of(2), torch.zeros(2, dtype=torch.int64))
    assert moved == [torch.device("cpu")]


def test_apples_gpus_have_no_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, dtype, device: made.append(dtype) or zeros(*size, dtype=dtype))
    BankCounters(bank_of(), "mps")
    BankCounters(bank_of(), "cuda:1")
    assert made == [torch.int64, torch.float32, torch.int64, torch.float64]


def layers_of(config: Any, fields: dict[str, dict[str, Any]]) -> list[dict[str, BankRouting]]:
    """For each sparse layer the same routing; `rows` says how many."""
    text = config.text_config
    given = {name: dict(value) for name, value in fields.items()}
    sizes = {name: value.pop("size") for name, value in given.items()}
    return [
        {bank.name: routing_of(sizes[bank.name], **given[bank.name]) for bank in text.banks_of_layer(layer)}
        for layer in text.sparse_layers
    ]


BANKS = {"num_hidden_layers": 2, "expert_banks": {"text": {}, "common": {}}}
# Text, image and sound as `mm_token_type_ids` write them; columns are 0, 1 and 2.
TYPES = [0, 0, 1, 3, 3, 0]


def test_rows_have_the_modality_of_their_token_and_padding_does_not_count() -> None:
    config = tiny_config(**BANKS)
    mask = torch.tensor([True, True, False])
    fields = {
        "text": {"size": 3, "rows": torch.tensor([0, 1, 5]), "token_mask": mask},
        "common": {"size": 6, "token_mask": torch.tensor([True, True, True, True, False, True])},
    }
    counters = RoutingCounters(config.text_config)
    counters.count(layers_of(config, fields), torch.tensor(TYPES))
    assert {layer: list(banks) for layer, banks in counters.banks.items()} == {1: ["common", "text"]}
    assert counters.banks[1]["text"].tokens_M.tolist() == [2, 0, 0]
    assert counters.banks[1]["common"].tokens_M.tolist() == [3, 1, 1]
    assert counters.num_tokens == 7
    counters.count(layers_of(config, {name: value | {"token_mask": None} for name, value in fields.items()}), None)
    # Without types all is text.
    assert counters.banks[1]["common"].tokens_M.tolist() == [9, 1, 1]
    assert counters.num_tokens == 16
    more = RoutingCounters(config.text_config)
    more.add(counters)
    more.add(counters)
    assert more.num_tokens == 32
    counters.clear()
    assert (counters.num_tokens, more.num_tokens) == (0, 32)


def test_columns_are_made_once_for_the_same_rows_and_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    config, calls = tiny_config(), []
    real = module._columns
    monkeypatch.setattr(module, "_columns", lambda *given: calls.append(given) or real(*given))
    text = config.text_config
    one, other = routing_of(6), routing_of(6, rows=torch.arange(6))
    layers = [
        {bank.name: other if (layer, bank.name) == (1, "text") else one for bank in text.banks_of_layer(layer)}
        for layer in text.sparse_layers
    ]
    RoutingCounters(text).count(layers, torch.tensor(TYPES))
    assert len(calls) == 2 and {given[0].rows is None for given in calls} == {True, False}


def test_a_layer_too_few_is_an_error() -> None:
    config = tiny_config()
    with pytest.raises(ValueError, match="shorter"):
        RoutingCounters(config.text_config).count([], None)


@pytest.fixture
def two_ranks(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Two ranks with the same numbers: the sum is twice one's own."""
    exchanged: list[Tensor] = []

    def all_reduce(tensor: Tensor, group: object = None) -> None:
        exchanged.append(tensor.clone())
        tensor.mul_(2)

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    return exchanged


def test_ranks_add_up_in_one_exchange(two_ranks: list[Tensor]) -> None:
    found = sum_over_ranks(iter([torch.tensor([[1, 2], [3, 4]]), torch.tensor(5), torch.zeros(0, dtype=torch.int64)]))
    assert [tensor.tolist() for tensor in found] == [[[2, 4], [6, 8]], 10, []]
    assert len(two_ranks) == 1
    assert sum_over_ranks([]) == [] and len(two_ranks) == 1
    counters = RoutingCounters(tiny_config(**BANKS).text_config)
    config = tiny_config(**BANKS)
    fields = {"text": {"size": 3, "rows": torch.tensor([0, 1, 5])}, "common": {"size": 6}}
    counters.count(layers_of(config, fields), torch.tensor(TYPES))
    total = counters.over_ranks()
    assert len(two_ranks) == 3
    assert (counters.num_tokens, total.num_tokens) == (9, 18)
    for one, both in zip(counters.all(), total.all(), strict=True):
        assert torch.equal(2 * one.integers, both.integers) and torch.equal(2 * one.reals, both.reals)


@pytest.mark.parametrize(("initialized", "copies"), [(False, 1), (True, 2)])
def test_a_rank_that_has_all_rows_keeps_its_numbers(
    two_ranks: list[Tensor], monkeypatch: pytest.MonkeyPatch, initialized: bool, copies: int
) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: initialized)
    monkeypatch.setattr(module, "num_copies", lambda: copies)
    given = [torch.ones(2)]
    assert sum_over_ranks(given)[0] is given[0] and not two_ranks
