"""Expert feed-forwards on the CPU, registered with transformers as the experts implementation `cpu_mm`.

Rows are sorted once into slots, see `expert_slots`; nothing is ever dropped. An expert id of E or more is a sentinel:
the pair costs nothing, adds nothing and receives a zero gradient. The name may stand in a config on any device: off
the CPU `experts_gpu` takes over, and under `torch.compile` transformers' functions do.

Shape suffixes: T tokens, K experts per token, E experts, D hidden size, I expert width, P slots; inside one product,
R experts, C rows per expert, H = 2I.
"""

import math
from functools import cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface

from chorus_moe.fastpaths.expert_slots import FEW_ROWS, PADDED_ROWS, SlotPlan, Unit, few_rows, make_slot_plan
from chorus_moe.fastpaths.experts_gpu import gpu_mm_experts_forward
from chorus_moe.fastpaths.integer_products import in_pieces, integer_product
from chorus_moe.fastpaths.one_token_experts import run_one_token
from chorus_moe.fastpaths.quantized_weights import (
    Quantized,
    multiplies_whole_numbers,
    product_in_blocks,
    stored_weight,
)
from chorus_moe.fastpaths.row_products import MOST_ROWS, can_stream, multiply_stacked
from chorus_moe.fastpaths.supported_experts import (
    GATHERED,
    StackedExperts,
    can_group,
    has_plain_layout,
    is_few_to_gather,
    is_silu,
    run_plainly,
)
from chorus_moe.modeling.layers import without_autocast

CPU_EXPERTS = "cpu_mm"


class _Activation(NamedTuple):
    """The gated activation between the two products, on `(R, H, C)`, and its derivative."""

    experts: Any
    is_silu: bool

    def forward(self, hidden_RHC: Tensor, out_RIC: Tensor) -> Tensor:
        if not self.is_silu:
            # Experts of other models bring their own activation, which wants features last.
            return out_RIC.copy_(self.experts._apply_gate(hidden_RHC.transpose(1, 2)).transpose(1, 2))
        gate_RIC, up_RIC = hidden_RHC.chunk(2, dim=1)
        return torch.ops.aten.silu.out(gate_RIC, out=out_RIC).mul_(up_RIC)

    def backward(self, hidden_RHC: Tensor, grad_RIC: Tensor, out_RHC: Tensor) -> Tensor:
        if not self.is_silu:
            with torch.enable_grad():
                leaf = hidden_RHC.detach().requires_grad_()
                output = self.experts._apply_gate(leaf.transpose(1, 2)).transpose(1, 2)
                return out_RHC.copy_(torch.autograd.grad(output, leaf, grad_RIC)[0])
        (gate_RIC, up_RIC), (gate_out, up_out) = hidden_RHC.chunk(2, dim=1), out_RHC.chunk(2, dim=1)
        # Straight into the halves of the output: `chunk` views share its memory, so nothing is concatenated.
        torch.ops.aten.silu.out(gate_RIC, out=up_out).mul_(grad_RIC)
        torch.ops.aten.silu_backward.grad_input(grad_RIC * up_RIC, gate_RIC, grad_input=gate_out)
        return out_RHC


def _product(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """`out[r] = left[r] @ right[r]`, in place; one matrix goes through `mm`, which needs no batch loop."""
    if left.shape[0] == 1:
        torch.mm(left[0], right[0], out=out[0])
    else:
        torch.bmm(left, right, out=out)
    return out


def _transpose(source: Tensor, out: Tensor) -> None:
    """Copy each matrix transposed, one by one: torch transposes two dimensions in blocks, three element by element."""
    for matrix, out_matrix in zip(source, out, strict=True):
        out_matrix.copy_(matrix.t())


class _Workspace:
    """Buffers of the widest unit, reused by every unit: fresh pages cost more than the products on them."""

    def __init__(self, plan: SlotPlan, dtype: torch.dtype):
        self.widest = max(((unit.last - unit.first) * unit.rows for unit in plan.units), default=0)
        self.dtype, self.by_row = dtype, plan.by_row
        self.buffers: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, int, int], width: int) -> Tensor:
        """A tensor of this shape; `width` is its dimension that is neither experts nor rows."""
        if name not in self.buffers:
            self.buffers[name] = torch.empty(self.widest * width, dtype=self.dtype)
        return self.buffers[name][: shape[0] * shape[1] * shape[2]].view(shape)

    def take_features(self, name: str, shape: tuple[int, int, int], width: int) -> Tensor:
        """Activations `(experts, features, rows)`, in the order in memory that the plan names."""
        buffer = self.take(name, shape, width)
        return as_features(buffer.view(-1), shape) if self.by_row else buffer

    def widen(self, name: str, weight: Tensor | Quantized) -> Tensor:
        """The weight in the dtype of the products, in a buffer if it has another or is quantised."""
        if isinstance(weight, Tensor) and weight.dtype == self.dtype:
            return weight
        if name not in self.buffers or self.buffers[name].shape[0] < weight.shape[0]:
            self.buffers[name] = torch.empty(weight.shape, dtype=self.dtype)
        buffer = self.buffers[name][: weight.shape[0]]
        return weight.dequantize(buffer) if isinstance(weight, Quantized) else buffer.copy_(weight)


def as_features(memory: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """`(experts, features, rows)` over memory that holds one row after the other."""
    experts, features, rows = shape
    return memory.view(experts, rows, features).transpose(1, 2)


def _kept_features(kept: Tensor, plan: SlotPlan, unit: Unit, width: int) -> Tensor:
    """What is kept of a unit, `(experts, features, rows)`."""
    memory = kept[unit.slots.start * width : unit.slots.stop * width]
    shape = unit.last - unit.first, width, unit.rows
    return as_features(memory, shape) if plan.by_row else memory.view(shape)


def _run_units(
    hidden_TD: Tensor,
    gate_up_EHD: Tensor | Quantized,
    down_EDI: Tensor | Quantized,
    activation: _Activation,
    plan: SlotPlan,
    kept: Tensor | None,
) -> Tensor:
    """Unweighted outputs `(P, D)` in slot order; pre-activations go to `kept` `(P * H,)` if given."""
    dtype, width = hidden_TD.dtype, hidden_TD.shape[1]
    double, single = gate_up_EHD.shape[1], down_EDI.shape[2]
    space = _Workspace(plan, dtype)
    output_PD = torch.empty(plan.token_P.shape[0], width, dtype=dtype)
    for unit in plan.units:
        first, last, rows, slots = unit.first, unit.last, unit.rows, unit.slots
        group = last - first
        rows_RCD = space.take("rows", (group, rows, width), width)
        torch.index_select(hidden_TD, 0, plan.token_P[slots], out=rows_RCD.view(-1, width))
        if kept is None:
            hidden_RHC = space.take_features("hidden", (group, double, rows), double)
        else:
            hidden_RHC = _kept_features(kept, plan, unit, double)
        # The weight on the LEFT: a library packs the right operand anew at each call, so `x @ W.T` copies a whole
        # expert.
        _product(space.widen("gate_up", gate_up_EHD[first:last]), rows_RCD.transpose(1, 2), hidden_RHC)
        active_RIC = activation.forward(hidden_RHC, space.take_features("active", (group, single, rows), single))
        down_RDI, out_RCD = space.widen("down", down_EDI[first:last]), output_PD[slots].view(group, rows, width)
        # Many rows are worth packing the weight, and the output comes out in order. With few, it is copied transposed.
        if rows > PADDED_ROWS or plan.by_row:
            _product(active_RIC.transpose(1, 2), down_RDI.transpose(1, 2), out_RCD)
        else:
            out_RDC = _product(down_RDI, active_RIC, space.take("rows", (group, width, rows), width))
            _transpose(out_RDC, out_RCD)
    return output_PD


def _combine(output_PD: Tensor, plan: SlotPlan, weight_TK: Tensor | None) -> Tensor:
    """Sum every token's slots, weighted. `embedding_bag` sums in float32 whatever the type; sentinels are skipped."""
    if not plan.token_P.shape[0]:
        return output_PD.new_zeros(plan.slot_TK.shape[0], output_PD.shape[1])
    if weight_TK is None and plan.sentinel_TK is not None:
        # Sentinels stand at slot 0, whose row must be weighed with zero.
        weight_TK = torch.ones_like(plan.slot_TK, dtype=output_PD.dtype)
    if weight_TK is not None:
        weight_TK = weight_TK.to(output_PD.dtype)
        if plan.sentinel_TK is not None:
            weight_TK = weight_TK.masked_fill(plan.sentinel_TK, 0.0)
    return F.embedding_bag(plan.slot_TK, output_PD, mode="sum", per_sample_weights=weight_TK)


class _Experts(torch.autograd.Function):
    """All experts of one call. Saves its inputs, the slots and the pre-activations; the activation is recomputed."""

    # One function for all experts: indexing one expert of a stacked parameter back-propagates through all of them, a
    # gradient of the size of the stack for each expert.

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_TK: Tensor,
        gate_up_EHD: Tensor | Quantized,
        down_EDI: Tensor | Quantized,
        activation: _Activation,
        plan: SlotPlan,
    ) -> Tensor:
        kept = hidden_TD.new_empty(plan.token_P.shape[0] * gate_up_EHD.shape[1])
        output_PD = _run_units(hidden_TD, gate_up_EHD, down_EDI, activation, plan, kept)
        # Quantised ones are no tensors, and nothing trains them.
        ctx.quantized = (gate_up_EHD, down_EDI) if isinstance(gate_up_EHD, Quantized) else None
        ctx.save_for_backward(hidden_TD, weight_TK, kept, *(() if ctx.quantized else (gate_up_EHD, down_EDI)))
        ctx.activation, ctx.plan = activation, plan
        return _combine(output_PD, plan, weight_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TD, weight_TK, kept, *weights = ctx.saved_tensors
        gate_up_EHD, down_EDI = ctx.quantized or weights
        activation, plan = ctx.activation, ctx.plan
        need_hidden, need_weight, need_gate_up, need_down = ctx.needs_input_grad[:4]
        dtype, width = hidden_TD.dtype, hidden_TD.shape[1]
        double, single = gate_up_EHD.shape[1], down_EDI.shape[2]
        num_slots = plan.token_P.shape[0]
        space = _Workspace(plan, dtype)
        weight_P = plan.to_slots(weight_TK.to(dtype))
        grad_hidden_PD = hidden_TD.new_empty(num_slots, width) if need_hidden else None
        grad_weight_P = hidden_TD.new_empty(num_slots) if need_weight else None
        # Not zeros, which would be written before the products: only experts without rows are cleared, below.
        grad_gate_up = torch.empty_like(gate_up_EHD, memory_format=torch.contiguous_format) if need_gate_up else None
        grad_down = torch.empty_like(down_EDI, memory_format=torch.contiguous_format) if need_down else None
        for grad in (grad_gate_up, grad_down):
            if grad is not None:
                for expert, count in enumerate(plan.counts):
                    if not count:
                        grad[expert].zero_()
        for unit in plan.units:
            experts, slots = slice(unit.first, unit.last), unit.slots
            group, rows = unit.last - unit.first, unit.rows
            hidden_RHC = _kept_features(kept, plan, unit, double)
            weight_R1C = weight_P[slots].view(group, 1, rows)
            grad_RCD = space.take("grad", (group, rows, width), width)
            torch.index_select(grad_TD, 0, plan.token_P[slots], out=grad_RCD.view(-1, width))
            active_RIC = activation.forward(hidden_RHC, space.take_features("active", (group, single, rows), single))
            grad_RIC = space.take_features("grad_active", (group, single, rows), single)
            down_RDI = space.widen("down", down_EDI[experts])
            if rows > PADDED_ROWS or plan.by_row:
                _product(down_RDI.transpose(1, 2), grad_RCD.transpose(1, 2), grad_RIC)
            else:
                buffer = space.take("grad_double", (group, rows, single), double)
                _transpose(_product(grad_RCD, down_RDI, buffer), grad_RIC)
            if grad_weight_P is not None:
                # Before `active` is weighted in place: the gradient of a weight is the product with the unweighted
                # activation.
                torch.sum(grad_RIC * active_RIC, dim=1, out=grad_weight_P[slots].view(group, rows))
            if grad_down is not None:
                _accumulate(grad_RCD.transpose(1, 2), active_RIC.mul_(weight_R1C).transpose(1, 2), grad_down, unit)
            if not (need_hidden or need_gate_up):
                continue
            buffer = space.take_features("grad_double", (group, double, rows), double)
            grad_RHC = activation.backward(hidden_RHC, grad_RIC.mul_(weight_R1C), buffer)
            if grad_gate_up is not None:
                rows_RCD = space.take("rows", (group, rows, width), width)
                torch.index_select(hidden_TD, 0, plan.token_P[slots], out=rows_RCD.view(-1, width))
                _accumulate(grad_RHC, rows_RCD, grad_gate_up, unit)
            if grad_hidden_PD is not None:
                out_RCD = grad_hidden_PD[slots].view(group, rows, width)
                _product(grad_RHC.transpose(1, 2), space.widen("gate_up", gate_up_EHD[experts]), out_RCD)
        grad_hidden = _combine(grad_hidden_PD, plan, None) if grad_hidden_PD is not None else None
        grad_weight = plan.from_slots(grad_weight_P).to(weight_TK.dtype) if grad_weight_P is not None else None
        return grad_hidden, grad_weight, grad_gate_up, grad_down, None, None


def _accumulate(left: Tensor, right: Tensor, total: Tensor, unit: Unit) -> None:
    """Write `left @ right` into the unit's experts of `total (E, ...)`, or add it if an earlier chunk has written."""
    target = total[unit.first : unit.last]
    if target.dtype != left.dtype:
        # The products run in float32 although the weight is narrower, see `_is_emulated`.
        product = torch.bmm(left, right)
        target.copy_(product) if unit.opens else target.add_(product)
    elif unit.opens:
        _product(left, right, target)
    else:
        # Later chunks exist only of units with one expert.
        target[0].addmm_(left[0], right[0])


def _run_rows(
    hidden_TD: Tensor, gate_up_EHD: Tensor, down_EDI: Tensor, activation: _Activation, plan: SlotPlan
) -> Tensor:
    """Unweighted outputs `(P, D)`, expert by expert, weights on the right; a handful of rows streams its weights."""
    rows_PD = hidden_TD.index_select(0, plan.token_P)
    output_PD = torch.empty_like(rows_PD)
    widest = max(gate_up_EHD, down_EDI, key=lambda weight: weight.shape[2])
    few = [count if can_stream(widest, count) else 0 for count in plan.counts]
    if any(few):
        is_few_P = (torch.tensor(few) > 0).repeat_interleave(torch.tensor(plan.counts))
        # Reading the weight once is all that a handful of rows costs, see `row_products`.
        output_PD[is_few_P] = _stream(rows_PD[is_few_P], gate_up_EHD, down_EDI, few)
    ends = accumulate(plan.counts)
    for expert, (count, stop) in enumerate(zip(plan.counts, ends, strict=True)):
        if count and not few[expert]:
            slots = slice(stop - count, stop)
            active_RI = activation.experts._apply_gate(torch.mm(rows_PD[slots], gate_up_EHD[expert].t()))
            torch.mm(active_RI, down_EDI[expert].t(), out=output_PD[slots])
    return output_PD


def _run_quantized(
    hidden_TD: Tensor, gate_up_EHD: Quantized, down_EDI: Quantized, activation: _Activation, plan: SlotPlan
) -> Tensor:
    """Unweighted outputs `(P, D)`, expert by expert."""
    rows_PD = gate_up_EHD.rounded(hidden_TD).index_select(0, plan.token_P)
    output_PD = torch.empty_like(rows_PD)
    for expert, (count, stop) in enumerate(zip(plan.counts, accumulate(plan.counts), strict=True)):
        if count:
            slots = slice(stop - count, stop)
            active_RI = activation.experts._apply_gate(product_in_blocks(rows_PD[slots], gate_up_EHD[expert]))
            output_PD[slots] = product_in_blocks(down_EDI.rounded(active_RI), down_EDI[expert])
    return output_PD


def _run_integers(
    hidden_TD: Tensor, gate_up_EHD: Quantized, down_EDI: Quantized, activation: _Activation, plan: SlotPlan
) -> Tensor:
    """Unweighted outputs `(P, D)` of experts with a few rows each, in whole numbers."""
    # All rows are split and scaled at once: with a few rows, what an expert costs beside its products counts.
    pieces, scale_T1 = in_pieces(hidden_TD, gate_up_EHD.pieces)
    hidden_PH = _integer_products(pieces.index_select(1, plan.token_P), gate_up_EHD, plan.counts)
    active_PI = activation.experts._apply_gate(hidden_PH.mul_(scale_T1.index_select(0, plan.token_P)))
    pieces, scale_P1 = in_pieces(active_PI, down_EDI.pieces)
    return _integer_products(pieces, down_EDI, plan.counts).mul_(scale_P1).to(hidden_TD.dtype)


def _integer_products(pieces: Tensor, weight_ENM: Quantized, counts: list[int]) -> Tensor:
    """`(P, N)`, float32, before the rows' own scale; rows are sorted by expert."""
    output_PN = pieces.new_empty(pieces.shape[1], weight_ENM.shape[1], dtype=torch.float32)
    for expert, (count, stop) in enumerate(zip(counts, accumulate(counts), strict=True)):
        if count:
            slots = slice(stop - count, stop)
            values_NM, scale_N1 = weight_ENM.values[expert], weight_ENM.scale[expert]
            output_PN[slots] = integer_product(pieces[:, slots], values_NM, scale_N1)
    return output_PN


def _stream(rows_PD: Tensor, gate_up_EHD: Tensor, down_EDI: Tensor, counts: list[int]) -> Tensor:
    """Unweighted outputs `(P, D)` of SwiGLU experts with a handful of rows each, sorted by expert."""
    gate_IP, up_IP = multiply_stacked(gate_up_EHD, rows_PD, counts).chunk(2)
    active_PI = F.silu(gate_IP, inplace=True).mul_(up_IP).t().contiguous()
    return multiply_stacked(down_EDI, active_PI, counts).t()


def _run_grouped(
    hidden_TD: Tensor, gate_up_EHD: Tensor, down_EDI: Tensor, activation: _Activation, plan: SlotPlan
) -> Tensor:
    """Unweighted outputs `(P, D)` through two grouped products, weights on the right. Differentiable by itself."""
    ends_E = torch.tensor(list(accumulate(plan.counts)), dtype=torch.int32)
    rows_PD = hidden_TD.index_select(0, plan.token_P)
    hidden_PH = F.grouped_mm(rows_PD, gate_up_EHD.transpose(1, 2), offs=ends_E)
    active_PI = activation.experts._apply_gate(hidden_PH)
    return F.grouped_mm(active_PI, down_EDI.transpose(1, 2), offs=ends_E)


@cache
def _is_emulated(dtype: torch.dtype) -> bool:
    """Whether this processor lacks matrix instructions for the dtype."""
    # Without them bfloat16 multiplies four times slower than float32, so experts are widened one unit at a time.
    names = {torch.bfloat16: ("amx_bf16", "avx512_bf16"), torch.float16: ("amx_fp16", "avx512_fp16")}.get(dtype, ())
    capabilities = torch.cpu.get_capabilities()
    return bool(names) and capabilities["architecture"] == "x86_64" and not any(capabilities[name] for name in names)


def _is_supported(experts: StackedExperts) -> bool:
    """Whether the module has the layout this file is written for."""
    kinds = (Tensor, torch.nn.Parameter, Quantized)
    return has_plain_layout(experts, kinds) and (is_silu(experts) or next(experts.act_fn.parameters(), None) is None)


def cpu_mm_experts_forward(
    self: StackedExperts, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Weighted sum of the chosen gated experts, for a module decorated with `use_experts_implementation`.

    Args:
        self: experts with `gate_up_proj (E, 2I, D)`, `down_proj (E, D, I)` and `act_fn`.
        hidden_states: `(T, D)`; T may be zero.
        top_k_index: `(T, K)` expert ids; an id of E or more is a sentinel and is skipped.
        top_k_weights: `(T, K)`.

    Returns:
        `(T, D)` in the dtype of `hidden_states`. Products run in the dtype of the weights, or of autocast.
    """
    # Registered by `compiled_decoding`: one graph that reads the chosen experts and copies nothing.
    if torch.compiler.is_compiling() and is_few_to_gather(top_k_index) and GATHERED in ALL_EXPERTS_FUNCTIONS:
        return ALL_EXPERTS_FUNCTIONS[GATHERED](self, hidden_states, top_k_index, top_k_weights)
    if hidden_states.device.type != "cpu":
        return gpu_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)
    if not _is_supported(self):
        return run_plainly(self, hidden_states, top_k_index, top_k_weights)
    gate_up: Any = stored_weight(self, "gate_up_proj")
    down: Any = stored_weight(self, "down_proj")
    if isinstance(gate_up, Quantized) != isinstance(down, Quantized):  # an adapter on one of them
        gate_up, down = self.gate_up_proj, self.down_proj
    dtype = gate_up.dtype
    if torch.is_autocast_enabled("cpu") and dtype != torch.float64:
        dtype = torch.get_autocast_dtype("cpu")
    activation = _Activation(self, is_silu(self))
    is_training = torch.is_grad_enabled() and any(
        tensor.requires_grad for tensor in (hidden_states, top_k_weights, gate_up, down)
    )
    # The dtype is chosen; inside, autocast would cast the weights of every product again.
    with without_autocast(hidden_states):
        hidden_TD = hidden_states.to(dtype)
        if not is_training and activation.is_silu and hidden_TD.shape[0] == 1 and isinstance(gate_up, Tensor):
            choice = top_k_index.tolist()[0], top_k_weights.tolist()[0]
            return run_one_token(hidden_TD, *choice, gate_up, down).to(hidden_states.dtype)
        if isinstance(gate_up, Quantized) and not is_training:
            plan = make_slot_plan(top_k_index, len(gate_up), math.inf)
            mean_rows = sum(plan.counts) / max(1, sum(count > 0 for count in plan.counts))
            is_whole = all(multiplies_whole_numbers(weight, mean_rows) for weight in (gate_up, down))
            run = _run_integers if is_whole else _run_quantized
            output_PD = run(hidden_TD, gate_up, down, activation, plan)
            return _combine(output_PD, plan, top_k_weights).to(hidden_states.dtype)
        groups = isinstance(gate_up, Tensor) and can_group(hidden_TD, gate_up, down)
        num_few = few_rows(gate_up, is_training) if groups else 0
        if _is_emulated(dtype):  # units are widened
            num_few = min(num_few, 0 if is_training else FEW_ROWS)
        plan = make_slot_plan(top_k_index, len(gate_up), num_few)
        if plan.is_sparse:
            mean_rows = sum(plan.counts) / max(1, sum(count > 0 for count in plan.counts))
            streams = activation.is_silu and not is_training and mean_rows <= MOST_ROWS and can_stream(gate_up)
            output_PD = (_run_rows if streams else _run_grouped)(hidden_TD, gate_up, down, activation, plan)
            return _combine(output_PD, plan, top_k_weights).to(hidden_states.dtype)
        if _is_emulated(dtype):
            hidden_TD = hidden_states.float()
        if is_training:
            output_TD = _Experts.apply(hidden_TD, top_k_weights, gate_up, down, activation, plan)
        else:
            output_PD = _run_units(hidden_TD, gate_up, down, activation, plan, None)
            output_TD = _combine(output_PD, plan, top_k_weights)
        return output_TD.to(hidden_states.dtype)


ExpertsInterface.register(CPU_EXPERTS, cpu_mm_experts_forward)
