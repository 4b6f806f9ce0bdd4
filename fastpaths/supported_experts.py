"""The layouts that the fast paths of experts support; transformers' own functions compute every other layout.

Shape suffixes: T tokens, E experts, D hidden size, I expert width, H = 2I.
"""

from typing import Protocol

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate

from chorus_moe.fastpaths.quantized_weights import STEP_TOKENS, stored_weight

SILU = nn.SiLU, SiLUActivation
# A batched product copies the weights of every choice: 128 choices of 128 experts took twice as long as grouped ones.
FEW_CHOICES = 16
# The experts function of `fastpaths.compiled_decoding`, and for how many tokens it is.
GATHERED, GATHERED_TOKENS = "gathered", STEP_TOKENS


class StackedExperts(Protocol):
    """Experts as transformers stacks them: `gate_up_proj (E, H, D)` and `down_proj (E, D, I)`."""

    gate_up_proj: Tensor
    down_proj: Tensor
    act_fn: nn.Module

    def _apply_gate(self, gate_up: Tensor) -> Tensor: ...


def is_silu(experts: StackedExperts) -> bool:
    """Whether the experts are SwiGLU: `silu(gate) * up`."""
    # By identity: a model that overrides it multiplies in its own way.
    return type(experts)._apply_gate is _default_apply_gate and isinstance(experts.act_fn, SILU)


def has_plain_layout(experts: StackedExperts, kinds: tuple[type, ...] = (Tensor, nn.Parameter)) -> bool:
    """Gate and up projection stacked in one weight of these types, no bias, no norm; nothing is being compiled."""
    return (
        not torch.compiler.is_compiling()
        # Exactly these types: quantised and sharded tensors are subclasses.
        and type(stored_weight(experts, "gate_up_proj")) in kinds
        and getattr(experts, "has_gate", True)
        and getattr(experts, "is_concatenated", True)
        and not getattr(experts, "has_bias", False)
        and not getattr(experts, "is_transposed", False)
        and not getattr(experts, "has_post_expert_norm", False)
    )


def can_group(hidden_TD: Tensor, gate_up_EHD: Tensor, down_EDI: Tensor) -> bool:
    """What `grouped_mm` requires: one of three dtypes, and rows that are multiples of 16 bytes."""
    return hidden_TD.dtype in (torch.float32, torch.bfloat16, torch.float16) and all(
        weight.dtype == hidden_TD.dtype and weight.is_contiguous() and weight.shape[2] * weight.itemsize % 16 == 0
        for weight in (gate_up_EHD, down_EDI)
    )


def is_few_to_gather(top_k_index: Tensor) -> bool:
    """Whether choices `(T, K)` are of the few tokens of a decoding step."""
    return not torch.is_grad_enabled() and top_k_index.shape[0] <= GATHERED_TOKENS


def run_plainly(experts: StackedExperts, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts through transformers' functions: on a GPU, a batched product for a few choices that train nothing."""
    is_few = not torch.is_grad_enabled() and top_k_index.numel() <= min(FEW_CHOICES, len(experts.gate_up_proj))
    name = "batched_mm" if is_few and hidden_states.device.type != "cpu" else "grouped_mm"
    return ALL_EXPERTS_FUNCTIONS[name](experts, hidden_states, top_k_index, top_k_weights)
