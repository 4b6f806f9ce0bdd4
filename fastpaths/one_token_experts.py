"""SwiGLU experts for a single token on the CPU: two matrix-vector products each, nothing gathered.

Shape suffixes: K experts per token, D hidden size, I expert width, H = 2I.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from chorus_moe.fastpaths.row_products import Operand, add_product, multiply, operand, weight_operand

# An expert's `gate_up (H, D)` and `down (D, I)`, and its weight.
WeightedExpert = tuple[Operand, Operand, float]
# Free buffers, by size. A thread takes one out while it uses it.
_free: dict[tuple[int, int, torch.dtype], list["OneTokenExperts"]] = {}


class OneTokenExperts:
    """Buffers for at most K experts of width I."""

    def __init__(self, top_k: int, width: int, dtype: torch.dtype):
        # Buffers made in inference mode could not be written outside of it.
        with torch.inference_mode(False):
            hidden_KH = torch.empty(top_k, 2 * width, dtype=dtype)
            gate_KI, up_KI = hidden_KH.chunk(2, dim=1)
            self.hidden = [operand(hidden_H) for hidden_H in hidden_KH.unbind(0)]
            self.active = [operand(gate_I) for gate_I in gate_KI.unbind(0)]
            self.halves = [(gate_KI[:count], up_KI[:count]) for count in range(top_k + 1)]

    def add(self, output_D: Operand, token_D: Operand, experts: Sequence[WeightedExpert], beta: int = 1) -> None:
        """Add the weighted outputs of at least one expert to `output_D`, in place; with beta 0, write them there."""
        for (gate_up_HD, _, _), hidden_H in zip(experts, self.hidden, strict=False):
            multiply(gate_up_HD, token_D, hidden_H)
        gate_RI, up_RI = self.halves[len(experts)]
        # One pair of operations for all experts: beside six megabytes of weights, each small one takes a tenth of a
        # product.
        F.silu(gate_RI, inplace=True).mul_(up_RI)
        for (_, down_DI, weight), active_I in zip(experts, self.active, strict=False):
            add_product(output_D, down_DI, active_I, weight, beta)
            beta = 1


def add_experts(
    output_D: Operand,
    token_D: Operand,
    experts: Sequence[WeightedExpert],
    size: tuple[int, int, torch.dtype],
    beta: int = 1,
) -> None:
    """As `OneTokenExperts.add`, in free buffers of the size `(K, I, dtype)`."""
    # Used again: those of the last layer are still cached, fresh ones are not.
    free = _free.setdefault(size, [])
    try:  # looking first and taking then would be two steps, and another thread may come between
        buffers = free.pop()
    except IndexError:
        buffers = OneTokenExperts(*size)
    buffers.add(output_D, token_D, experts, beta)
    free.append(buffers)


def expert_of(stack_EHD: Operand, expert: int) -> Operand:
    """One expert's matrix."""
    array = stack_EHD.array
    return Operand(stack_EHD.tensor.select(0, expert), array if array is None else array[expert])


def run_one_token(
    hidden_1D: Tensor, index: list[int], weights: list[float], gate_up_EHD: Tensor, down_EDI: Tensor
) -> Tensor:
    """The weighted sum `(1, D)` of the chosen experts; an id of E or more is a sentinel and is skipped."""
    num_experts, width, dtype = down_EDI.shape[0], down_EDI.shape[2], hidden_1D.dtype
    gate_up, down = weight_operand(gate_up_EHD), weight_operand(down_EDI)
    experts = [
        (expert_of(gate_up, expert), expert_of(down, expert), weight)
        for expert, weight in zip(index, weights, strict=True)
        if expert < num_experts
    ]
    if not experts:
        return torch.zeros_like(hidden_1D)
    # Under autocast: only the chosen experts are cast, where casting the stack would copy all.
    if down_EDI.dtype != dtype:
        experts = [
            (weight_operand(gate_up_HD.tensor.to(dtype)), weight_operand(down_DI.tensor.to(dtype)), weight)
            for gate_up_HD, down_DI, weight in experts
        ]
    output_1D = torch.empty_like(hidden_1D)
    add_experts(operand(output_1D[0]), operand(hidden_1D[0]), experts, (len(index), width, dtype), beta=0)
    return output_1D
