"""The layers of the decoder for a single text token, in as few operations as it takes.

A token of a small model costs more in calls than in arithmetic. Each class here reads the parameters of one module of
the ordinary model, copies no matrix, and computes what that module computes for one row of text:
- matrix-vector products that add to the residual stream, weighted by the router, in the same call;
- scales of norms and weights of routers are Python numbers: on the CPU reading one costs less than an operation;
- the query heads that share a key head stand as rows of one attention product: nothing is repeated, nothing masked;
- keys and values are appended in place where an ordinary cache would copy all of them for each token.

Shape suffixes: D hidden size, H heads, G key-value heads, C head size, S positions in the cache, E experts in the bank,
K experts per token, I expert width.
"""

from collections.abc import Callable, Collection, Mapping
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from .attention import ModalityProjection
from .configuration_banks import ExpertBankConfig
from .modality_plan import ModalityPlan
from .one_token_choice import choose_for_one, softmax
from .one_token_experts import add_experts, expert_of
from .routers import NO_OPTIONS, SigmoidRouter, SoftmaxRouter, filled_rows
from .routing_options import read_routing_options
from .row_products import Operand, add_product, multiply, operand, weight_operand

# Positions that a buffer of keys and values has free when it is made: at least so many, or a quarter of what it holds.
SPARE_POSITIONS = 128

FeedForward = Callable[[Operand, Operand], None]


@cache
def zeros(size: int, dtype: torch.dtype) -> Tensor:
    """One vector for all norms of a size: it stays in the cache. It is never written."""
    return torch.zeros(size, dtype=dtype, device="cpu")


@cache
def exchange_of_halves(size: int) -> Tensor:
    return torch.arange(size, device="cpu").roll(size // 2)


class LeanNorm:
    """[`RMSNorm`] of one token `(D,)`, into a buffer."""

    def __init__(self, norm: Any, output: Operand):
        self.weight: Tensor = norm.weight
        self.eps: float = norm.eps
        self.zero = zeros(len(norm.weight), norm.weight.dtype)
        self.size = len(norm.weight)
        self.is_narrow = self.zero.itemsize < 4
        self.output = output

    def __call__(self, states_D: Tensor) -> Operand:
        wide_D = states_D.float() if self.is_narrow else states_D
        scale = (torch.dot(wide_D, wide_D).item() / self.size + self.eps) ** -0.5
        torch.addcmul(self.zero, states_D, self.weight, value=scale, out=self.output.tensor)
        return self.output


def project(weight: Operand, bias: Tensor | None, states_D: Operand, out: Operand) -> None:
    """A linear layer of one token, written to `out`."""
    product = multiply(weight, states_D, out)
    if bias is not None:
        product.add_(bias)


class KeyValueBuffer:
    """Appends one position to a layer of a cache.

    A `DynamicLayer` gets views of a buffer with room at its end. It stays an ordinary layer: whoever crops, reorders or
    replaces its tensors leaves other objects in it than were put there, and the next append starts from a copy of
    those. Every other kind of layer appends in its own way.
    """

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.buffer = torch.empty(0)

    def append(self, layer: CacheLayerMixin, new: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values `(1, G, S, C)` of the layer with `new` `(2, 1, G, 1, C)` at their end."""
        if type(layer) is not DynamicLayer:
            return layer.update(*new.unbind(0))
        length = layer.keys.shape[2]
        if layer.keys is not self.keys or layer.values is not self.values or length == self.buffer.shape[3]:
            room = length + max(SPARE_POSITIONS, length // 4)
            self.buffer = new.new_empty(*new.shape[:3], room, new.shape[4])
            torch.stack((layer.keys, layer.values), out=self.buffer.narrow(3, 0, length))
        self.buffer.narrow(3, length, 1).copy_(new)
        layer.keys, layer.values = self.keys, self.values = self.buffer.narrow(3, 0, length + 1).unbind(0)
        return self.keys, self.values


class LeanAttention:
    """[`Attention`] and [`CrossModalAttention`] of one text token, added to the residual stream."""

    def __init__(self, attention: Any):
        text: list[Any] = [
            proj["text"] if isinstance(proj, ModalityProjection) else proj
            for proj in (attention.q_proj, attention.k_proj, attention.v_proj)
        ]
        size, dtype = attention.head_dim, attention.o_proj.weight.dtype
        self.output = weight_operand(attention.o_proj.weight)
        self.output_bias: Tensor | None = attention.o_proj.bias
        self.use_rope: bool = attention.use_rope
        self.scaling: float = attention.scaling
        self.window: int | None = attention.sliding_window
        heads, groups = (linear.out_features // size for linear in text[:2])
        query_key_value = torch.empty(heads + 2 * groups, size, dtype=dtype)
        self.query_key = query_key_value[: heads + groups]
        self.query = query_key_value[:heads].view(1, groups, heads // groups, size)
        self.key_value = query_key_value[heads:].view(2, 1, groups, 1, size)
        parts = query_key_value.view(-1).split([linear.out_features for linear in text])
        self.projections: list[tuple[Operand, Tensor | None, Operand]] = [
            (weight_operand(linear.weight), linear.bias, operand(part))
            for linear, part in zip(text, parts, strict=True)
        ]
        self.exchange = exchange_of_halves(size)
        self.size = size
        self.norm_weight = None
        if not isinstance(attention.q_norm, nn.Identity):
            # A row for each head: so few numbers that a copy costs nothing and spares one product a layer.
            weights = attention.q_norm.weight.expand(heads, size), attention.k_norm.weight.expand(groups, size)
            self.norm_weight = torch.cat(weights)
            wide = torch.promote_types(dtype, torch.float32)
            self.eps = torch.full((heads + groups, 1, 1), attention.q_norm.eps, dtype=wide)
            self.is_narrow = dtype.itemsize < 4
            self.rows, self.columns = self.query_key.unsqueeze(1), self.query_key.unsqueeze(2)
        self.memory = KeyValueBuffer()
        self.global_tokens: Any = attention.global_tokens

    def __call__(
        self,
        residual_D: Operand,
        states_D: Operand,
        tables: tuple[Tensor, Tensor],
        layer: CacheLayerMixin,
        first: int,
        total: int,
        mask: Tensor | None,
    ) -> None:
        """The new residual stream `(D,)`, in place.

        Args:
            tables: cosines and signed sines of the position, each `(C,)`.
            layer: of the cache.
            first, total: the real tokens are the positions from `first` to `total`, the new one included.
            mask: over all keys that the layer of the cache returns; replaces `first`.
        """
        for weight, bias, part in self.projections:
            project(weight, bias, states_D, part)
        if self.norm_weight is not None:
            # The mean square of each head and eps in one product.
            pair = (self.rows.float(), self.columns.float()) if self.is_narrow else (self.rows, self.columns)
            square = torch.baddbmm(self.eps, *pair, alpha=1 / self.size)
            self.rows.mul_(square.rsqrt_())
            self.query_key.mul_(self.norm_weight)
        if self.use_rope:
            cos_C, sin_C = tables
            exchanged = self.query_key.index_select(1, self.exchange)
            self.query_key.mul_(cos_C).addcmul_(exchanged, sin_C)
        key, value = self.memory.append(layer, self.key_value)
        if mask is None:
            key, value = self._visible(key, value, first, total)
        if self.global_tokens is not None:
            key, value = self.global_tokens(key, value)
        attended = F.scaled_dot_product_attention(self.query, key, value, attn_mask=mask, scale=self.scaling)
        if self.output_bias is not None:
            residual_D.tensor.add_(self.output_bias)
        add_product(residual_D, self.output, operand(attended.reshape(-1)))

    def _visible(self, key: Tensor, value: Tensor, first: int, total: int) -> tuple[Tensor, Tensor]:
        """The keys and values that the token may see, of those that a cache layer holds: it holds the last of `total`
        positions, and behind them, if it is static, room for more."""
        held = key.shape[2]
        last = min(held, total)
        if self.window is not None:
            first = max(first, total - self.window)
        start = max(0, first - (total - last))
        if start or last != held:
            key, value = key[:, :, start:last], value[:, :, start:last]
        return key, value


class LeanSkipGate:
    """[`SkipGate`] of one token: its logit."""

    def __init__(self, gate: Any):
        self.weight_D: Tensor = gate.weight[0]
        self.bias: float = gate.bias.item()

    def __call__(self, states_D: Operand) -> float:
        return torch.dot(self.weight_D.float(), states_D.tensor.float()).item() + self.bias


class LeanDense:
    """[`GatedMLP`] of one token, added to the residual stream in place."""

    def __init__(self, mlp: Any):
        linears = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.gate, self.up, self.down = (weight_operand(linear.weight) for linear in linears)
        gate_I = mlp.gate_proj.weight.new_empty(mlp.gate_proj.out_features)
        self.active, self.other = operand(gate_I), operand(torch.empty_like(gate_I))

    def __call__(self, residual_D: Operand, states_D: Operand) -> None:
        active_I = multiply(self.gate, states_D, self.active)
        F.silu(active_I, inplace=True).mul_(multiply(self.up, states_D, self.other))
        add_product(residual_D, self.down, self.active)


class LeanBank:
    """[`ExpertBank`] of one token."""

    def __init__(self, bank: Any):
        self.router = bank.router
        self.is_linear = type(self.router) in (SoftmaxRouter, SigmoidRouter)
        gate_up, down = weight_operand(bank.experts.gate_up_proj), weight_operand(bank.experts.down_proj)
        count, width, dtype = len(down.tensor), down.tensor.shape[2], down.tensor.dtype
        self.experts = [(expert_of(gate_up, expert), expert_of(down, expert)) for expert in range(count)]
        self.size = self.router.top_k, width, dtype

    def __call__(self, residual_D: Operand, states_D: Operand, bank_weight: float) -> None:
        choice = choose_for_one(self.router, self._logits(states_D.tensor), NO_OPTIONS)
        chosen = [
            (*self.experts[expert], bank_weight * weight)
            for expert, weight in zip(choice.experts, choice.weights, strict=True)
            if expert < len(self.experts)
        ]
        add_experts(residual_D, states_D, chosen, self.size)

    def _logits(self, states_D: Tensor) -> list[float]:
        if not self.is_linear:
            return self.router.score(states_D.float().unsqueeze(0)).tolist()[0]
        weight_ED = self.router.weight
        return torch.mv(filled_rows(weight_ED.float()), states_D.float()).tolist()[: len(self.experts)]


class LeanBanks:
    """[`MixtureOfBanks`] of one text token, added to the residual stream in place.

    Args:
        open_banks: names of the banks that take it.
    """

    def __init__(self, mixture: Any, open_banks: Collection[str]):
        self.shared = None if mixture.shared_experts is None else LeanDense(mixture.shared_experts)
        self.gate: Tensor | None = mixture.bank_gate.weight
        names = [bank.name for bank in mixture.bank_gate.banks]
        self.columns = [column for column, name in enumerate(names) if name in open_banks]
        self.banks = [LeanBank(mixture.banks[names[column]]) for column in self.columns]
        own = [bank for name, bank in mixture.banks.items() if bank.gate is not None and name in open_banks]
        self.own_gates = [bank.gate for bank in own]
        self.own_banks = [LeanBank(bank) for bank in own]

    def __call__(self, residual_D: Operand, states_D: Operand) -> None:
        weights = [1.0]
        if self.gate is not None and len(self.banks) > 1:
            logits = torch.mv(self.gate.float(), states_D.tensor.float()).tolist()
            weights = softmax([logits[column] for column in self.columns])
        weights = weights[: len(self.banks)] + [gate(states_D.tensor).item() for gate in self.own_gates]
        if self.shared is not None:
            self.shared(residual_D, states_D)
        for bank, weight in zip(self.banks + self.own_banks, weights, strict=True):
            bank(residual_D, states_D, weight)


class ModuleFeedForward:
    """A feed-forward that is not written out here: the module itself, called with one text token."""

    def __init__(self, module: nn.Module, banks: Mapping[str, ExpertBankConfig]):
        self.module = module
        modality_BS = torch.zeros(1, 1, dtype=torch.long)
        options = read_routing_options(banks, modality_BS, None, False, None, None, None, None)
        self.plan = ModalityPlan.build(modality_BS, None, options)

    def __call__(self, residual_D: Operand, states_D: Operand) -> None:
        residual_D.tensor.add_(self.module(states_D.tensor.view(1, 1, -1), self.plan)[0].view(-1))
