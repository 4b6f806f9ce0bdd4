"""Expert feed-forwards on the GPU, registered with transformers as the experts implementation `gpu_mm`.

The matrix products are torch's grouped ones, as in transformers' `grouped_mm`; what lies between them takes one pass
over memory each. Nothing waits for the device, and every sum has a fixed order. An expert id of E or more is a
sentinel: the pair costs no product, adds nothing and receives a zero gradient. The name may stand in a config on any
device: where this file cannot serve, transformers' functions take over.

Shape suffixes: T tokens, K experts per token, E experts, D hidden size, I expert width, P slots (T * K), H = 2I.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers.integrations.moe import ExpertsInterface

from chorus_moe.fastpaths.supported_experts import StackedExperts, can_group, has_plain_layout, is_silu, run_plainly

GPU_EXPERTS = "gpu_mm"
# Up to this many choices without gradients, launches take longer than kernels; transformers has fewer launches.
CHOICES_TO_LAUNCH = 4096


class _Slots(NamedTuple):
    """Choices sorted by expert, sentinels last.

    Args:
        token_P: the token of each slot.
        choice_P: which of the flattened choices each slot holds.
        slot_TK: the slot of each choice; -1 for sentinels.
        ends_E: where each expert's slots end, int32.
    """

    token_P: Tensor
    choice_P: Tensor
    slot_TK: Tensor
    ends_E: Tensor

    @classmethod
    def build(cls, index_TK: Tensor, num_experts: int) -> "_Slots":
        # Short keys sort faster.
        kind = torch.uint8 if num_experts < 255 else torch.int16 if num_experts < 32767 else torch.int32
        expert_P, choice_P = index_TK.reshape(-1).clamp(max=num_experts).to(kind).sort(stable=True)
        experts_E = torch.arange(num_experts, device=index_TK.device, dtype=kind)
        # `bincount` would wait for the device.
        ends_E = torch.searchsorted(expert_P, experts_E, right=True, out_int32=True)
        place_P = torch.arange(len(choice_P), device=index_TK.device)
        slot_P = torch.empty_like(choice_P)
        slot_P[choice_P] = place_P.masked_fill_(expert_P >= num_experts, -1)
        return cls(choice_P // index_TK.shape[1], choice_P, slot_P.view_as(index_TK), ends_E)


def _product(states: Tensor, weight_E: Tensor, ends_E: Tensor) -> Tensor:
    """`states @ weight.T` with the expert of each slot; rows of sentinels are left as they were allocated."""
    return F.grouped_mm(states, weight_E.transpose(1, 2), offs=ends_E)


def _run(
    hidden_TD: Tensor, weight_TK: Tensor, gate_up_EHD: Tensor, down_EDI: Tensor, slots: _Slots
) -> tuple[Tensor, Tensor]:
    """The output `(T, D)` and the pre-activations `(P, H)`."""
    from chorus_moe.fastpaths.triton_kernels import combine, swiglu

    hidden_PH = _product(hidden_TD.index_select(0, slots.token_P), gate_up_EHD, slots.ends_E)
    # The weight of a choice is applied here, in the same pass, and not to the output, which is longer.
    active_PI = swiglu(hidden_PH, weight_TK.reshape(-1)[slots.choice_P])
    # Summed where they lie: sorting rows back first would be one more pass over them.
    return combine(_product(active_PI, down_EDI, slots.ends_E), slots.slot_TK), hidden_PH


class _Experts(torch.autograd.Function):
    """All experts of one call."""

    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, weight_TK: Tensor, gate_up_EHD: Tensor, down_EDI: Tensor, slots: _Slots
    ) -> Tensor:
        output_TD, hidden_PH = _run(hidden_TD, weight_TK, gate_up_EHD, down_EDI, slots)
        # The pre-activations alone: rows are gathered and activations computed again, which costs less than keeping
        # them.
        ctx.save_for_backward(hidden_TD, weight_TK, gate_up_EHD, down_EDI, hidden_PH, *slots)
        return output_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        from chorus_moe.fastpaths.triton_kernels import combine, swiglu_backward

        hidden_TD, weight_TK, gate_up_EHD, down_EDI, hidden_PH, *parts = ctx.saved_tensors
        slots = _Slots(*parts)
        need_hidden, need_weight, need_gate_up, need_down = ctx.needs_input_grad[:4]
        grad_hidden = grad_weight = grad_gate_up = grad_down = None
        grad_PD = grad_TD.index_select(0, slots.token_P)
        # Unweighted; the kernel applies the weight, and needs this for the weight's own gradient.
        grad_PI = F.grouped_mm(grad_PD, down_EDI, offs=slots.ends_E)
        weight_P = weight_TK.reshape(-1)[slots.choice_P]
        grad_PH, grad_P, active_PI = swiglu_backward(hidden_PH, weight_P, grad_PI)
        if need_weight:
            grad_TK = grad_P[slots.slot_TK.clamp(min=0)]
            grad_weight = grad_TK.masked_fill_(slots.slot_TK < 0, 0.0).to(weight_TK.dtype)
        # In the layout of the weights, along with which an optimizer reads it.
        if need_down:
            grad_down = F.grouped_mm(grad_PD.t(), active_PI, offs=slots.ends_E)
        # The next gathered rows take their place.
        del grad_PD, grad_PI, active_PI
        if need_gate_up:
            rows_PD = hidden_TD.index_select(0, slots.token_P)
            grad_gate_up = F.grouped_mm(grad_PH.t(), rows_PD, offs=slots.ends_E)
        if need_hidden:
            grad_hidden = combine(F.grouped_mm(grad_PH, gate_up_EHD, offs=slots.ends_E), slots.slot_TK)
        return grad_hidden, grad_weight, grad_gate_up, grad_down, None


@cache
def _can_run_kernels(device: torch.device) -> bool:
    """Whether Triton is there and the GPU has grouped products (compute capability 8.0)."""
    try:
        from chorus_moe.fastpaths.triton_kernels import swiglu
    except ImportError:
        return False
    return swiglu is not None and torch.cuda.get_device_capability(device) >= (8, 0)


def grouped_experts(
    hidden_TD: Tensor, index_TK: Tensor, weight_TK: Tensor, gate_up_EHD: Tensor, down_EDI: Tensor
) -> Tensor:
    """Weighted sum of the chosen SwiGLU experts, `(T, D)`, differentiable."""
    slots = _Slots.build(index_TK, len(gate_up_EHD))
    inputs = (hidden_TD, weight_TK, gate_up_EHD, down_EDI)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        return _Experts.apply(*inputs, slots)
    return _run(*inputs, slots)[0]


def gpu_mm_experts_forward(
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
    kind = hidden_states.device.type
    is_few = not torch.is_grad_enabled() and top_k_index.numel() <= CHOICES_TO_LAUNCH
    is_known = kind == "cuda" and has_plain_layout(self) and is_silu(self)
    if is_few or not is_known or not _can_run_kernels(hidden_states.device):
        return run_plainly(self, hidden_states, top_k_index, top_k_weights)
    dtype = self.gate_up_proj.dtype
    if torch.is_autocast_enabled(kind) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
    hidden_TD, gate_up, down = (states.to(dtype) for states in (hidden_states, self.gate_up_proj, self.down_proj))
    if not can_group(hidden_TD, gate_up, down):
        return run_plainly(self, hidden_states, top_k_index, top_k_weights)
    return grouped_experts(hidden_TD, top_k_index, top_k_weights, gate_up, down).to(hidden_states.dtype)


ExpertsInterface.register(GPU_EXPERTS, gpu_mm_experts_forward)
