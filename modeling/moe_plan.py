"""Where the tokens of each modality are, and what a call asks of the routers: found once per forward, for all layers.

Shape suffixes: B batch, S sequence, T tokens (B * S), R rows of a modality or a bank, D hidden size.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.masking_utils import find_packed_sequence_indices
from transformers.utils import TransformersKwargs

from .configuration_banks import ExpertBankConfig, check_name
from .configuration_modalities import MODALITY_IDS
from .configuration_services import service
from .moe_selection import Places


class DecoderKwargs(TransformersKwargs, total=False):  # type: ignore[call-arg]  # transformers is not type-checked
    """What one call may ask of the decoder, by keyword, of any model and of `generate`.

    Args:
        complexity_scores: `(B, S)`, between 0 and 1, sets how many experts of an adaptive bank each token visits; the
            router's entropy does without it, and where it is NaN. In `generate` they are those of the prompt.
        expert_budget: modality -> how many experts of each bank its tokens visit at most.
        sample_experts: names of banks that draw their experts from the router's distribution; their routing then
            carries the log-probability of the draw.
        closed_banks: names of banks that this call skips, at no cost, as if they were not there: the output is that of
            the model without them, bit for bit where the bank has its own bank gate.
        expert_width_share: one of `expert_width_shares`, or one for each token `(B, S)`: the leading share of their
            width that experts use. In training it replaces the draw. In `generate` it is one for all.
        skip_threshold: tokens skip the feed-forward of `skip_layers` where the skip gate's probability is not above it;
            0.5 if None. `generate` also reads it from `generation_config`.
    """

    complexity_scores: Tensor | None
    expert_budget: Mapping[str, int] | None
    sample_experts: Collection[str] | None
    closed_banks: Collection[str] | None
    expert_width_share: float | Tensor | None
    skip_threshold: float | None


class RowOptions(NamedTuple):
    """Options for the rows of one bank.

    Args:
        complexity_R: complexity between 0 and 1 from the caller; NaN where the router's entropy stands for it.
        budget_R: experts that a row may visit at most.
        places: where each row stands in its sequence, where capacity is limited.
        is_sampled: experts are drawn, not ranked.
        width_R: which of the `expert_width_shares` a row uses, by index; a number for all rows.
    """

    complexity_R: Tensor | None = None
    budget_R: Tensor | None = None
    places: Places | None = None
    is_sampled: bool = False
    width_R: Tensor | int | None = None


@dataclass
class RoutingOptions:
    """Options of one forward.

    Args:
        complexity_T: see `RowOptions.complexity_R`.
        budget: modality -> experts that a token may visit at most in each bank.
        sampled_banks: names of the banks whose experts are drawn.
        sequence_T: the sequence of each token, where some bank limits its capacity.
        limited_banks: names of the banks that do, each with what capacity is counted over.
        closed_banks: names of the banks that are skipped.
        width_T: see `RowOptions.width_R`.
    """

    complexity_T: Tensor | None
    budget: dict[str, int]
    sampled_banks: frozenset[str]
    sequence_T: Tensor | None
    limited_banks: dict[str, str]
    closed_banks: frozenset[str] = frozenset()
    width_T: Tensor | int | None = None

    def at(self, origin: Tensor) -> "RoutingOptions":
        """The options of some tokens, given by their indices."""
        complexity_T = None if self.complexity_T is None else self.complexity_T[origin]
        sequence_T = None if self.sequence_T is None else self.sequence_T[origin]
        width_T = self.width_T[origin] if isinstance(self.width_T, Tensor) else self.width_T
        return replace(self, complexity_T=complexity_T, sequence_T=sequence_T, width_T=width_T)

    def of_rows(
        self, bank: str, modalities: Iterable[str], modality_T: Tensor, rows: Tensor | None, token_mask: Tensor | None
    ) -> RowOptions | None:
        """Options of one bank for its rows; None if it has none."""

        def take(values_T: Tensor | None) -> Tensor | None:
            return values_T if values_T is None or rows is None else values_T.index_select(0, rows)

        budget_R = None
        if any(name in self.budget for name in modalities):
            # Looked up at once for all rows; a modality without a budget has a limit that no token reaches.
            table = modality_T.new_full((max(MODALITY_IDS.values()) + 1,), torch.iinfo(torch.int64).max)
            for name, count in self.budget.items():
                table[MODALITY_IDS[name]] = count
            budget_R = table[take(modality_T)]
        places, sequence_R = None, take(self.sequence_T)
        if sequence_R is not None and bank in self.limited_banks:
            is_whole = self.limited_banks[bank] == "batch"
            places = Places.find(torch.zeros_like(sequence_R) if is_whole else sequence_R, token_mask)
        is_sampled = bank in self.sampled_banks
        width_R = take(self.width_T) if isinstance(self.width_T, Tensor) else self.width_T
        options = RowOptions(take(self.complexity_T), budget_R, places, is_sampled, width_R)
        return options if any(value is not None and value is not False for value in options) else None


NO_OPTIONS = RowOptions()


# Indices, never boolean masks: counting a mask's rows would wait for the device in every layer. None is every row, so a
# batch of text alone, or a bank open to all modalities, gathers nothing.
Rows = Tensor | None


@dataclass
class ForwardPlan:
    """What all layers of one forward share: each modality's tokens in the flattened batch, and what was asked.

    Args:
        modality_T: values of `MODALITY_IDS`, one a token.
        real_T: True for real tokens, False for padding; None when there is no padding.
        rows: modality -> indices of its tokens, padding included; None for all tokens. Empty under compilation.
        real_rows: the same without padding.
        options: what the caller asked of the routers; None for nothing.
        open_above: the logit above which skip gates are open.
        origin: where the tokens are in the flattened batch; None when they are all of it.
        modalities: those of the model.
    """

    modality_T: Tensor
    real_T: Tensor | None
    rows: dict[str, Rows] = field(default_factory=dict)
    real_rows: dict[str, Rows] = field(default_factory=dict)
    is_static: bool = False
    # Options travel in here: layers need no further arguments, and nothing is stored in a module.
    options: RoutingOptions | None = None
    options_of_banks: dict[str, RowOptions | None] = field(default_factory=dict)
    open_above: float = 0.0
    origin: Rows = None
    modalities: Collection[str] = tuple(MODALITY_IDS)

    @classmethod
    def build(
        cls,
        modality_BS: Tensor,
        attention_mask: Tensor | Mapping[str, Any] | None,
        options: RoutingOptions | None = None,
        modalities: Collection[str] = tuple(MODALITY_IDS),
        is_text: bool = False,
    ) -> "ForwardPlan":
        """Find the rows.

        Args:
            modality_BS: `mm_token_type_ids`.
            attention_mask: `(B, S)` or, with a cache, `(B, past + S)`; masks of another form say nothing about
                padding of the new tokens and are passed over.
            modalities: those of the model.
            is_text: every token is known to be text, so that nothing has to be looked at.

        Raises:
            ValueError: a token has a modality that the model does not know.
        """
        modality_T = modality_BS.reshape(-1)
        real_T = None
        if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
            real_T = attention_mask[:, -modality_BS.shape[1] :].reshape(-1).bool()
        # Of text without padding the rows are known, so that a compiled step leaves out what takes no text. Elsewhere a
        # graph can have no shapes that depend on data: every bank sees every row, its bank gate zero where closed.
        if torch.compiler.is_compiling() and not (is_text and real_T is None):
            return cls(modality_T, real_T, is_static=True, options=options, modalities=modalities)
        # A mask of ones is what most callers give: without padding nothing has to be masked later.
        if real_T is not None and bool(real_T.all()):
            real_T = None
        rows: dict[str, Rows]
        if is_text or not modality_T.any():
            rows = {name: modality_T.new_empty(0) for name in modalities} | {"text": None}
        else:
            known = {name: MODALITY_IDS[name] for name in modalities}
            rows = {name: (modality_T == value).nonzero().squeeze(1) for name, value in known.items()}
            found = sum(len(r) for r in rows.values() if r is not None)
            if found != len(modality_T):
                unknown = sorted(set(modality_T.tolist()) - set(known.values()))
                lacking = [name for name, value in MODALITY_IDS.items() if value in unknown]
                raise ValueError(
                    f"mm_token_type_ids holds {unknown} in {len(modality_T) - found} of {len(modality_T)} tokens; "
                    f"this model knows {known}" + (f" and was built without {', '.join(lacking)}" if lacking else "")
                )
        if real_T is None:
            return cls(modality_T, None, rows, rows, options=options, modalities=modalities)
        all_real = real_T.nonzero().squeeze(1)
        real_rows: dict[str, Rows] = {name: all_real if r is None else r[real_T[r]] for name, r in rows.items()}
        return cls(modality_T, real_T, rows, real_rows, options=options, modalities=modalities)

    def at(self, origin: Tensor) -> "ForwardPlan":
        """The plan of some tokens, given by their indices, as if the batch had no others."""
        real_T = None if self.real_T is None else self.real_T[origin].unsqueeze(0)
        options = None if self.options is None else self.options.at(origin)
        plan = self.build(self.modality_T[origin].unsqueeze(0), real_T, options, self.modalities)
        return replace(plan, open_above=self.open_above, origin=origin)

    def in_batch(self, rows: Rows) -> Rows:
        """Where rows of this plan are in the flattened batch; None for every token of it."""
        if self.origin is None or rows is None:
            return self.origin if rows is None else rows
        return self.origin[rows]

    def rows_of(self, modalities: Iterable[str]) -> Rows:
        """Indices of the real tokens of some modalities, in order; None for every token.

        A bank open to all modalities of the model gets every row, padding included: nothing is gathered, the work on
        padding is thrown away, and `token_mask` keeps it out of losses and statistics.
        """
        if self.is_static or set(self.modalities) <= set(modalities):
            return None
        key = "+".join(sorted(modalities))
        # Banks open to the same modalities share their rows, in every layer.
        if key not in self.real_rows:
            parts = [self.real_rows[name] for name in modalities if name in self.real_rows]
            whole = any(part is None for part in parts)
            self.real_rows[key] = None if whole else torch.cat([p for p in parts if p is not None]).sort().values
        return self.real_rows[key]

    @property
    def closed_banks(self) -> frozenset[str]:
        return frozenset() if self.options is None else self.options.closed_banks

    def rows_of_bank(self, name: str, modalities: Iterable[str]) -> Rows:
        """As `rows_of`; no row for a bank that is closed."""
        return self.modality_T.new_empty(0) if name in self.closed_banks else self.rows_of(modalities)

    def token_mask(self, modalities: Iterable[str], rows: Rows) -> Tensor | None:
        """Which of a bank's rows count: real tokens of its modalities. None when all of them do."""
        if rows is not None:
            return None
        if not self.is_static:
            return self.real_T
        open_T = torch.zeros_like(self.modality_T, dtype=torch.bool)
        for name in modalities:
            open_T = open_T | (self.modality_T == MODALITY_IDS[name])
        return open_T if self.real_T is None else open_T & self.real_T

    def row_options(
        self, bank: str, modalities: Iterable[str], rows: Rows, token_mask: Tensor | None
    ) -> RowOptions | None:
        """What the caller asked of one bank, for its rows; worked out for the first layer that holds it."""
        if self.options is None:
            return None
        # Layers that hold the same bank show it the same rows.
        if bank not in self.options_of_banks:
            found = self.options.of_rows(bank, modalities, self.modality_T, rows, token_mask)
            self.options_of_banks[bank] = found
        return self.options_of_banks[bank]

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> "ForwardPlan":
        """The plan on another device (layers of one model may live on several)."""
        if self.modality_T.device == torch.device(device):
            return self

        def move(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.to(device, non_blocking=non_blocking)
            return {k: move(v) for k, v in value.items()} if isinstance(value, dict) else value

        moved = {f.name: move(getattr(self, f.name)) for f in fields(self)}
        if self.options is not None:
            options = {f.name: move(getattr(self.options, f.name)) for f in fields(self.options)}
            # Options per bank are worked out again there: they hold tensors of the old device.
            moved |= {"options": replace(self.options, **options), "options_of_banks": {}}
        return replace(self, **moved)


def take_rows(states_TD: Tensor, rows: Rows) -> Tensor:
    """The rows of a bank, `(R, D)`."""
    return states_TD if rows is None else states_TD.index_select(0, rows)


def add_rows(output_TD: Tensor | None, rows: Rows, states_RD: Tensor, hidden_TD: Tensor) -> Tensor:
    """`output_TD` with a bank's output added at its rows; None stands for zeros, shaped like `hidden_TD`."""
    if rows is None:
        return states_RD if output_TD is None else output_TD + states_RD.to(output_TD.dtype)
    if output_TD is None:
        return torch.zeros_like(hidden_TD).index_copy_(0, rows, states_RD.to(hidden_TD.dtype))
    states_RD = states_RD.to(output_TD.dtype)
    add = output_TD.index_add if torch.is_grad_enabled() else output_TD.index_add_
    return add(0, rows, states_RD)


def read_routing_options(
    banks: Mapping[str, ExpertBankConfig],
    modality_BS: Tensor,
    position_ids: Tensor | None,
    is_training: bool,
    cache: Cache | None,
    complexity_scores: Tensor | None = None,
    expert_budget: Mapping[str, int] | None = None,
    sample_experts: Collection[str] | None = None,
    closed_banks: Collection[str] | None = None,
    expert_width_share: float | Tensor | None = None,
    width_shares: Sequence[float] | None = None,
) -> RoutingOptions | None:
    """Check what was asked for; None if nothing was.

    Args:
        position_ids: as the caller gave them; a jump starts a new sequence (packing).
        complexity_scores: this and what follows is described in [`DecoderKwargs`].
        width_shares: `expert_width_shares` of the model.

    Raises:
        ValueError: naming the argument, the bank or modality, and the numbers.
    """
    limited = {name: bank.capacity_scope for name, bank in banks.items() if bank.limits_capacity(is_training)}
    # Asked only where it matters: on a GPU the answer of a static cache waits for the device.
    num_cached = int(cache.get_seq_length()) if limited and cache is not None else 0
    if num_cached:
        raise ValueError(
            f"expert bank {min(limited)!r} limits the capacity of its experts, counted over the whole sequence, but of "
            f"{num_cached} tokens the cache holds keys and values and not what they chose; use use_cache=False, or "
            "leave capacity_in_eval out"
        )
    complexity_T = _read_complexity(banks, modality_BS, complexity_scores)
    budget = _read_budget(expert_budget or {})
    check_banks("closed_banks", banks, closed_banks or ())
    closed = frozenset(closed_banks or ()) | {name for name, bank in banks.items() if bank.closed}
    sampled: frozenset[str] = frozenset()
    if sample_experts:
        sampled = service("read_sampled", "sample_experts")(banks, limited, closed, sample_experts)
    width_T = _read_widths(modality_BS, expert_width_share, width_shares)
    # No object at all: the plain path costs nothing.
    if not (limited or budget or sampled or closed) and complexity_T is None and width_T is None:
        return None
    sequence_T = _sequences(modality_BS, position_ids) if limited else None
    return RoutingOptions(complexity_T, budget, sampled, sequence_T, limited, closed, width_T)


def _read_widths(
    modality_BS: Tensor, share: float | Tensor | None, known: Sequence[float] | None
) -> Tensor | int | None:
    """Which of the model's shares are meant, by index."""
    if share is None:
        return None
    if known is None:
        raise ValueError("expert_width_share changes nothing: the model has no expert_width_shares")
    if not isinstance(share, Tensor):
        if share not in known:
            raise ValueError(f"expert_width_share={share} is none of expert_width_shares={list(known)}")
        return list(known).index(share)
    if share.shape != modality_BS.shape:
        raise ValueError(f"expert_width_share has shape {tuple(share.shape)}, tokens have {tuple(modality_BS.shape)}")
    if torch.compiler.is_compiling():
        raise ValueError("expert_width_share for each token cannot be compiled; give one number for all")
    is_it_TW = share.reshape(-1, 1).float() == torch.tensor(known, device=share.device)
    if not bool(is_it_TW.any(dim=1).all()):
        unknown = share.flatten()[~is_it_TW.any(dim=1)][0].item()
        raise ValueError(f"expert_width_share holds {unknown:g}, none of expert_width_shares={list(known)}")
    return is_it_TW.int().argmax(dim=1).to(modality_BS.device)


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


def check_banks(argument: str, banks: Mapping[str, ExpertBankConfig], names: Collection[str]) -> None:
    # A string is a collection of letters, each of which would be an unknown bank.
    if isinstance(names, str):
        raise ValueError(f"{argument}={names!r} is a string; give the names of banks, as in ('text',)")
    for name in names:
        check_name(argument, "bank", name, banks)


def _sequences(modality_BS: Tensor, position_ids: Tensor | None) -> Tensor:
    """`(T,)`: a number for each sequence, packed ones apart, each in one piece."""
    batch, length = modality_BS.shape
    packed = None if position_ids is None else find_packed_sequence_indices(position_ids.expand(batch, length))
    # Rows of the batch are further apart than packed sequences are many, so no two share a number.
    row_B1 = torch.arange(batch, device=modality_BS.device)[:, None] * (length + 1)
    return (row_B1.expand(batch, length) if packed is None else row_B1 + packed).reshape(-1)
