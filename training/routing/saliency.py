"""What each expert is worth on a calibration set: how often it is chosen, and how much it adds.

Saliency is that of REAP (arXiv 2510.13999): the mean, over the tokens that chose an expert, of the weight
of its output times the norm of its output. The weight is what the output is multiplied by before it is added to the
stream: the router's weight times the weight of the bank. REAP knows one router and no banks; all else is as there. An
expert that nothing chose has saliency 0. Padding is left out.

Shape suffixes: T tokens, R rows of a bank, K experts per token, E experts in the bank.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from chorus_moe.modeling.modeling_outputs import BankRouting
from chorus_moe.modeling.moe_banks import ExpertBank
from chorus_moe.modeling.moe_plan import take_rows
from chorus_moe.processors.processing_chorus import ChorusProcessor
from chorus_moe.surgery.parts import decoder_of
from chorus_moe.training.data import RowDataset
from chorus_moe.training.loading import ModelOrAdapter
from chorus_moe.training.routing.counters import RoutingCounters
from chorus_moe.training.routing.report import count_rows

Scores = dict[int, dict[str, Tensor]]


@dataclass(frozen=True)
class ExpertSaliency:
    """Layer -> bank -> `(E,)`; either can be the `scores` of `prune_experts(model, keep, scores)`.

    Args:
        uses: int64, how many tokens chose each expert.
        saliency: float64, mean weighted norm of its output.
    """

    uses: Scores
    saliency: Scores

    @classmethod
    def read(cls, counters: RoutingCounters, norms: Scores) -> "ExpertSaliency":
        """From what a `RoutingObserver` and a `SaliencyObserver` saw in the same forwards."""
        uses = {
            layer: {name: bank.choices_ME.sum(dim=0).cpu() for name, bank in banks.items()}
            for layer, banks in counters.banks.items()
        }
        saliency = {
            # An expert without uses has a sum of 0, and 0 / 1 is its saliency.
            layer: {name: norm_E.cpu() / uses[layer][name].clamp(min=1) for name, norm_E in banks.items()}
            for layer, banks in norms.items()
        }
        return cls(uses, saliency)


class SaliencyObserver:
    """Sums what experts add, in every forward of a model within a `with` block."""

    def __init__(self, model: nn.Module):
        decoder: Any = decoder_of(model)
        self.banks: dict[int, dict[str, ExpertBank]] = {
            layer: dict(decoder.layers[layer].mlp.banks.items()) for layer in decoder.config.sparse_layers
        }
        self.norms: Scores = {
            layer: {name: torch.zeros(bank.num_experts, dtype=torch.float64) for name, bank in banks.items()}
            for layer, banks in self.banks.items()
        }
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> "SaliencyObserver":
        for layer, banks in self.banks.items():
            for name, bank in banks.items():
                self._handles.append(bank.register_forward_hook(self._reader(self.norms[layer][name])))
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @staticmethod
    def _reader(norm_E: Tensor) -> Any:
        def read(bank: ExpertBank, inputs: tuple[Any, ...], outputs: tuple[Any, BankRouting]) -> None:
            norm_E.add_(weighted_norms(bank, inputs[1], outputs[1]).to(norm_E.device))

        return read


@torch.no_grad()
def weighted_norms(bank: ExpertBank, hidden_TD: Tensor, routing: BankRouting) -> Tensor:
    """`(E,)` float64: sum over the rows that chose each expert of weight times norm of its output."""
    weight_RK = routing.routing_weights
    # The output is multiplied by the bank's weight, too, before it reaches the stream.
    if routing.bank_weights is not None:
        weight_RK = weight_RK * routing.bank_weights[:, None]
    if routing.token_mask is not None:
        weight_RK = weight_RK.masked_fill(~routing.token_mask[:, None], 0.0)
    hidden_RD = take_rows(hidden_TD, routing.rows)
    norm_E = weight_RK.new_zeros(bank.num_experts, dtype=torch.float64)
    # No forward keeps the output of a single expert, so each is run again on its rows.
    for expert in range(bank.num_experts):
        row, slot = torch.where(routing.selected_experts == expert)
        output_RD = bank.run_expert(expert, hidden_RD[row])
        norm_E[expert] = (weight_RK[row, slot].double() * output_RD.double().norm(dim=-1)).sum()
    return norm_E


def expert_saliency(
    model: ModelOrAdapter,
    processor: ChorusProcessor,
    rows: Sequence[Mapping[str, Any]] | RowDataset,
    *,
    batch_size: int = 16,
    progress: bool = False,
) -> ExpertSaliency:
    """Use and saliency of every expert on whole rows, question and answer, in evaluation mode.

    Args:
        model: without an adapter.
        rows: as in `ChorusDataCollator`.

    Raises:
        ValueError: no rows, or a model without a sparse layer.
        MediaError: a row that cannot be read.
    """
    with SaliencyObserver(model) as observer:
        counters = count_rows(model, processor, rows, batch_size=batch_size, progress=progress)
    return ExpertSaliency.read(counters, observer.norms)
