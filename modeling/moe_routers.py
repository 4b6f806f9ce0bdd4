"""Routers: which experts of a bank a token visits, with what weight, and the bias that balances them without a loss.

Routers differ in how they score; what follows is shared, in `moe_selection`.

Shape suffixes: T tokens, D hidden size, E experts in the bank, K experts per token.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from .configuration_banks import ROUTERS, LayerBankConfig, check_name
from .configuration_services import service
from .layers import ROW_BLOCK, TokenGate, filled_rows, float32_product, without_autocast
from .modeling_outputs import BankRouting, RouterChoice
from .moe_plan import NO_OPTIONS, RowOptions
from .moe_selection import (
    best_experts,
    choice_weights,
    limit_groups,
    normalised_entropy,
    serve,
    used_parts,
    uses_all_slots,
)

ROUTER_CLASSES: dict[str, type["Router"]] = {}  # by the names of `ROUTERS`; every named class enters itself


class Complexity(TokenGate):
    """A token's learned complexity, between 0 and 1, both included."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        sigmoid = super().forward(hidden_states).sigmoid()
        # Stretched, or no token would reach the ends and all would visit a second expert (the hard concrete gate of
        # arXiv 1712.01312). At the ends the gradient stays that of the sigmoid, or a token would never come back.
        return sigmoid + ((1.2 * sigmoid - 0.1).clamp(0, 1) - sigmoid).detach()


class Router(nn.Module):
    """What all routers share. A subclass scores; experts are weighed by a softmax unless it says otherwise.

    A subclass that banks can ask for is given its name, `class MyRouter(Router, name="mine")`, and states

    - `score`: the logits of the experts;
    - `rows_of_experts`: its parameters that have one row an expert, those that score first. They follow the experts
      that are pruned, merged or split;
    - `flops`: what scoring costs;
    - `dependence`: whether pruning one expert changes what a token gets of the others;
    - `log_weights`, `choice_scores` and `probabilities`, unless they are those of a softmax.

    With `norm_topk_prob` the weights are the softmax over the chosen logits, which equals the softmax over all experts
    divided by the sum over the chosen. With K = E this is the dense, softly gated mixture.

    `e_score_correction_bias`, where the bank is balanced by it, is added to the scores for the choice only. It is
    float32 whatever the model is cast to: its steps of 0.001 would be lost in bfloat16.
    """

    rows_of_experts: ClassVar[tuple[str, ...]] = ()
    takes_bias: ClassVar[bool] = False

    # A class states all that depends on its kind, so no other file asks for a router by name.
    def __init_subclass__(cls, name: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if name is not None:
            check_name(cls.__name__, "router", name, ROUTERS)
            ROUTER_CLASSES[name] = cls

    def __init__(self, hidden_size: int, bank: LayerBankConfig):
        super().__init__()
        if bank.router_bias and not self.takes_bias:
            raise ValueError(f"expert bank {bank.name!r}: router={bank.router!r} has no place for router_bias=True")
        self.bank = bank
        self.top_k = bank.num_experts_per_tok
        self.norm_topk_prob = bank.norm_topk_prob
        bias = torch.zeros(bank.num_experts, dtype=torch.float32) if bank.balance == "bias" else None
        self.e_score_correction_bias: Tensor | None
        self.register_buffer("e_score_correction_bias", bias)
        self.limits_groups = bank.topk_groups not in (None, bank.num_groups)
        # Most banks ask for nothing but the best K: known once, so that one token does not pay for every option.
        self.is_plain = not (self.limits_groups or bank.adaptive_experts or bank.routed_scaling_factor != 1.0)
        self.is_plain = self.is_plain and bias is None
        self.complexity = Complexity(hidden_size) if bank.mean_experts is not None else None

    def start_weights(self, std: float) -> None:
        for parameter in self.parameters(recurse=False):
            init.normal_(parameter, mean=0.0, std=std)
        if self.e_score_correction_bias is not None:
            init.zeros_(self.e_score_correction_bias)

    def score(self, hidden_TD: Tensor) -> Tensor:
        """Logits `(T, E)` in float32, of states in any dtype."""
        raise NotImplementedError

    @staticmethod
    def flops(hidden_size: int, num_experts: int) -> int:
        """Operations of the matrix products in `score`, for one token; see `output_compute`."""
        raise NotImplementedError

    @staticmethod
    def probabilities(logits_TE: Tensor) -> Tensor:
        """The distribution over all experts behind logits, which balance losses and statistics read."""
        return logits_TE.softmax(dim=-1)

    @staticmethod
    def dependence(bank: LayerBankConfig) -> str | None:
        """Why a token's choices or weights depend on experts that it does not choose; None where they do not."""
        if not bank.norm_topk_prob:
            return "norm_topk_prob=False weighs by a softmax over all experts"
        if bank.balance == "bias":
            return "its correction bias is added to a softmax over all experts"
        return None

    def log_weights(self, logits_TE: Tensor) -> Tensor:
        return logits_TE if self.norm_topk_prob else logits_TE.log_softmax(dim=-1)

    def choice_scores(self, logits_TE: Tensor) -> Tensor:
        """What the correction bias is added to, and what a group sums."""
        return logits_TE.softmax(dim=-1)

    def forward(self, hidden_TD: Tensor, options: RowOptions | None = None) -> RouterChoice:
        # All of it in float32: a score rounded to 16 bits would send tokens to other experts.
        with without_autocast(hidden_TD):
            noise = self.bank.router_jitter_noise
            if noise and self.training:
                hidden_TD = hidden_TD.float()
                hidden_TD = hidden_TD * torch.empty_like(hidden_TD).uniform_(1 - noise, 1 + noise)
            logits_TE = self.score(hidden_TD)
            if not self.is_plain or options is not None:
                learned_T = None if self.complexity is None else self.complexity(hidden_TD)
                return self.choose(logits_TE, options or NO_OPTIONS, learned_T)
            index_TK = best_experts(logits_TE, self.top_k)
            weights_TK = choice_weights(self.log_weights(logits_TE), index_TK, self.norm_topk_prob)
            return RouterChoice(logits_TE, weights_TK, index_TK)

    def choose(self, logits_TE: Tensor, options: RowOptions, learned_T: Tensor | None = None) -> RouterChoice:
        """The whole way from logits to weights, with every option; `learned_T` are learned complexities."""
        bank = self.bank
        log_weights_TE = self.log_weights(logits_TE)
        wanted_T, limit_T = self._limits(log_weights_TE, options, learned_T)
        is_unused_TK = None
        if limit_T is not None and not uses_all_slots(limit_T, self.top_k):
            is_unused_TK = used_parts(limit_T, self.top_k) == 0
        part_TK = None if wanted_T is None or limit_T is None else used_parts(limit_T, self.top_k)
        if options.is_sampled:
            log_weights_TE, scores_TE = service("draw", "sample_experts")(self, logits_TE)
        else:
            scores_TE = self.rank(logits_TE)
        index_TK = best_TK = best_experts(scores_TE, self.top_k)
        if is_unused_TK is not None:
            index_TK = best_TK.masked_fill(is_unused_TK, bank.num_experts)
        log_probs_T = None
        if options.is_sampled:
            log_probs_T = service("log_probability_of_draw", "sample_experts")(log_weights_TE, index_TK, is_unused_TK)
        if options.places is None:
            weights_TK = self._weigh(log_weights_TE, best_TK, is_unused_TK, part_TK)
            return RouterChoice(logits_TE, weights_TK, index_TK, log_probs_T, wanted_experts=wanted_T)
        assert bank.expert_capacity is not None  # places are found for banks that limit their capacity
        capacity_L = options.places.capacity(bank.expert_capacity, self.top_k, bank.num_experts)
        served = serve(scores_TE, index_TK, options.places, capacity_L, bank.capacity_overflow)
        is_lost_TK = served.selected_experts >= bank.num_experts
        # Who is served elsewhere is weighed by what it gets; who is dropped keeps the weights of the others.
        if bank.capacity_overflow == "reroute":
            best_TK, is_unused_TK = served.selected_experts.clamp(max=bank.num_experts - 1), is_lost_TK
        weights_TK = self._weigh(log_weights_TE, best_TK, is_unused_TK, part_TK).masked_fill(is_lost_TK, 0.0)
        return RouterChoice(logits_TE, weights_TK, *served[:1], log_probs_T, *served[1:], wanted_T)

    def rank(self, logits_TE: Tensor) -> Tensor:
        """What ranks the experts; `CLOSED` for those that a token may not choose."""
        if self.e_score_correction_bias is None and not self.limits_groups:
            return logits_TE
        # Ranks choose and never weigh, hence without gradients (DeepSeek-V3, equation 16).
        scores_TE = self.choice_scores(logits_TE.detach())
        if self.e_score_correction_bias is not None:
            scores_TE = scores_TE + self.e_score_correction_bias
        if self.limits_groups:
            assert self.bank.topk_groups is not None
            scores_TE = limit_groups(scores_TE, self.bank.num_groups, self.bank.topk_groups)
        return scores_TE

    def _limits(
        self, log_weights_TE: Tensor, options: RowOptions, learned_T: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """`(T,)`: how many experts a learned complexity asks for; how many a token may visit, None for all."""
        limit_T, wanted_T = options.budget_R, None
        if self.bank.adaptive_experts:
            if learned_T is not None:
                # At least one, so that the last expert, used in part, always has a gradient.
                asked_T = 1 + learned_T * (self.top_k - 1)
            else:
                # A token that its router is sure of needs few experts; detached, or routers would learn to look sure.
                asked_T = normalised_entropy(log_weights_TE.detach(), self.top_k)
            if options.complexity_R is not None:
                given_T, is_given_T = options.complexity_R * self.top_k, ~options.complexity_R.isnan()
                # A caller asks for whole experts.
                asked_T = torch.where(is_given_T, given_T.ceil() if learned_T is not None else given_T, asked_T)
            asked_T = asked_T.floor() if self.bank.adaptive_rounding == "floor" else asked_T
            wanted_T = None if learned_T is None else asked_T
            limit_T = asked_T if limit_T is None else torch.minimum(asked_T, limit_T)
        return wanted_T, limit_T

    def _weigh(
        self, log_weights_TE: Tensor, index_TK: Tensor, is_unused_TK: Tensor | None, part_TK: Tensor | None
    ) -> Tensor:
        weights_TK = choice_weights(log_weights_TE, index_TK, self.norm_topk_prob, is_unused_TK, part_TK)
        factor = self.bank.routed_scaling_factor
        return weights_TK if factor == 1.0 else weights_TK * factor

    def no_rows(self, hidden_TD: Tensor) -> BankRouting:
        """What a bank without tokens decides: nothing."""
        weights_0K = hidden_TD.new_empty(0, self.top_k, dtype=torch.float32)
        logits_0E = hidden_TD.new_empty(0, self.bank.num_experts, dtype=torch.float32)
        index_0K = weights_0K.long()
        return BankRouting(logits_0E, weights_0K, index_0K, None, weights_0K.new_empty(0), index_0K.new_empty(0))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # `model.bfloat16()` casts buffers, too.
        before = self.e_score_correction_bias
        super()._apply(fn, recurse)
        after = self.e_score_correction_bias
        if before is not None and after is not None and after.dtype != torch.float32:
            no_data = before.is_meta or after.is_meta
            self.e_score_correction_bias = after.float() if no_data else before.to(after.device)
        return self


class SoftmaxRouter(Router, name="softmax"):
    """Linear scores, softmax over the chosen K (arXiv 1701.06538, 2401.04088)."""

    rows_of_experts = ("weight", "bias")
    takes_bias = True

    def __init__(self, hidden_size: int, bank: LayerBankConfig):
        super().__init__(hidden_size, bank)
        self.weight = nn.Parameter(torch.empty(bank.num_experts, hidden_size))
        self.bias = nn.Parameter(torch.empty(bank.num_experts)) if bank.router_bias else None

    def start_weights(self, std: float) -> None:
        super().start_weights(std)
        if self.bias is not None:
            init.zeros_(self.bias)

    def score(self, hidden_TD: Tensor) -> Tensor:
        count = self.weight.shape[0]
        # Filled up, see `ROW_BLOCK`: a score must not depend on how many others there are.
        rows_ED = self.weight if count % ROW_BLOCK == 0 else filled_rows(self.weight)
        logits_TE = float32_product(hidden_TD, rows_ED)
        logits_TE = logits_TE if count % ROW_BLOCK == 0 else logits_TE[:, :count]
        return logits_TE if self.bias is None else logits_TE + self.bias.float()

    @staticmethod
    def flops(hidden_size: int, num_experts: int) -> int:
        return 2 * hidden_size * num_experts


class SigmoidRouter(SoftmaxRouter, name="sigmoid"):
    """Linear scores, each expert weighed by its own sigmoid (DeepSeek-V3, arXiv 2412.19437, section 2.1.2)."""

    def __init__(self, hidden_size: int, bank: LayerBankConfig):
        super().__init__(hidden_size, bank)
        self.is_plain = False

    def log_weights(self, logits_TE: Tensor) -> Tensor:
        return F.logsigmoid(logits_TE)

    def choice_scores(self, logits_TE: Tensor) -> Tensor:
        return logits_TE.sigmoid()

    @staticmethod
    def probabilities(logits_TE: Tensor) -> Tensor:
        """The sigmoids divided by their sum (equation 19 there)."""
        return F.logsigmoid(logits_TE).softmax(dim=-1)

    @staticmethod
    def dependence(bank: LayerBankConfig) -> str | None:
        return None


class AttentionRouter(Router, name="attention"):
    """A light transformer layer: the token attends to learned keys of the experts, then is compared with them.

        q = W_q norm(x)                                       H heads of C, H * C = M
        z = q + concat_h softmax_e(q_h . k_eh / sqrt(C)) v_eh     attention over the E experts
        z = z + W_down silu(W_up norm(z))                     feed-forward of width 2M
        logits_e = norm(z) . k_e

    `norm` divides by the root mean square. Experts are scored in the light of each other, where a linear router scores
    each alone. The token attends to experts and not to tokens, so routing stays causal and needs no cache.
    """

    NUM_HEADS, HEAD_DIM = 4, 16
    rows_of_experts = ("expert_keys", "expert_values")

    def __init__(self, hidden_size: int, bank: LayerBankConfig):
        super().__init__(hidden_size, bank)
        width = self.NUM_HEADS * self.HEAD_DIM
        self.query = nn.Parameter(torch.empty(width, hidden_size))
        self.expert_keys = nn.Parameter(torch.empty(bank.num_experts, width))
        self.expert_values = nn.Parameter(torch.empty(bank.num_experts, width))
        self.up = nn.Parameter(torch.empty(2 * width, width))
        self.down = nn.Parameter(torch.empty(width, 2 * width))

    def score(self, hidden_TD: Tensor) -> Tensor:
        hidden_TD = hidden_TD.float()
        # Keys serve twice: to attend, and to be compared with at the end.
        keys_EM = self.expert_keys.float()
        query_TM = F.linear(_norm(hidden_TD), self.query.float())
        heads = (self.NUM_HEADS, self.HEAD_DIM)
        query_HTC, keys_HEC, values_HEC = (
            part.unflatten(-1, heads).transpose(0, 1) for part in (query_TM, keys_EM, self.expert_values.float())
        )
        attention_HTE = (query_HTC @ keys_HEC.transpose(1, 2) * self.HEAD_DIM**-0.5).softmax(dim=-1)
        state_TM = query_TM + (attention_HTE @ values_HEC).transpose(0, 1).flatten(1)
        state_TM = state_TM + F.linear(F.silu(F.linear(_norm(state_TM), self.up.float())), self.down.float())
        return F.linear(_norm(state_TM), keys_EM)

    @classmethod
    def flops(cls, hidden_size: int, num_experts: int) -> int:
        width = cls.NUM_HEADS * cls.HEAD_DIM
        return 2 * hidden_size * width + 6 * width * num_experts + 8 * width * width

    @staticmethod
    def dependence(bank: LayerBankConfig) -> str | None:
        return "an attention router scores experts in the light of each other"


def _norm(states: Tensor) -> Tensor:
    return F.rms_norm(states, states.shape[-1:])
