"""What a caller may ask of the routers in one call, and what each bank's rows make of it.

Unusual here:
- options travel in the modality plan, so layers need no further arguments and nothing is stored in a module;
- they are worked out once a forward for each set of modalities, not once a layer;
- without any option there is no object at all, and the plain path costs nothing.

Shape suffixes: B batch, S sequence, T tokens (B * S), R rows of a bank.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.masking_utils import find_packed_sequence_indices

from .configuration_banks import MODALITY_IDS, ExpertBankConfig, check_name
from .expert_capacity import Places


class RowOptions(NamedTuple):
    """Options for the rows of one bank.

    Args:
        complexity_R: complexity between 0 and 1 from the caller; NaN where the router's entropy stands for it.
        budget_R: experts that a row may visit at most.
        places: where each row stands in its sequence, where capacity is limited.
        is_sampled: experts are drawn, not ranked.
    """

    complexity_R: Tensor | None = None
    budget_R: Tensor | None = None
    places: Places | None = None
    is_sampled: bool = False


@dataclass
class RoutingOptions:
    """Options of one forward.

    Args:
        complexity_T: see `RowOptions.complexity_R`.
        budget: modality -> experts that a token may visit at most in each bank.
        sampled_banks: names of the banks whose experts are drawn.
        sequence_T: the sequence of each token, where some bank limits its capacity.
        limited_banks: names of the banks that do.
        closed_banks: names of the banks that are passed by.
    """

    complexity_T: Tensor | None
    budget: dict[str, int]
    sampled_banks: frozenset[str]
    sequence_T: Tensor | None
    limited_banks: frozenset[str]
    closed_banks: frozenset[str] = frozenset()

    def at(self, origin: Tensor) -> "RoutingOptions":
        """The options of some tokens, given by their indices."""
        complexity_T = None if self.complexity_T is None else self.complexity_T[origin]
        sequence_T = None if self.sequence_T is None else self.sequence_T[origin]
        return replace(self, complexity_T=complexity_T, sequence_T=sequence_T)

    def of_rows(
        self, bank: str, modalities: Iterable[str], modality_T: Tensor, rows: Tensor | None, token_mask: Tensor | None
    ) -> RowOptions | None:
        """Options of one bank for its rows; None if it has none."""

        def take(values_T: Tensor | None) -> Tensor | None:
            return values_T if values_T is None or rows is None else values_T.index_select(0, rows)

        budget_R = None
        if any(name in self.budget for name in modalities):
            table = modality_T.new_full((max(MODALITY_IDS.values()) + 1,), torch.iinfo(torch.int64).max)
            for name, count in self.budget.items():
                table[MODALITY_IDS[name]] = count
            budget_R = table[take(modality_T)]
        places = Places.find(take(self.sequence_T), token_mask) if bank in self.limited_banks else None
        is_sampled = bank in self.sampled_banks
        if self.complexity_T is None and budget_R is None and places is None and not is_sampled:
            return None
        return RowOptions(take(self.complexity_T), budget_R, places, is_sampled)


def read_routing_options(
    banks: Mapping[str, ExpertBankConfig],
    modality_BS: Tensor,
    position_ids: Tensor | None,
    is_training: bool,
    cache: Cache | None,
    complexity_scores: Tensor | None,
    expert_budget: Mapping[str, int] | None,
    sample_experts: Collection[str] | None,
    closed_banks: Collection[str] | None = None,
) -> RoutingOptions | None:
    """Check what was asked for; None if nothing was.

    Args:
        position_ids: as the caller gave them; a jump starts a new sequence (packing).
        complexity_scores: `(B, S)`, between 0 and 1; NaN where the router's entropy is to be used.
        expert_budget: modality -> number of experts.
        sample_experts: names of banks.
        closed_banks: names of banks, besides those whose configuration closes them.

    Raises:
        ValueError: naming the argument, the bank or modality, and the numbers.
    """
    limited = frozenset(name for name, bank in banks.items() if bank.limits_capacity(is_training))
    num_cached = int(cache.get_seq_length()) if limited and cache is not None else 0
    if num_cached:
        raise ValueError(
            f"expert bank {min(limited)!r} limits the capacity of its experts, counted over the whole sequence, but of "
            f"{num_cached} tokens the cache holds keys and values and not what they chose; use use_cache=False, or "
            "leave capacity_in_eval out"
        )
    complexity_T = _read_complexity(banks, modality_BS, complexity_scores)
    budget = _read_budget(expert_budget or {})
    closed = _read_closed(banks, closed_banks or ())
    sampled = _read_sampled(banks, limited, closed, sample_experts or ())
    if not (limited or budget or sampled or closed) and complexity_T is None:
        return None
    sequence_T = _sequences(modality_BS, position_ids) if limited else None
    return RoutingOptions(complexity_T, budget, sampled, sequence_T, limited, closed)


def _read_complexity(
    banks: Mapping[str, ExpertBankConfig], modality_BS: Tensor, complexity_scores: Tensor | None
) -> Tensor | None:
    if complexity_scores is None:
        return None
    if complexity_scores.shape != modality_BS.shape:
        raise ValueError(
            f"complexity_scores has shape {tuple(complexity_scores.shape)}, the tokens have {tuple(modality_BS.shape)}"
        )
    if not any(bank.adaptive_experts for bank in banks.values()):
        raise ValueError(f"complexity_scores changes nothing: no bank of {sorted(banks)} has adaptive_experts=True")
    if not torch.compiler.is_compiling() and bool(((complexity_scores < 0) | (complexity_scores > 1)).any()):
        raise ValueError(
            f"complexity_scores lie between {complexity_scores.nan_to_num(0).min():g} and "
            f"{complexity_scores.nan_to_num(0).max():g}; they must lie between 0 and 1"
        )
    return complexity_scores.reshape(-1).to(modality_BS.device, torch.float32)


def _read_budget(expert_budget: Mapping[str, int]) -> dict[str, int]:
    for name, count in expert_budget.items():
        check_name("expert_budget", "modality", name, MODALITY_IDS)
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"expert_budget[{name!r}]={count!r} must be a whole number of at least 1")
    return dict(expert_budget)


def _check_banks(argument: str, banks: Mapping[str, ExpertBankConfig], names: Collection[str]) -> None:
    if isinstance(names, str):
        raise ValueError(f"{argument}={names!r} is a string; give the names of banks, as in ('text',)")
    for name in names:
        check_name(argument, "bank", name, banks)


def _read_closed(banks: Mapping[str, ExpertBankConfig], closed_banks: Collection[str]) -> frozenset[str]:
    _check_banks("closed_banks", banks, closed_banks)
    return frozenset(closed_banks) | {name for name, bank in banks.items() if bank.closed}


def _read_sampled(
    banks: Mapping[str, ExpertBankConfig],
    limited: Collection[str],
    closed: Collection[str],
    sample_experts: Collection[str],
) -> frozenset[str]:
    _check_banks("sample_experts", banks, sample_experts)
    for name in sample_experts:
        if name in closed:
            raise ValueError(f"sample_experts names {name!r}, which is closed and draws nothing")
        if name in limited:
            raise ValueError(
                f"sample_experts names {name!r}, which limits the capacity of its experts: what a full expert turns "
                "away is no longer a draw, so its probability is not known"
            )
        if banks[name].balance == "bias":
            raise ValueError(
                f"sample_experts names {name!r}, which has balance='bias': the correction bias is no part of the "
                "distribution that is sampled; give the bank another balance"
            )
    return frozenset(sample_experts)


def _sequences(modality_BS: Tensor, position_ids: Tensor | None) -> Tensor:
    """`(T,)`: a number for each sequence, packed ones apart, each in one piece."""
    batch, length = modality_BS.shape
    packed = None if position_ids is None else find_packed_sequence_indices(position_ids.expand(batch, length))
    row_B1 = torch.arange(batch, device=modality_BS.device)[:, None] * (length + 1)
    return (row_B1.expand(batch, length) if packed is None else row_B1 + packed).reshape(-1)
