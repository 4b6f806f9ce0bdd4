"""Where the tokens of each modality are: found once per forward, used by every layer.

Unusual here:
- rows are index tensors, never boolean masks: a mask per layer would wait for the device each time;
- `None` means "every row", so a batch of text alone, or a bank open to all modalities, gathers nothing;
- under `torch.compile` there are no data-dependent shapes: every bank sees every row and the gate is zero where closed.

Shape suffixes: B batch, S sequence, T tokens (B * S), R rows of a modality, D hidden size.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from .configuration_banks import MODALITY_IDS
from .routing_options import RoutingOptions, RowOptions

Rows = Tensor | None


@dataclass
class ModalityPlan:
    """Positions of every modality's tokens in the flattened batch.

    Args:
        modality_T: values of `MODALITY_IDS`, one a token.
        real_T: True for real tokens, False for padding; None when there is no padding.
        rows: modality -> indices of its tokens, padding included; None for all tokens. Empty under compilation.
        real_rows: the same without padding.
        options: what the caller asked of the routers; None for nothing.
        open_above: the logit above which the gates of skipped layers are open.
        origin: where the tokens are in the flattened batch; None when they are all of it.
    """

    modality_T: Tensor
    real_T: Tensor | None
    rows: dict[str, Rows] = field(default_factory=dict)
    real_rows: dict[str, Rows] = field(default_factory=dict)
    is_static: bool = False
    options: RoutingOptions | None = None
    options_of_banks: dict[str, RowOptions | None] = field(default_factory=dict)
    open_above: float = 0.0
    origin: Rows = None

    @classmethod
    def build(
        cls,
        modality_BS: Tensor,
        attention_mask: Tensor | Mapping[str, Any] | None,
        options: RoutingOptions | None = None,
        is_text: bool = False,
    ) -> "ModalityPlan":
        """Find the rows.

        Args:
            modality_BS: `mm_token_type_ids`.
            attention_mask: `(B, S)` or, with a cache, `(B, past + S)`; masks of another form say nothing about
                padding of the new tokens and are passed over.
            is_text: every token is known to be text, so that nothing has to be looked at.

        Raises:
            ValueError: a token has a modality that the model does not know.
        """
        modality_T = modality_BS.reshape(-1)
        real_T = None
        if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
            real_T = attention_mask[:, -modality_BS.shape[1] :].reshape(-1).bool()
        # Of text without padding the rows are known, so that a compiled step leaves out what takes no text.
        if torch.compiler.is_compiling() and not (is_text and real_T is None):
            return cls(modality_T, real_T, is_static=True, options=options)
        if real_T is not None and bool(real_T.all()):
            real_T = None
        if is_text or not modality_T.any():
            rows: dict[str, Rows] = {name: modality_T.new_empty(0) for name in MODALITY_IDS} | {"text": None}
        else:
            rows = {name: (modality_T == value).nonzero().squeeze(1) for name, value in MODALITY_IDS.items()}
            found = sum(len(r) for r in rows.values() if r is not None)
            if found != len(modality_T):
                unknown = sorted(set(modality_T.tolist()) - set(MODALITY_IDS.values()))
                raise ValueError(
                    f"mm_token_type_ids holds {unknown} in {len(modality_T) - found} of {len(modality_T)} tokens; "
                    f"this model knows {MODALITY_IDS}"
                )
        if real_T is None:
            return cls(modality_T, None, rows, rows, options=options)
        all_real = real_T.nonzero().squeeze(1)
        real_rows = {name: all_real if r is None else r[real_T[r]] for name, r in rows.items()}
        return cls(modality_T, real_T, rows, real_rows, options=options)

    def at(self, origin: Tensor) -> "ModalityPlan":
        """The plan of some tokens, given by their indices, as if the batch had no others."""
        real_T = None if self.real_T is None else self.real_T[origin].unsqueeze(0)
        options = None if self.options is None else self.options.at(origin)
        plan = self.build(self.modality_T[origin].unsqueeze(0), real_T, options)
        return replace(plan, open_above=self.open_above, origin=origin)

    def in_batch(self, rows: Rows) -> Rows:
        """Where rows of this plan are in the flattened batch; None for every token of it."""
        if self.origin is None or rows is None:
            return self.origin if rows is None else rows
        return self.origin[rows]

    def rows_of(self, modalities: Iterable[str]) -> Rows:
        """Indices of the real tokens of some modalities, in order; None for every token.

        A bank open to all modalities gets every row, padding included: nothing is gathered, the work on padding is
        thrown away, and `token_mask` keeps it out of losses and statistics.
        """
        if self.is_static or len(set(modalities)) == len(MODALITY_IDS):
            return None
        key = "+".join(sorted(modalities))
        if key not in self.real_rows:
            parts = [self.real_rows[name] for name in modalities]
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
        if bank not in self.options_of_banks:
            found = self.options.of_rows(bank, modalities, self.modality_T, rows, token_mask)
            self.options_of_banks[bank] = found
        return self.options_of_banks[bank]

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> "ModalityPlan":
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
    return (
        output_TD.index_add(0, rows, states_RD) if torch.is_grad_enabled() else output_TD.index_add_(0, rows, states_RD)
    )
