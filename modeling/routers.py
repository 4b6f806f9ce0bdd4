"""Routers: which experts of a bank a token visits, and with what weight.

Unusual here:
- all arithmetic is float32, also under autocast, so that precision never changes a choice;
- a router returns its logits, weights and choices; losses and statistics read the choices actually made.

Shape suffixes: T tokens, D hidden size, E experts in the bank, K experts per token.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_banks import ExpertBankConfig


class BankRouting(NamedTuple):
    """What one bank of one layer decided, for its rows.

    Args:
        router_logits: `(T, E)` float32.
        routing_weights: `(T, K)` float32, before the weight of the bank itself.
        selected_experts: `(T, K)` int64.
        token_mask: `(T,)` bool, the rows that count in losses and statistics; None when all do.
        bank_weights: `(T,)` float32, the weight of the bank for each row.
    """

    router_logits: Tensor
    routing_weights: Tensor
    selected_experts: Tensor
    token_mask: Tensor | None
    bank_weights: Tensor | None = None


def without_autocast(states: Tensor) -> AbstractContextManager:
    """A context in which autocast is off. Where it is off already, the context costs nothing."""
    kind = states.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


class SoftmaxRouter(nn.Module):
    """Linear scores, softmax over the chosen K (arXiv 1701.06538, 2401.04088).

    With `norm_topk_prob` the weights are the softmax over the chosen logits, which equals the softmax over all experts
    divided by the sum over the chosen. With K = E this is the dense, softly gated mixture.
    """

    def __init__(self, hidden_size: int, bank: ExpertBankConfig):
        super().__init__()
        self.top_k = bank.num_experts_per_tok
        self.norm_topk_prob = bank.norm_topk_prob
        self.weight = nn.Parameter(torch.empty(bank.num_experts, hidden_size))

    def forward(self, hidden_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with without_autocast(hidden_TD):
            logits_TE = F.linear(hidden_TD.float(), self.weight.float())
            chosen_TK, index_TK = torch.topk(logits_TE, self.top_k, dim=-1)
            if self.norm_topk_prob:
                weights_TK = chosen_TK.softmax(dim=-1)
            else:
                weights_TK = (chosen_TK - logits_TE.logsumexp(dim=-1, keepdim=True)).exp()
        return logits_TE, weights_TK, index_TK

    def no_rows(self, hidden_TD: Tensor) -> BankRouting:
        """What a bank without tokens decides: nothing."""
        weights_0K = hidden_TD.new_empty(0, self.top_k, dtype=torch.float32)
        logits_0E = hidden_TD.new_empty(0, len(self.weight), dtype=torch.float32)
        return BankRouting(logits_0E, weights_0K, weights_0K.long(), None, weights_0K.new_empty(0))


ROUTER_CLASSES: dict[str, type[nn.Module]] = {"softmax": SoftmaxRouter}
