"""What the layers are made of: RMS norm, feed-forwards in chunks of the sequence, products in float32.

Shape suffixes: T tokens, D hidden size, E rows of a weight.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import initialization as init
from transformers.activations import ACT2FN

from .configuration_services import SERVICES
from .configuration_text import ChorusTextConfig


def without_autocast(states: Tensor) -> AbstractContextManager:
    """A context in which autocast is off. Where it is off already, the context costs nothing."""
    kind = states.device.type
    # Entering autocast takes microseconds, which count at one token.
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


# Matrix libraries sum rows that are left over after blocks of four in another order. With rows filled up, an expert's
# score depends on how many others there are by rounding at most, and by no bit on Intel's processors.
ROW_BLOCK = 4


def float32_product(hidden_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """`x @ W.T` in float32 whatever the two are stored in, `(T, E)`."""
    is_narrow = hidden_TD.dtype == weight_ED.dtype and hidden_TD.dtype in (torch.bfloat16, torch.float16)
    if is_narrow and hidden_TD.is_cuda and not torch.compiler.is_compiling() and "narrow_product" in SERVICES:
        return SERVICES["narrow_product"](hidden_TD, weight_ED)
    return F.linear(hidden_TD.float(), weight_ED.float())


def filled_rows(weight_ED: Tensor) -> Tensor:
    """The rows of a router, filled up with zeros to a multiple of `ROW_BLOCK`."""
    missing = -len(weight_ED) % ROW_BLOCK
    return F.pad(weight_ED, (0, 0, 0, missing)) if missing else weight_ED


class RMSNorm(nn.RMSNorm):
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension (arXiv 1910.07467), the mean at least in float32.

    As in Llama, the normalised states return to their own dtype before the weight multiplies them.
    """

    def forward(self, hidden_states: Tensor) -> Tensor:
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        # Few operations: on the CPU `torch.rms_norm` takes twice the time on one token.
        norm = torch.linalg.vector_norm(hidden_states, dim=-1, keepdim=True, dtype=dtype)
        scale = torch.addcmul(norm.new_full((), self.eps), norm, norm, value=1 / hidden_states.shape[-1]).rsqrt()
        normed = (hidden_states * scale).to(hidden_states.dtype)
        if torch.is_grad_enabled() or normed.dtype != self.weight.dtype:
            return normed * self.weight
        # In place: a long prefill spares a tensor as long as the sequence.
        return normed.mul_(self.weight)


class TokenGate(nn.Module):
    """A logit `w x + b` of each token, in float32."""

    start_bias = 0.0

    def __init__(self, hidden_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, hidden_size))
        self.bias = nn.Parameter(torch.empty(1))

    def start_weights(self, std: float) -> None:
        init.zeros_(self.weight)
        init.constant_(self.bias, self.start_bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        with without_autocast(hidden_states):
            return F.linear(hidden_states.float(), self.weight.float(), self.bias.float()).squeeze(-1)


# Tokens of a chunk unless another size is asked for. A CPU's caches hold this many; a GPU needs more to be busy.
CHUNK = 1024
GPU_CHUNKS = 16


def in_chunks(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], size: int, automatic: int = CHUNK) -> Tensor:
    """`function(*inputs)`, on a chunk of rows at a time: exact, since every token is fed forward alone.

    Args:
        function: from tensors `(T, ...)` to one tensor `(T, D)`, each row by itself.
        size: rows of a chunk, also in training; 0 for chunks of `automatic` rows (on a GPU more), at inference only.
    """
    count, is_training = len(inputs[0]), torch.is_grad_enabled()
    if inputs[0].device.type != "cpu":
        automatic *= GPU_CHUNKS
    size = size or (count if is_training else automatic)
    if torch.compiler.is_compiling() or count <= size:  # in this order: a graph must not compare its sizes
        return function(*inputs)
    parts = zip(*(states.split(size) for states in inputs), strict=True)
    if is_training:
        # Between input and output of a chunk nothing is kept: the backward computes each chunk a second time.
        return torch.cat([checkpoint(function, *part, use_reentrant=False) for part in parts])
    output = None
    # Written in place, not concatenated: that would hold all chunks twice.
    for start, part in zip(range(0, count, size), parts, strict=True):
        result = function(*part)
        output = result.new_empty(count, *result.shape[1:]) if output is None else output
        output[start : start + size] = result
    assert output is not None
    return output


class GatedMLP(nn.Module):
    """SwiGLU feed-forward (arXiv 2002.05202): dense layers and the always-on shared experts. Long inputs run in chunks,
    see `in_chunks`."""

    def __init__(self, config: ChorusTextConfig, intermediate_size: int, bias: bool = False):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, intermediate_size, bias=bias)
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=bias)
        self.act_fn = ACT2FN[config.hidden_act]
        self.chunk_size = config.chunk_size_feed_forward

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        return in_chunks(self._feed, (hidden_TD,), self.chunk_size).view_as(hidden_states)

    def _feed(self, hidden_states: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))
