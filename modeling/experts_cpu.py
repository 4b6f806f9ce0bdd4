"""Expert feed-forwards on the CPU, registered with transformers as the experts implementation `cpu_mm`.

Unusual here:
- the expert weight stands on the **left** of every product: matrix libraries re-pack the right operand at each call, so
  `x @ W.T` copies a whole expert for a handful of tokens;
- rows are sorted once into slots. Experts with many rows are cut into chunks that stay in cache, adjacent experts with few
  rows are padded to a common number of rows and share one batched product. Nothing is ever dropped;
- training is one `autograd.Function`: it keeps the pre-activations, recomputes the rest, and writes weight gradients
  straight into `(E, ...)` tensors (indexing one expert of a stacked parameter back-propagates through all of them);
- an expert id of E or more is a sentinel: the pair costs nothing, adds nothing and receives a zero gradient.

The function may stand in a config on any device: off the CPU, and under `torch.compile`, it hands over to transformers' own.

Shape suffixes: T tokens, K experts per token, E experts, D hidden size, I expert width, P slots; inside one product,
R experts, C rows per expert, H = 2I.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.activations import SiLUActivation
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface, _default_apply_gate

CPU_EXPERTS = "cpu_mm"
CHUNK_ROWS = 512
PADDED_EXPERTS = 8
PADDED_ROWS = 100


class _Unit(NamedTuple):
    """One batched product: experts `first` to `last - 1`, `rows` slots each, from slot `start` on."""

    first: int
    last: int
    start: int
    rows: int
    opens: bool  # the first chunk of its expert: weight gradients are written, later chunks add

    @property
    def slots(self) -> slice:
        return slice(self.start, self.start + (self.last - self.first) * self.rows)


class _Plan(NamedTuple):
    units: list[_Unit]
    token_P: Tensor  # the token in each slot; padding repeats the last token
    slot_TK: Tensor  # the slot of each pair; 0 for sentinels
    sentinel_TK: Tensor | None  # the pairs to skip, if there are any
    idle: list[int]  # experts without rows


class _Gate(NamedTuple):
    """The gated activation between the two products, on `(R, H, C)`, and its derivative."""

    experts: nn.Module
    is_silu: bool

    def forward(self, hidden_RHC: Tensor, out_RIC: Tensor) -> Tensor:
        if not self.is_silu:
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
        torch.ops.aten.silu.out(gate_RIC, out=up_out).mul_(grad_RIC)
        torch.ops.aten.silu_backward.grad_input(grad_RIC * up_RIC, gate_RIC, grad_input=gate_out)
        return out_RHC


def _make_plan(top_k_index: Tensor, num_experts: int) -> _Plan:
    """Sort the `(T, K)` choices by expert and lay them out in slots."""
    choices = top_k_index.reshape(-1)
    counts = torch.bincount(choices, minlength=num_experts).tolist()[:num_experts]
    num_pairs = sum(counts)
    order = choices.argsort(stable=True)[:num_pairs]
    units, shifts, padded = _make_units(counts)
    slot = torch.arange(num_pairs)
    if padded > num_pairs:
        slot += torch.tensor(shifts).repeat_interleave(torch.tensor(counts))
    token_P = order.new_zeros(padded)
    token_P[slot] = order // top_k_index.shape[1]
    slot_TK = torch.zeros_like(choices)
    slot_TK[order] = slot
    sentinel_TK = top_k_index >= num_experts if num_pairs < choices.numel() else None
    idle = [expert for expert, count in enumerate(counts) if not count]
    return _Plan(units, token_P, slot_TK.view(top_k_index.shape), sentinel_TK, idle)


def _make_units(counts: list[int]) -> tuple[list[_Unit], list[int], int]:
    """Units for these rows per expert, by how many slots each expert's rows move against plain sorting, number of slots."""
    units: list[_Unit] = []
    shifts = [0] * len(counts)
    first, start, sorted_start = 0, 0, 0
    while first < len(counts):
        last, rows, total = first + 1, counts[first], counts[first]
        while last < len(counts) and last - first < PADDED_EXPERTS and rows and counts[last]:
            widest = max(rows, counts[last])
            if widest > PADDED_ROWS or widest * (last + 1 - first) > 1.5 * (total + counts[last]) + 8:
                break
            last, rows, total = last + 1, widest, total + counts[last]
        for expert in range(first, last):
            shifts[expert] = start + (expert - first) * rows - sorted_start
            sorted_start += counts[expert]
        if last - first == 1:
            chunks = -(-rows // CHUNK_ROWS)
            for chunk in range(chunks):
                begin, end = rows * chunk // chunks, rows * (chunk + 1) // chunks
                units.append(_Unit(first, last, start + begin, end - begin, chunk == 0))
        else:
            units.append(_Unit(first, last, start, rows, True))
        start += (last - first) * rows
        first = last
    return units, shifts, start


def _product(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """`out[r] = left[r] @ right[r]`, in place; one matrix goes through `mm`, which needs no batch loop."""
    if left.shape[0] == 1:
        torch.mm(left[0], right[0], out=out[0])
    else:
        torch.bmm(left, right, out=out)
    return out


class _Workspace:
    """Buffers of the widest unit, reused by every unit: fresh pages cost more than the products on them."""

    def __init__(self, plan: _Plan, dtype: torch.dtype):
        self.widest = max(((unit.last - unit.first) * unit.rows for unit in plan.units), default=0)
        self.dtype = dtype
        self.buffers: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, int, int], width: int) -> Tensor:
        """A tensor of this shape; `width` is its dimension that is neither experts nor rows."""
        if name not in self.buffers:
            self.buffers[name] = torch.empty(self.widest * width, dtype=self.dtype)
        return self.buffers[name][: shape[0] * shape[1] * shape[2]].view(shape)


def _run_units(
    hidden_TD: Tensor, gate_up_EHD: Tensor, down_EDI: Tensor, gate: _Gate, plan: _Plan, kept: Tensor | None
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
            hidden_RHC = space.take("hidden", (group, double, rows), double)
        else:
            hidden_RHC = kept[slots.start * double : slots.stop * double].view(group, double, rows)
        _product(gate_up_EHD[first:last].to(dtype), rows_RCD.transpose(1, 2), hidden_RHC)
        active_RIC = gate.forward(hidden_RHC, space.take("active", (group, single, rows), single))
        out_RDC = space.take("rows", (group, width, rows), width)
        _product(down_EDI[first:last].to(dtype), active_RIC, out_RDC)
        output_PD[slots].view(group, rows, width).copy_(out_RDC.transpose(1, 2))
    return output_PD


def _combine(output_PD: Tensor, plan: _Plan, weight_TK: Tensor | None) -> Tensor:
    """Sum every token's slots, weighted. `embedding_bag` sums in float32 whatever the type; sentinels are skipped."""
    if not plan.units:
        return output_PD.new_zeros(plan.slot_TK.shape[0], output_PD.shape[1])
    if weight_TK is None and plan.sentinel_TK is not None:
        weight_TK = torch.ones_like(plan.slot_TK, dtype=output_PD.dtype)
    if weight_TK is not None:
        weight_TK = weight_TK.to(output_PD.dtype)
        if plan.sentinel_TK is not None:
            weight_TK = weight_TK.masked_fill(plan.sentinel_TK, 0.0)
    return F.embedding_bag(plan.slot_TK, output_PD, mode="sum", per_sample_weights=weight_TK)


class _Experts(torch.autograd.Function):
    """All experts of one call. Saves its inputs, the slots and the pre-activations; the activation is recomputed."""

    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, weight_TK: Tensor, gate_up_EHD: Tensor, down_EDI: Tensor, gate: _Gate, plan: _Plan
    ) -> Tensor:
        kept = hidden_TD.new_empty(plan.token_P.shape[0] * gate_up_EHD.shape[1])
        output_PD = _run_units(hidden_TD, gate_up_EHD, down_EDI, gate, plan, kept)
        ctx.save_for_backward(hidden_TD, weight_TK, gate_up_EHD, down_EDI, kept)
        ctx.gate, ctx.plan = gate, plan
        return _combine(output_PD, plan, weight_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TD, weight_TK, gate_up_EHD, down_EDI, kept = ctx.saved_tensors
        gate, plan = ctx.gate, ctx.plan
        need_hidden, need_weight, need_gate_up, need_down = ctx.needs_input_grad[:4]
        dtype, width = hidden_TD.dtype, hidden_TD.shape[1]
        double, single = gate_up_EHD.shape[1], down_EDI.shape[2]
        num_slots = plan.token_P.shape[0]
        space = _Workspace(plan, dtype)
        weight_P = _to_slots(weight_TK.to(dtype), plan)
        grad_hidden_PD = hidden_TD.new_empty(num_slots, width) if need_hidden else None
        grad_weight_P = hidden_TD.new_empty(num_slots) if need_weight else None
        grad_gate_up = torch.empty_like(gate_up_EHD, memory_format=torch.contiguous_format) if need_gate_up else None
        grad_down = torch.empty_like(down_EDI, memory_format=torch.contiguous_format) if need_down else None
        for grad in (grad_gate_up, grad_down):
            if grad is not None:
                for expert in plan.idle:
                    grad[expert].zero_()
        for unit in plan.units:
            experts, slots = slice(unit.first, unit.last), unit.slots
            group, rows = unit.last - unit.first, unit.rows
            hidden_RHC = kept[slots.start * double : slots.stop * double].view(group, double, rows)
            weight_R1C = weight_P[slots].view(group, 1, rows)
            grad_RCD = space.take("grad", (group, rows, width), width)
            torch.index_select(grad_TD, 0, plan.token_P[slots], out=grad_RCD.view(-1, width))
            active_RIC = gate.forward(hidden_RHC, space.take("active", (group, single, rows), single))
            grad_RIC = space.take("grad_active", (group, single, rows), single)
            _product(down_EDI[experts].to(dtype).transpose(1, 2), grad_RCD.transpose(1, 2), grad_RIC)
            if grad_weight_P is not None:
                torch.sum(grad_RIC * active_RIC, dim=1, out=grad_weight_P[slots].view(group, rows))
            if grad_down is not None:
                _accumulate(grad_RCD.transpose(1, 2), active_RIC.mul_(weight_R1C).transpose(1, 2), grad_down, unit)
            if not (need_hidden or need_gate_up):
                continue
            buffer = space.take("grad_double", (group, double, rows), double)
            grad_RHC = gate.backward(hidden_RHC, grad_RIC.mul_(weight_R1C), buffer)
            if grad_gate_up is not None:
                rows_RCD = space.take("rows", (group, rows, width), width)
                torch.index_select(hidden_TD, 0, plan.token_P[slots], out=rows_RCD.view(-1, width))
                _accumulate(grad_RHC, rows_RCD, grad_gate_up, unit)
            if grad_hidden_PD is not None:
                out_RCD = grad_hidden_PD[slots].view(group, rows, width)
                _product(grad_RHC.transpose(1, 2), gate_up_EHD[experts].to(dtype), out_RCD)
        grad_hidden = _combine(grad_hidden_PD, plan, None) if grad_hidden_PD is not None else None
        grad_weight = _from_slots(grad_weight_P, plan).to(weight_TK.dtype) if grad_weight_P is not None else None
        return grad_hidden, grad_weight, grad_gate_up, grad_down, None, None


def _to_slots(value_TK: Tensor, plan: _Plan) -> Tensor:
    """Values of the pairs in slot order; padding slots hold zero."""
    value_P = value_TK.new_zeros(plan.token_P.shape[0])
    if plan.sentinel_TK is None:
        value_P[plan.slot_TK.view(-1)] = value_TK.reshape(-1)
    else:
        value_P[plan.slot_TK[~plan.sentinel_TK]] = value_TK[~plan.sentinel_TK]
    return value_P


def _from_slots(value_P: Tensor, plan: _Plan) -> Tensor:
    """Values of the slots in pair order; sentinels hold zero."""
    if not plan.units:
        return value_P.new_zeros(plan.slot_TK.shape)
    value_TK = value_P[plan.slot_TK]
    return value_TK if plan.sentinel_TK is None else value_TK.masked_fill(plan.sentinel_TK, 0.0)


def _accumulate(left: Tensor, right: Tensor, total: Tensor, unit: _Unit) -> None:
    """Write `left @ right` into the unit's experts of `total (E, ...)`, or add it if an earlier chunk has written."""
    target = total[unit.first : unit.last]
    if target.dtype != left.dtype:
        product = torch.bmm(left, right)
        target.copy_(product) if unit.opens else target.add_(product)
    elif unit.opens:
        _product(left, right, target)
    else:
        target[0].addmm_(left[0], right[0])


def _one_token(
    hidden_TD: Tensor, top_k_index: Tensor, weight_TK: Tensor, gate_up_EHD: Tensor, down_EDI: Tensor
) -> Tensor:
    """SwiGLU experts of a single token: two matrix-vector products per choice, nothing gathered."""
    dtype, token_D, single = hidden_TD.dtype, hidden_TD[0], down_EDI.shape[2]
    chosen = [(slot, expert) for slot, expert in enumerate(top_k_index[0].tolist()) if expert < down_EDI.shape[0]]
    output_KD = hidden_TD.new_empty(len(chosen), hidden_TD.shape[1])
    for row, (_, expert) in enumerate(chosen):
        hidden_H = torch.mv(gate_up_EHD[expert].to(dtype), token_D)
        active_I = F.silu(hidden_H[:single], inplace=True).mul_(hidden_H[single:])
        torch.mv(down_EDI[expert].to(dtype), active_I, out=output_KD[row])
    slots = [slot for slot, _ in chosen]
    weight_K = weight_TK[0] if len(slots) == weight_TK.shape[1] else weight_TK[0, slots]
    return torch.mv(output_KD.t(), weight_K.to(dtype)).unsqueeze(0)


def _is_supported(experts: nn.Module, gate_up: Tensor, hidden_states: Tensor) -> bool:
    """Whether the module has the layout this file is written for; everything else is transformers' to compute."""
    return (
        hidden_states.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and type(gate_up) in (Tensor, nn.Parameter)
        and getattr(experts, "has_gate", True)
        and getattr(experts, "is_concatenated", True)
        and not getattr(experts, "has_bias", False)
        and not getattr(experts, "is_transposed", False)
        and not getattr(experts, "has_post_expert_norm", False)
        and next(experts.act_fn.parameters(), None) is None
    )


def cpu_mm_experts_forward(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
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
    gate_up, down = self.gate_up_proj, self.down_proj
    if not _is_supported(self, gate_up, hidden_states):
        few = hidden_states.device.type != "cpu" and not torch.is_grad_enabled() and top_k_index.numel() <= len(gate_up)
        return ALL_EXPERTS_FUNCTIONS["batched_mm" if few else "grouped_mm"](
            self, hidden_states, top_k_index, top_k_weights
        )
    dtype = gate_up.dtype
    if torch.is_autocast_enabled("cpu") and dtype != torch.float64:
        dtype = torch.get_autocast_dtype("cpu")
    is_silu = _is_silu(self)
    hidden_TD = hidden_states.to(dtype)
    inputs = (hidden_TD, top_k_weights, gate_up, down)
    with torch.autocast("cpu", enabled=False):
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
            plan = _make_plan(top_k_index, len(gate_up))
            output_TD = _Experts.apply(*inputs, _Gate(self, is_silu), plan)
        elif is_silu and hidden_TD.shape[0] == 1:
            output_TD = _one_token(hidden_TD, top_k_index, top_k_weights, gate_up, down)
        else:
            plan = _make_plan(top_k_index, len(gate_up))
            output_PD = _run_units(hidden_TD, gate_up, down, _Gate(self, is_silu), plan, None)
            output_TD = _combine(output_PD, plan, top_k_weights)
    return output_TD.to(hidden_states.dtype)


def _is_silu(experts: nn.Module) -> bool:
    return type(experts)._apply_gate is _default_apply_gate and isinstance(experts.act_fn, (nn.SiLU, SiLUActivation))


ExpertsInterface.register(CPU_EXPERTS, cpu_mm_experts_forward)
