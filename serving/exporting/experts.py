"""Experts as one operation of a graph, and how ONNX computes it.

Unusual here:
- transformers' functions sort tokens by expert, which ONNX has no operation for. In ONNX each expert takes its own rows
  (`NonZero`), so that a graph multiplies no more than the model does, at any length;
- it is one operation until the graph is translated: `torch.export` is slow where every expert has a size of its own.

Shape suffixes: T tokens, K experts per token, E experts, D hidden size, I expert width.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.activations import ACT2FN
from transformers.integrations.moe import ExpertsInterface

from chorus_moe.fastpaths.supported_experts import StackedExperts
from chorus_moe.modeling.modeling_base import ChorusPreTrainedModel

EXPORTED_EXPERTS = "own_rows"
# What an expert's activation is in ONNX, by its name in the configuration; `op` holds ONNX's operations.
ACTIVATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "silu": lambda op, x: op.Mul(x, op.Sigmoid(x)),
    "gelu": lambda op, x: op.Gelu(x),
    "gelu_pytorch_tanh": lambda op, x: op.Gelu(x, approximate="tanh"),
    "relu": lambda op, x: op.Relu(x),
}


@torch.library.custom_op("chorus_moe::feed_experts", mutates_args=())
def feed_experts(
    hidden_TD: Tensor, index_TK: Tensor, weights_TK: Tensor, gate_up: Tensor, down: Tensor, activation: str
) -> Tensor:
    """The weighted outputs of the chosen experts; choices of weight 0, and sentinels, cost nothing."""
    output_TD = torch.zeros_like(hidden_TD)
    for expert in range(len(gate_up)):
        # In a graph every bank sees every row. Those that it is closed to have weight 0.
        token, slot = torch.where((index_TK == expert) & (weights_TK != 0))
        gate, up = F.linear(hidden_TD[token], gate_up[expert]).chunk(2, dim=-1)
        states = F.linear(ACT2FN[activation](gate) * up, down[expert])
        output_TD.index_add_(0, token, states * weights_TK[token, slot, None])
    return output_TD


@feed_experts.register_fake
def _(hidden_TD: Tensor, *_: object) -> Tensor:
    return torch.empty_like(hidden_TD)


def _feed_experts_in_onnx(
    hidden_TD: Any, index_TK: Any, weights_TK: Any, gate_up: Any, down: Any, activation: str
) -> Any:
    """`feed_experts` as nodes of ONNX, one chain an expert: each weight is a constant that a runtime may pack."""
    from onnxscript import opset20 as op

    axis_1 = op.Constant(value_ints=[1])
    used_TK = op.Not(op.Equal(weights_TK, op.Constant(value_float=0.0)))
    output_TD = op.ConstantOfShape(op.Shape(hidden_TD))  # zeros
    for expert in range(gate_up.shape[0]):
        number = op.Constant(value_int=expert)
        place_2N = op.NonZero(op.And(op.Equal(index_TK, number), used_TK))
        token_N = op.Gather(place_2N, op.Constant(value_int=0))
        rows_ND = op.Gather(hidden_TD, token_N)
        weight_N = op.GatherND(weights_TK, op.Transpose(place_2N, perm=[1, 0]))
        hidden = op.MatMul(rows_ND, op.Transpose(op.Gather(gate_up, number), perm=[1, 0]))
        gate_NI, up_NI = op.Split(hidden, axis=-1, num_outputs=2)
        states = op.MatMul(
            op.Mul(ACTIVATIONS[activation](op, gate_NI), up_NI), op.Transpose(op.Gather(down, number), perm=[1, 0])
        )
        states = op.Mul(states, op.Unsqueeze(weight_N, axis_1))
        output_TD = op.ScatterND(output_TD, op.Unsqueeze(token_N, axis_1), states, reduction="add")
    return output_TD


def own_rows_experts_forward(
    self: StackedExperts, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    activation = next((name for name in ACTIVATIONS if type(ACT2FN[name]) is type(self.act_fn)), None)
    if activation is None:
        raise ValueError(f"export: experts with {type(self.act_fn).__name__}; it knows {', '.join(ACTIVATIONS)}")
    return feed_experts(hidden_states, top_k_index, top_k_weights, self.gate_up_proj, self.down_proj, activation)


ExpertsInterface.register(EXPORTED_EXPERTS, own_rows_experts_forward)
ONNX_TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.chorus_moe.feed_experts.default: _feed_experts_in_onnx
}


@contextmanager
def exported_experts(model: ChorusPreTrainedModel) -> Iterator[None]:
    """Within, experts are one operation."""
    before = model.config.text_config._experts_implementation
    model.set_experts_implementation(EXPORTED_EXPERTS)
    try:
        yield
    finally:
        model.set_experts_implementation(before)
