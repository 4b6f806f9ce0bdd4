"""Operations of a step of one token, written as loops for Inductor: the library's own would end a kernel.

Shape suffixes: B batch, H heads, S keys, D width of a head, E values.
"""

from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chorus_moe.fastpaths import quantized_weights
from chorus_moe.fastpaths.quantized_weights import STEP_TOKENS, row_product, streams

# Values of a `topk`: with more, comparing each with each takes longer than what a step gains by being replayed.
MOST_COMPARED = 512
# Names the code that graphs on disk were made by, which their own key does not know: another release makes others.
CODE = sha256(b"".join(Path(name).read_bytes() for name in (__file__, quantized_weights.__file__))).hexdigest()


def in_memory(states: Tensor) -> Tensor:
    """For Inductor, which otherwise makes states anew, norms and rotations, for every row they are multiplied with."""
    return states.as_strided(states.shape, states.stride())


def mm(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right` of a few rows, as sums in one loop, which reads the weights once."""
    # A library's product of one row reads in one stream, and one of eight rows takes twice the time of the reading. A
    # GPU's own products are best.
    if len(left) > STEP_TOKENS or left.device.type != "cpu":
        return NotImplemented
    count = streams(right, len(left))
    return torch.stack([row_product(right.t(), row, count) for row in in_memory(left).unbind()])


def addmm(bias: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    product = mm(left, right) if beta == alpha == 1 else NotImplemented
    return NotImplemented if product is NotImplemented else product + bias


def topk(values: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> tuple[Tensor, Tensor]:
    """The `k` largest by comparing each with each, in loops: a library's call cannot be one of a step's kernels."""
    if not largest or dim not in (-1, values.ndim - 1) or values.shape[-1] > MOST_COMPARED:
        return NotImplemented
    place_E, each, others = torch.arange(values.shape[-1]), values[..., :, None], values[..., None, :]
    # Of equals the first, so that no two have one rank.
    is_before = (others > each) | ((others == each) & (place_E < place_E[:, None]))
    is_ranked = is_before.sum(-1)[..., None, :] == torch.arange(k)[:, None]
    index = is_ranked.int().argmax(-1)
    return values.gather(-1, index), index


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of one token a sample, as sums."""
    # The library's wants keys and values in memory for every head; here heads read those that they share.
    if query.shape[-2] > 1 or dropout_p or is_causal:
        return NotImplemented
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores_BHS = (in_memory(query).float() * key).sum(-1) * scale
    if attn_mask is not None:
        scores_BHS = scores_BHS + attn_mask[..., 0, :]
    output_BHD = (scores_BHS.softmax(-1)[..., None] * value).sum(-2)
    return output_BHD[:, :, None].to(query.dtype), scores_BHS.logsumexp(-1)[..., None]


aten = torch.ops.aten
# In the place of Inductor's decompositions.
OPERATIONS: dict[Any, Callable[..., Any]] = {aten.mm.default: mm, aten.addmm.default: addmm}
CPU_OPERATIONS: dict[Any, Callable[..., Any]] = {
    aten.topk.default: topk,
    aten._scaled_dot_product_flash_attention_for_cpu.default: attention,
}
