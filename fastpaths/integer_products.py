"""Products of a few rows with int8 weights, in whole numbers: no weight is ever computed as a float.

Unusual here: each row is written as three int8 pieces, `scale * (p0 + p1 / 254 + p2 / 254**2)`, which hold all the bits
of a float32 beside the row's largest number. Sums of products of whole numbers are exact, so the result is as exact as
in float32. Two pieces would not do: rows of language models hold a few numbers hundreds of times as large as the rest.

Shape suffixes: T tokens, N rows of a weight, M its columns.
"""

from functools import cache

import torch
from torch import Tensor

PIECES = 3
# A piece of what is left over stands for numbers up to half a step of the one before.
STEP = 254
# More rows are worth a weight in floating point (512 to 1,024 columns, measured with AMX: 1.4 to 3 times as fast as
# float32 at 8 to 16 rows, as fast at 32 to 64).
MOST_ROWS = 32


@cache
def multiplies_integers() -> bool:
    """Whether this processor multiplies int8 matrices fast, and sums the products without overflow."""
    # Older ones sum two products in 16 bits, and what is larger is cut off. oneDNN can be told to act like one of them.
    found = torch.cpu.get_capabilities()
    if not any(found.get(name) for name in ("amx_int8", "avx512_vnni", "avx_vnni")):
        return False
    if not torch.backends.mkldnn.is_available():
        return False
    # Neighbours are summed, so both must be large; oneDNN adds 128 to one side first, which leaves nothing of -128.
    extremes_TM = torch.tensor([127, 127, -128, -128], dtype=torch.int8).repeat(4, 16)
    expected = extremes_TM.long() @ extremes_TM.long().t()
    return torch.equal(torch._int_mm(extremes_TM, extremes_TM.t()).long(), expected)


def in_pieces(rows_TM: Tensor, count: int = PIECES) -> tuple[Tensor, Tensor]:
    """The pieces `(count, T, M)` of rows, int8, and their scale `(T, 1)`, float32; one piece alone rounds the rows."""
    rows_TM = rows_TM.float()
    scale_T1 = rows_TM.abs().amax(-1, keepdim=True).div_(127)
    rest_TM = rows_TM / scale_T1.clamp_min(torch.finfo(torch.float32).tiny)
    pieces = rows_TM.new_empty(count, *rows_TM.shape, dtype=torch.int8)
    for index in range(count):
        whole_TM = rest_TM.round()
        pieces[index] = whole_TM
        rest_TM.sub_(whole_TM).mul_(STEP)
    return pieces, scale_T1


def integer_product(pieces: Tensor, values_NM: Tensor, scale_N1: Tensor) -> Tensor:
    """`x @ W.T`, `(T, N)`, float32, of rows in pieces `(P, T, M)`, before the rows' own scale."""
    *larger, product_TN = torch._int_mm(pieces.flatten(0, 1), values_NM.t()).float().chunk(len(pieces))
    for piece_TN in reversed(larger):
        product_TN = piece_TN.add_(product_TN, alpha=1 / STEP)
    return product_TN.mul_(scale_N1.t())
