"""Weights of whole numbers, one or two to a byte, and products with them: linear layers, embeddings, stacked experts.

Unusual here:
- a quantised weight is one of torch's parametrizations. `module.weight` is still there, computed when it is read, and
  what is stored are plain tensors: `parametrizations.weight.original` and `parametrizations.weight.0.scale`. So one
  layout serves safetensors, PEFT and the compiler, for matrices and for stacks of them;
- many rows are multiplied by floating-point copies, one linear layer or a few experts at a time; a few rows, and a
  decoding step, by the whole numbers themselves.

Shape suffixes: T tokens, N rows of a weight, M its columns, G groups of a row; E experts.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized, register_parametrization

from chorus_moe.fastpaths.integer_products import MOST_ROWS, PIECES, in_pieces, integer_product, multiplies_integers
from chorus_moe.modeling.moe_banks import ChorusExperts

# A core that loads from several places at once reads memory faster: one loop sums rows of this many parts of a matrix
# (Sapphire Rapids: 18 GB/s from four, 12 to 14 from one).
STREAMS = 4
# More of them pay where the arithmetic of unpacking counts.
STREAMS_OF_4_BITS = 8
# Tokens of a decoding step, at most.
STEP_TOKENS = 8
# Weights that are computed at a time for a product: as floats they stay in the second cache.
BLOCK = 2**18


@dataclass(frozen=True)
class Quantized:
    """What stands for a weight `(..., N, M)` in products.

    Args:
        values: int8 `(..., N, M)`; or uint8 `(..., N, M / 2)`, the first half of each group in the lower four bits and
            the second in the upper ones, 8 added to each.
        scale: `(..., N, G)`; its dtype is that of the weight.
        offset: `(..., N, G)`, added to each number of a group; None where zero is a whole number.
        rounds_states: what it is multiplied with becomes int8 as well, a scale for each row.
    """

    values: Tensor
    scale: Tensor
    offset: Tensor | None
    rounds_states: bool = False
    requires_grad = False

    @property
    def bits(self) -> int:
        return 4 if self.values.dtype == torch.uint8 else 8

    @property
    def shape(self) -> torch.Size:
        *rows, width = self.values.shape
        return torch.Size([*rows, width * 8 // self.bits])

    @property
    def dtype(self) -> torch.dtype:
        return self.scale.dtype

    @property
    def scales_rows(self) -> bool:
        """Whether a row is int8 numbers times one scale."""
        return self.bits == 8 and self.scale.shape[-1] == 1 and self.offset is None

    @property
    def pieces(self) -> int:
        """In how many int8 pieces a row is multiplied in whole numbers."""
        return 1 if self.rounds_states else PIECES

    def rounded(self, states: Tensor) -> Tensor:
        """States `(..., M)` as they are multiplied, in their own dtype."""
        if not self.rounds_states:
            return states
        rows = states.float()
        scale = rows.abs().amax(-1, keepdim=True).div(127).clamp_min(torch.finfo(torch.float32).tiny)
        return ((rows / scale).round() * scale).to(states.dtype)

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: slice | Tensor | int) -> "Quantized":
        offset = None if self.offset is None else self.offset[index]
        return replace(self, values=self.values[index], scale=self.scale[index], offset=offset)

    def grouped(self) -> Tensor:
        """The stored numbers by group: `(..., N, G, M / G)`, or half of that."""
        return self.values.unflatten(-1, (self.scale.shape[-1], -1))

    def dequantize(self, out: Tensor | None = None) -> Tensor:
        """The weight `(..., N, M)`, in `out` if that is given, which may be of another dtype."""
        out = self.values.new_empty(self.shape, dtype=self.dtype) if out is None else out
        grouped = out.unflatten(-1, (self.scale.shape[-1], -1))
        if self.bits == 4:
            stored = self.grouped()
            low, high = grouped.chunk(2, dim=-1)
            low.copy_((stored & 15).view(torch.int8).sub_(8))
            high.copy_((stored >> 4).view(torch.int8).sub_(8))
        else:
            grouped.copy_(self.grouped())
        grouped.mul_(self.scale[..., None])
        if self.offset is not None:
            grouped.add_(self.offset[..., None])
        return out

    def tensor_split(self, sections: int, dim: int) -> list["Quantized"]:
        """Parts of the rows (`dim=-2`)."""
        tensors = (self.values, self.scale, self.offset)
        parts = [[None] * sections if tensor is None else tensor.tensor_split(sections, dim) for tensor in tensors]
        return [
            replace(self, values=values, scale=scale, offset=offset)
            for values, scale, offset in zip(*parts, strict=True)
        ]

    def row_sums(self, states_M: Tensor) -> Tensor:
        """Sums `(..., N)`, float32, of the products with one vector, which [`of_sums`] makes a product of."""
        states_GJ = states_M.float().unflatten(-1, (self.scale.shape[-1], -1))
        stored = self.grouped()
        if self.bits == 4:
            # A byte is 16 high + low, both with 8 added. So high is (byte - low) / 16, and the two states share what is
            # read: one mask and two products a byte.
            low_GJ, high_GJ = states_GJ.chunk(2, dim=-1)
            high_GJ = high_GJ / 16
            terms = (stored & 15).float() * (low_GJ - high_GJ) + stored.float() * high_GJ
        else:
            terms = stored.float() * states_GJ
        # With several scales a row, scaled before the sum: one sum a row instead of one a group.
        return (terms if self.scale.shape[-1] == 1 else terms * self.scale[..., None]).sum((-1, -2))

    def of_sums(self, sums_N: Tensor, states_M: Tensor) -> Tensor:
        """The product `(..., N)`."""
        product = sums_N * self.scale[..., 0] if self.scale.shape[-1] == 1 else sums_N
        offset = -8 * self.scale if self.bits == 4 else None
        if self.offset is not None:
            offset = self.offset if offset is None else self.offset + offset
        if offset is not None:
            states_G = states_M.float().unflatten(-1, (self.scale.shape[-1], -1)).sum(-1)
            product = product + (offset * states_G).sum(-1)
        return product.to(states_M.dtype)


def quantized(weight: Tensor, bits: int, group: int, symmetric: bool = True) -> Quantized:
    """Round a weight `(..., N, M)` to the nearest of the whole numbers of each group.

    Args:
        bits: 8 or 4.
        group: neighbours in a row that share a scale; it divides M and, at 4 bits, is even.
        symmetric: whole numbers stand around zero; otherwise they span what lies between least and greatest.
    """
    limit = 2 ** (bits - 1)
    # In double precision where the weight is: a scale of another dtype would not be what is stored.
    grouped = weight.detach().unflatten(-1, (weight.shape[-1] // group, group))
    grouped = grouped.to(torch.promote_types(weight.dtype, torch.float32))
    least, greatest = grouped.amin(-1), grouped.amax(-1)
    if symmetric:
        # The number farthest from zero becomes -limit, of which there is one more than of positive ones.
        farthest = torch.where(-least > greatest, least, greatest)
        scale, offset = (farthest / -limit).to(weight.dtype), None
    else:
        scale = ((greatest - least) / (2 * limit - 1)).to(weight.dtype)
        offset = (least + limit * scale).to(weight.dtype)
    # A group of equal numbers has no scale, and any but zero is right for it.
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    shifted = grouped if offset is None else grouped - offset[..., None]
    values = (shifted / scale[..., None]).round_().clamp_(-limit, limit - 1).to(torch.int8)
    if bits == 4:
        low, high = (values + 8).to(torch.uint8).chunk(2, dim=-1)
        values = low | (high << 4)
    return Quantized(values.flatten(-2), scale, offset)


class _Copy(Tensor):
    """A weight that was computed: what is written to it would be lost."""

    # As in `nn.Parameter`: results are plain tensors, at no cost.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        return self.as_subclass(Tensor).detach()  # type: ignore[arg-type]

    @data.setter
    def data(self, value: Tensor) -> None:
        raise RuntimeError(
            "a quantised weight cannot be written to (is an adapter being merged?); call "
            "chorus_moe.surgery.dequantize(model) first"
        )


class QuantizedWeight(nn.Module):
    """The parametrization: from stored numbers to the weight.

    Args:
        scale, offset: as in [`Quantized`].
    """

    def __init__(self, scale: Tensor, offset: Tensor | None):
        super().__init__()
        # Buffers: nothing trains them.
        self.scale = nn.Buffer(scale)
        self.offset = None if offset is None else nn.Buffer(offset)

    def of(self, values: Tensor) -> Quantized:
        return Quantized(values, self.scale, self.offset)

    def forward(self, values: Tensor) -> Tensor:
        weight = self.of(values).dequantize()
        return weight if torch.compiler.is_compiling() else weight.as_subclass(_Copy)


def row_product(weight: Tensor | Quantized, states_M: Tensor, streams: int = 1, index: Tensor | None = None) -> Tensor:
    """The product `(..., N)` of a weight, or of some of a stack, with one vector, for a compiler.

    It becomes one loop that reads what is stored, in several parts of the rows at once.
    """
    # Each part is indexed, not all before they are parted: the compiler would copy what several loops read.
    parts: list[Any] = [part if index is None else part[index] for part in weight.tensor_split(streams, dim=-2)]
    if not isinstance(weight, Quantized):
        return torch.cat([(part * states_M).sum(-1) for part in parts], dim=-1)
    states_M = weight.rounded(states_M)
    # Scaled once the parts are one: what is allocated for each of them takes as long as a third of its product.
    sums = torch.cat([part.row_sums(states_M) for part in parts], dim=-1)
    return (weight if index is None else weight[index]).of_sums(sums, states_M)


def streams(weight: Tensor | Quantized, products: int) -> int:
    """In how many parts the rows of a weight are read for several products with a vector each."""
    most = STREAMS_OF_4_BITS if isinstance(weight, Quantized) and weight.bits == 4 else STREAMS
    return most if products < STREAMS else max(1, most // 2)


def stored_weight(module: object, name: str) -> Tensor | Quantized:
    """[`Quantized`] where a module's weight is quantised and has no adapter on it; the weight elsewhere."""
    if isinstance(module, nn.Module) and is_parametrized(module, name):
        steps: Any = module.parametrizations[name]  # type: ignore[index]
        if len(steps) == 1 and isinstance(steps[0], QuantizedWeight):
            return steps[0].of(steps.original)
    weight = getattr(module, name)
    # What torchao stores in the same way. It multiplies stacks by nothing.
    if type(weight).__name__ == "Int8Tensor" and weight.ndim == 3:
        return Quantized(weight.qdata, weight.scale, None, _rounds_states(weight))
    return weight


def _rounds_states(stack: Any) -> bool:
    """Whether torchao's stack of matrices is for states in int8.

    Raises:
        ValueError: states rounded in another way than by row around zero.
    """
    asked: Any = stack.act_quant_kwargs
    others = (stack.act_quant_scale, stack.act_quant_zero_point, stack.act_pre_scale)
    if asked is None and all(other is None for other in others):
        return False
    is_fixed = asked is None or any(other is not None for other in others)
    if not is_fixed and asked.mapping_type.name == "SYMMETRIC" and type(asked.granularity).__name__ == "PerRow":
        return True
    found = "a fixed scale" if is_fixed else asked
    raise ValueError(f"stacked experts round activations by row around zero, not with {found}; leave experts out")


class _Steps(ParametrizationList):
    """The parametrizations of one weight."""

    def append(self, module: nn.Module) -> Self:
        # PEFT 0.21 puts an adapter on top for each forward, and takes it away by its class; it forgot one of two.
        removed = getattr(sys.modules[type(module).__module__], "_LoraParameterProxy", None)
        if removed is not None and not isinstance(module, removed):
            module.__class__ = _removable(type(module), removed)  # type: ignore[arg-type]
        return super().append(module)


@cache
def _removable(kind: type, removed: type) -> type:
    return type(kind.__name__, (kind, removed), {})


def product_in_blocks(states: Tensor, weight: Quantized) -> Tensor:
    """`x @ W.T`, `(..., N)`; the weight is computed a block of rows at a time."""
    rows_TM = states.reshape(-1, states.shape[-1])
    count, width = weight.shape
    size = max(1, BLOCK // width)
    output_TN = rows_TM.new_empty(len(rows_TM), count)
    buffer = rows_TM.new_empty(min(size, count), width)
    for start in range(0, count, size):
        part = weight[start : start + size]
        block = buffer[: len(part)]
        if weight.scales_rows:
            block.copy_(part.values)
        else:
            part.dequantize(out=block)
        torch.mm(rows_TM, block.t(), out=output_TN[:, start : start + size])
    if weight.scales_rows:
        # Fewer numbers than the weight has.
        output_TN.mul_(weight.scale.t())
    return output_TN.unflatten(0, states.shape[:-1])


def multiplies_whole_numbers(weight: Quantized, rows: float) -> bool:
    """Whether a product of this many rows reads the stored numbers, see `integer_products`."""
    is_plain = weight.scales_rows and weight.dtype != torch.float64 and weight.values.device.type == "cpu"
    return is_plain and (rows <= MOST_ROWS or weight.rounds_states) and multiplies_integers()


class _Product(torch.autograd.Function):
    """`x @ W.T`; the weight is computed a second time for the gradient, not kept."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Quantized) -> Tensor:
        ctx.weight = weight
        return product_in_blocks(states, weight)  # on a GPU as well: beside it, memory holds one block

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.weight.dequantize().to(grad.dtype), None


def multiply(states: Tensor, weight: Quantized) -> Tensor:
    """`x @ W.T`, `(..., N)`, of states `(..., M)`."""
    rows_TM = states.reshape(-1, states.shape[-1])
    if torch.compiler.is_compiling() and states.device.type == "cpu" and len(rows_TM) <= STEP_TOKENS:
        # Row by row: their loops become one over the rows of the weight, which is read once.
        count = streams(weight, len(rows_TM))
        products = [row_product(weight, row_M, count) for row_M in rows_TM.unbind()]
        return torch.stack(products).unflatten(0, states.shape[:-1])
    if torch.is_grad_enabled() and states.requires_grad:
        return _Product.apply(states, weight)
    if states.device.type == "cpu" and not torch.compiler.is_compiling():
        if multiplies_whole_numbers(weight, len(rows_TM)):
            pieces, scale_T1 = in_pieces(rows_TM)
            product_TN = integer_product(pieces, weight.values, weight.scale).mul_(scale_T1)
            return product_TN.to(states.dtype).unflatten(0, states.shape[:-1])
        return product_in_blocks(states, weight)
    return F.linear(states, weight.dequantize().to(states.dtype))


class QuantizedLinear(nn.Linear):
    """A linear layer whose weight is quantised."""

    def forward(self, input: Tensor) -> Tensor:
        weight = stored_weight(self, "weight")
        if not isinstance(weight, Quantized) or torch.is_autocast_enabled(input.device.type):
            return F.linear(input, self.weight, self.bias)
        product = multiply(input, weight)
        return product if self.bias is None else product + self.bias


class QuantizedEmbedding(nn.Embedding):
    """A table of embeddings whose rows are quantised; only those that are looked up are computed."""

    def forward(self, input: Tensor) -> Tensor:
        weight = stored_weight(self, "weight")
        return weight[input].dequantize() if isinstance(weight, Quantized) else super().forward(input)


class QuantizedExperts(ChorusExperts):
    """Stacked experts whose weights are quantised; `cpu_mm` and compiled decoding read the stored numbers."""


CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: QuantizedLinear,
    nn.Embedding: QuantizedEmbedding,
    ChorusExperts: QuantizedExperts,
}
# Class -> the class that torch made for its first quantised module.
_parametrized: dict[type, type] = {}


def store_quantized(module: nn.Module, weights: Mapping[str, Quantized]) -> None:
    """Replace all weights of a module by quantised ones."""
    base = CLASSES[type(module)]
    module.__class__ = base
    for name, weight in weights.items():
        setattr(module, name, nn.Parameter(weight.values, requires_grad=False))
        register_parametrization(module, name, QuantizedWeight(weight.scale, weight.offset), unsafe=True)
        module.parametrizations[name].__class__ = _Steps  # type: ignore[index,union-attr]
    # torch makes a class for each module. Of one class, equal layers are compiled once.
    module.__class__ = _parametrized.setdefault(base, type(module))


def restore(module: nn.Module) -> None:
    """Replace a module's quantised weights by floating-point copies."""
    base = next(kind for kind in type(module).__mro__ if kind in CLASSES)
    parametrizations: Any = module.parametrizations
    weights = {name: stored_weight(module, name).dequantize() for name in parametrizations}
    del module.parametrizations
    module.__class__ = base
    for name, weight in weights.items():
        setattr(module, name, nn.Parameter(weight))
