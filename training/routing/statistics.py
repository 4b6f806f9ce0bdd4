"""What counters say about routing: pure functions of counts, and a summary of a model.

Mutual information is the plug-in estimate from the counts, in bits. It is biased upwards by about
`(rows - 1) * (columns - 1) / (2 ln 2 * n)` bits for n observations (Miller 1955): 0.001 bits for three modalities,
eight experts and 10,000 tokens, but 0.5 bits for 20.

Shape suffixes: E experts in the bank, M modalities, N banks of a layer.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from chorus_moe.modeling.configuration_modalities import MODALITY_IDS
from chorus_moe.surgery.printing import Table
from chorus_moe.training.routing.counters import BankCounters, RoutingCounters

# How many banks are logged by name: the least balanced ones.
NAMED_BANKS = 8
COLUMNS = (
    "layer", "bank", "tokens", "load entropy", "router entropy", "dead", "strongest", "rerouted", "dropped",
    "expert bits", "bank bits",
)  # fmt: skip
BITS = "bits: what an expert of the bank, and in each layer the bank, tell about the modality of a token"


def load_entropy(count_E: np.ndarray) -> float:
    """Entropy of the load over log E: 1 when all experts are chosen alike, 0 when one is always; NaN for no choice."""
    return entropy_bits(count_E) / math.log2(len(count_E))


def dead_experts(count_E: np.ndarray) -> int:
    """Experts that nothing chose. Fewer choices than experts leave some dead by necessity."""
    return int((count_E == 0).sum())


def strongest_share(count_E: np.ndarray) -> float:
    """Share of the choices that fell on the most chosen expert: 1 / E at perfect balance, 1 / K when K experts are all
    that is used; NaN for no choice."""
    total = count_E.sum()
    return float(count_E.max() / total) if total else math.nan


def mutual_information(joint: np.ndarray) -> float:
    """Bits that rows and columns of a table of counts or weights tell about each other; NaN for an empty table.

    0 when they are independent, at most the smaller of the two entropies.
    """
    if not joint.sum() > 0:
        return math.nan
    bits = entropy_bits(joint.sum(axis=1)) + entropy_bits(joint.sum(axis=0)) - entropy_bits(joint.ravel())
    # Rounding can give a tiny negative number.
    return max(bits, 0.0)


def entropy_bits(count: np.ndarray) -> float:
    """Entropy of the shares of a vector of counts or weights, in bits; NaN if all are zero."""
    total = count.sum()
    if not total > 0:
        return math.nan
    # The limit of x log x at 0 is 0, but the logarithm alone is not.
    share = count[count > 0] / total
    return abs(float((share * np.log2(share)).sum()))


@dataclass(frozen=True)
class BankStatistics:
    """One bank of one layer. NaN where there was nothing to measure.

    Args:
        tokens: tokens that entered the bank.
        load_entropy, dead_experts, strongest_share: see the functions of these names.
        router_entropy: mean entropy of the router's probabilities, 0 (certain) to 1 (all experts alike).
        experts_per_token: choices per token, below K where slots stay unused.
        expert_information: bits that an expert tells about the modality; NaN in a bank open to one modality.
        rerouted, dropped: share of the choices that met a full expert and went elsewhere, or nowhere; NaN without a
            capacity.
    """

    layer: int
    bank: str
    num_experts: int
    tokens: int
    load_entropy: float
    dead_experts: int
    strongest_share: float
    router_entropy: float
    experts_per_token: float
    expert_information: float
    rerouted: float
    dropped: float


@dataclass(frozen=True)
class RoutingSummary:
    """All banks of all layers, and for each layer the bits that the bank tells about the modality (from the weights of
    the gate; NaN in a layer of one bank)."""

    banks: list[BankStatistics]
    bank_information: dict[int, float]

    def to_dict(self) -> dict[str, Any]:
        """For JSON, where NaN is None."""
        return {
            "banks": [_without_nan(asdict(bank)) for bank in self.banks],
            "bank_information": _without_nan({str(k): v for k, v in self.bank_information.items()}),
        }

    def table(self) -> Table:
        """A row for each bank of each layer."""
        rows, shown = [], set()
        for bank in self.banks:
            # Bits of a layer stand in the line of its first bank.
            information = math.nan if bank.layer in shown else self.bank_information[bank.layer]
            shown.add(bank.layer)
            rows.append(
                (
                    bank.layer,
                    bank.bank,
                    f"{bank.tokens:,}",
                    _cell(bank.load_entropy, ".3f"),
                    _cell(bank.router_entropy, ".3f"),
                    f"{bank.dead_experts}/{bank.num_experts}" if bank.tokens else "-",
                    _cell(bank.strongest_share, ".1%"),
                    _cell(bank.rerouted, ".1%"),
                    _cell(bank.dropped, ".1%"),
                    _cell(bank.expert_information, ".3f"),
                    _cell(information, ".3f"),
                )
            )
        return Table(COLUMNS, rows)

    def _repr_html_(self) -> str:
        return self.table().to_html() + f"<p>{BITS}</p>"


def _cell(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)


def bank_statistics(layer: int, counters: BankCounters) -> BankStatistics:
    choices_ME, tokens = counters.choices_ME.cpu().numpy(), int(counters.tokens_M.sum())
    count_E = choices_ME.sum(axis=0)
    chosen, wanted = int(count_E.sum()), int(count_E.sum()) + counters.dropped
    # In a bank of one modality the expert cannot tell anything about it: 0 bits would look like a finding.
    several, limited = len(counters.bank.modalities) > 1, counters.bank.expert_capacity is not None
    return BankStatistics(
        layer=layer,
        bank=counters.bank.name,
        num_experts=counters.bank.num_experts,
        tokens=tokens,
        load_entropy=load_entropy(count_E),
        dead_experts=dead_experts(count_E),
        strongest_share=strongest_share(count_E),
        router_entropy=float(counters.entropy_M.sum()) / tokens if tokens else math.nan,
        experts_per_token=chosen / tokens if tokens else math.nan,
        expert_information=mutual_information(choices_ME) if several else math.nan,
        rerouted=counters.rerouted / wanted if limited and wanted else math.nan,
        dropped=counters.dropped / wanted if limited and wanted else math.nan,
    )


def summarise(counters: RoutingCounters) -> RoutingSummary:
    """The statistics of every bank and layer."""
    information = {}
    for layer, banks in counters.banks.items():
        gate_MN = np.stack([bank.gate_M.cpu().numpy() for bank in banks.values()], axis=1)
        information[layer] = mutual_information(gate_MN) if len(banks) > 1 else math.nan
    statistics = [bank_statistics(layer, bank) for layer, found in counters.banks.items() for bank in found.values()]
    return RoutingSummary(statistics, information)


def routing_metrics(summary: RoutingSummary) -> dict[str, float]:
    """A few numbers for a training log, however many layers and banks there are.

    Means are over the banks of all layers that had tokens. `routing_load_entropy_{bank}` is the lowest of a bank's
    layers, for the `NAMED_BANKS` least balanced banks. A number that nothing was measured for is left out.
    """
    used = [bank for bank in summary.banks if bank.tokens]
    if not used:
        return {}
    worst: dict[str, float] = {}
    for bank in used:
        # The least balanced layer: a mean would hide a single layer that collapsed.
        worst[bank.bank] = min(bank.load_entropy, worst.get(bank.bank, math.inf))
    # The least balanced first, then by name, so that a tracker's columns keep their order.
    named = sorted(sorted(worst, key=lambda name: worst[name])[:NAMED_BANKS])
    metrics = {
        "routing_load_entropy": _mean([bank.load_entropy for bank in used]),
        "routing_router_entropy": _mean([bank.router_entropy for bank in used]),
        "routing_strongest_share": max(bank.strongest_share for bank in used),
        "routing_dead_experts": float(sum(bank.dead_experts for bank in used)),
        "routing_experts_per_token": _mean([bank.experts_per_token for bank in used]),
        "routing_bank_information": _mean(list(summary.bank_information.values())),
        "routing_expert_information": _mean([bank.expert_information for bank in used]),
        "routing_rerouted": _mean([bank.rerouted for bank in used]),
        "routing_dropped": _mean([bank.dropped for bank in used]),
        **{f"routing_load_entropy_{name}": worst[name] for name in named},
    }
    return {name: value for name, value in metrics.items() if not math.isnan(value)}


def routing_shares(counters: RoutingCounters) -> dict[str, np.ndarray]:
    """Where the tokens of each modality go: bank -> `(sparse layers, modalities, experts)`.

    Each entry is the share of a modality's routed weight (bank gate times router) in that layer; over all banks and
    experts the shares of a layer and modality sum to one. A layer that does not hold the bank has zeros; where a layer
    has fewer experts of the bank than another, NaN stands for those that it lacks.
    """
    shape = len(counters.banks), len(MODALITY_IDS)
    # A bank may have another number of experts in each layer.
    widest = {bank.name: np.max(bank.num_experts) for bank in counters.config.banks}
    shares = {name: np.zeros((*shape, experts)) for name, experts in widest.items()}
    for row, banks in enumerate(counters.banks.values()):
        total_M1 = sum(bank.weights_ME.cpu().numpy().sum(axis=1, keepdims=True) for bank in banks.values())
        for name, bank in banks.items():
            experts = bank.bank.num_experts
            shares[name][row, :, :experts] = bank.weights_ME.cpu().numpy() / np.maximum(total_M1, 1e-12)
            shares[name][row, :, experts:] = np.nan
    return shares


def _mean(values: list[float]) -> float:
    found = [value for value in values if not math.isnan(value)]
    return sum(found) / len(found) if found else math.nan


def _without_nan(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in values.items()}
