"""Counters of routing: what each bank of each layer did with the tokens of each modality.

Unusual here:
- counts are int64, and sums of probabilities float64: exact where float32 stops at 2**24;
- a counter is two flat tensors with named views, so that adding, clearing and summing over ranks are one operation;
- rows that do not count fall into a row of their own, and unused slots into a column of their own: no mask is applied,
  no shape depends on the data, and the device is never waited for.

Shape suffixes: T rows of a bank, E experts in the bank, K experts per token, M modalities.
"""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from chorus_moe.modeling.configuration_banks import LayerBankConfig
from chorus_moe.modeling.configuration_modalities import MODALITY_IDS
from chorus_moe.modeling.configuration_text import ChorusTextConfig
from chorus_moe.modeling.modeling_outputs import BankRouting
from chorus_moe.modeling.moe_routers import ROUTER_CLASSES
from chorus_moe.modeling.moe_selection import normalised_entropy
from chorus_moe.training.scale.ranks import data_group, num_copies

NUM_MODALITIES = len(MODALITY_IDS)


class BankCounters:
    """What one bank of one layer did.

    Attributes:
        choices_ME: how often tokens of each modality chose each expert.
        tokens_M: tokens that entered the bank.
        rerouted, dropped: choices that another expert took over, and choices dropped because it was full.
        weights_ME: sum of the routed weight, bank gate times router.
        probabilities_ME: sum of the router's probabilities.
        entropy_M: sum over tokens of the entropy of the router's probabilities, 0 to 1.
        gate_M: sum of the weight of the bank among its layer's banks.
    """

    def __init__(self, bank: LayerBankConfig, device: torch.device | str = "cpu"):
        self.bank = bank
        # One row more for tokens that do not count, one column more for slots that are not used.
        experts, rows = bank.num_experts, NUM_MODALITIES + 1
        # There is no float64 on Apple's GPUs.
        real = torch.float32 if torch.device(device).type == "mps" else torch.float64
        # One flat tensor for each type, so that adding, clearing and summing over ranks are one operation each.
        self.integers = torch.zeros(rows * (experts + 1) + rows + 2, dtype=torch.int64, device=device)
        self.reals = torch.zeros(rows * (2 * experts + 3), dtype=real, device=device)
        self._view()

    def _view(self) -> None:
        experts, rows = self.bank.num_experts, NUM_MODALITIES + 1
        choices, tokens, self._overflow = self.integers.split([rows * (experts + 1), rows, 2])
        weights, probabilities, entropy, gate = self.reals.split([rows * (experts + 1), rows * experts, rows, rows])
        self._choices, self._tokens, self._weights, self._entropy, self._gate = choices, tokens, weights, entropy, gate
        self._probabilities = probabilities.view(rows, experts)
        # Views without the extra row and column: what is counted there is not seen.
        self.choices_ME = choices.view(rows, -1)[:-1, :-1]
        self.weights_ME = weights.view(rows, -1)[:-1, :-1]
        self.probabilities_ME = self._probabilities[:-1]
        self.tokens_M, self.entropy_M, self.gate_M = tokens[:-1], entropy[:-1], gate[:-1]

    @property
    def rerouted(self) -> int:
        return int(self._overflow[0])

    @property
    def dropped(self) -> int:
        return int(self._overflow[1])

    @torch.no_grad()
    def count(self, routing: BankRouting, column_T: Tensor) -> None:
        """Add one forward.

        Args:
            column_T: int64, the position of each row's modality in `MODALITY_IDS`; M for rows that do not count.
        """
        if len(column_T) == 0:
            return
        # Layers of one model may lie on several devices.
        if self.integers.device != column_T.device:
            self.to(column_T.device)
        real = self.reals.dtype
        # The id of an unused slot is E, the extra column.
        cell_TK = column_T[:, None] * (self.bank.num_experts + 1) + routing.selected_experts
        # Not `bincount`: its result has a size that depends on the data, so the device would be waited for.
        self._choices.index_add_(0, cell_TK.flatten(), torch.ones_like(cell_TK).flatten())
        self._tokens.index_add_(0, column_T, torch.ones_like(column_T))
        weights_TK = routing.routing_weights
        if routing.bank_weights is not None:
            weights_TK = weights_TK * routing.bank_weights[:, None]
            self._gate.index_add_(0, column_T, routing.bank_weights.to(real))
        self._weights.index_add_(0, cell_TK.flatten(), weights_TK.flatten().to(real))
        probabilities_TE = ROUTER_CLASSES[self.bank.router].probabilities(routing.router_logits)
        self._probabilities.index_add_(0, column_T, probabilities_TE.to(real))
        log_weights_TE = probabilities_TE.clamp_min(torch.finfo(torch.float32).tiny).log()
        self._entropy.index_add_(0, column_T, normalised_entropy(log_weights_TE).to(real))
        if routing.num_rerouted is not None and routing.num_dropped is not None:
            self._overflow += torch.stack([routing.num_rerouted, routing.num_dropped])

    def to(self, device: torch.device | str) -> None:
        self.integers, self.reals = self.integers.to(device), self.reals.to(device)
        # The named views still point to the old tensors.
        self._view()

    def add(self, other: "BankCounters") -> None:
        self.integers += other.integers.to(self.integers.device)
        self.reals += other.reals.to(self.reals.device)

    def clear(self) -> None:
        self.integers.zero_()
        self.reals.zero_()


class RoutingCounters:
    """Counters of all banks of all layers of a model: `counters.banks[layer][name]`."""

    def __init__(self, config: ChorusTextConfig, device: torch.device | str = "cpu"):
        self.config = config
        self.banks = {
            layer: {bank.name: BankCounters(bank, device) for bank in config.banks_of_layer(layer)}
            for layer in config.sparse_layers
        }

    def all(self) -> list[BankCounters]:
        """Every bank of every layer, in the same order on every rank."""
        return [bank for layer in self.banks.values() for bank in layer.values()]

    @property
    def num_tokens(self) -> int:
        """Tokens that entered banks, over all layers and banks."""
        return sum(int(bank.tokens_M.sum()) for bank in self.all())

    def count(self, layers: Sequence[dict[str, BankRouting]], modality_T: Tensor | None) -> None:
        """Add one forward.

        Args:
            layers: the output `routing`.
            modality_T: `mm_token_type_ids`, flattened; None for text alone.
        """
        # Keyed by identity: for most layers the columns are computed once.
        columns: dict[tuple[int, int, torch.device], Tensor] = {}
        for banks, layer in zip(self.banks.values(), layers, strict=True):
            for name, routing in layer.items():
                # The plan hands the same rows and masks to all layers.
                key = (id(routing.rows), id(routing.token_mask), routing.selected_experts.device)
                if key not in columns:
                    columns[key] = _columns(routing, modality_T)
                banks[name].count(routing, columns[key])

    def add(self, other: "RoutingCounters") -> None:
        for bank, more in zip(self.all(), other.all(), strict=True):
            bank.add(more)

    def clear(self) -> None:
        for bank in self.all():
            bank.clear()

    def over_ranks(self) -> "RoutingCounters":
        """The sum over all ranks, as new counters on the CPU. Every rank must call it."""
        banks, total = self.all(), RoutingCounters(self.config)
        for name in ("integers", "reals"):
            sums = sum_over_ranks([getattr(bank, name) for bank in banks])
            for bank, value in zip(total.all(), sums, strict=True):
                getattr(bank, name).copy_(value)
        return total


def _columns(routing: BankRouting, modality_T: Tensor | None) -> Tensor:
    """The position of each row's modality in `MODALITY_IDS`; M where the row does not count."""
    device = routing.selected_experts.device
    if modality_T is None:
        # Text is the first modality.
        column_T = torch.zeros(len(routing.selected_experts), dtype=torch.int64, device=device)
    else:
        table = torch.full((max(MODALITY_IDS.values()) + 1,), NUM_MODALITIES)
        for column, value in enumerate(MODALITY_IDS.values()):
            table[value] = column
        column_T = table.to(device)[modality_T.to(device)]
        column_T = column_T if routing.rows is None else column_T.index_select(0, routing.rows)
    if routing.token_mask is not None:
        column_T = column_T.masked_fill(~routing.token_mask, NUM_MODALITIES)
    return column_T


def sum_over_ranks(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Every tensor summed over all ranks with rows of their own, in one exchange; as it is where there is one."""
    tensors = list(tensors)
    if not tensors or not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == num_copies():
        return tensors
    # One exchange instead of one for each bank of each layer.
    flat = torch.cat([tensor.reshape(-1).to(tensors[0].device) for tensor in tensors])
    # Ranks with the same rows count them once.
    dist.all_reduce(flat, group=data_group())
    return [
        part.view_as(tensor) for part, tensor in zip(flat.split([t.numel() for t in tensors]), tensors, strict=True)
    ]
