"""Tensor- and expert-parallel plans of the decoder, computed from its configuration."""

from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedConfig
from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES
from transformers.distributed.tensor_parallel import ColwiseParallel


class ColwiseLinear(ColwiseParallel):
    """Column-wise for linear layers. A projection per modality is left alone: its parts have rules of their own."""

    # `k_proj` is a linear layer in one layer and a dictionary of linear layers in the next, under the same rule.
    def install_forward(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        return super().install_forward(module, mesh) if isinstance(module, nn.Linear) else module


ALL_PARALLEL_STYLES.register("chorus_colwise", ColwiseLinear())

GATED_MLP = {"gate_proj": "colwise", "up_proj": "colwise", "down_proj": "rowwise"}
SPLIT_EXPERTS = {"experts.gate_up_proj": "packed_colwise", "experts.down_proj": "rowwise", "experts": "moe_tp_experts"}
DISPATCHED_EXPERTS = dict.fromkeys(("experts.gate_up_proj", "experts.down_proj"), "grouped_gemm")
DISPATCHED_EXPERTS["experts"] = "ep_dispatch_experts"


def tensor_parallel_plan(config: PreTrainedConfig) -> dict[str, str]:
    """Heads and feed-forward widths over the ranks, for every kind of layer that a text configuration has."""
    plan = _attention_plan(config)
    if "dense" in config.mlp_layer_types:
        plan |= {f"layers.*.mlp.{name}": style for name, style in GATED_MLP.items()}
    if config.sparse_layers and config.shared_expert_intermediate_size:
        plan |= {f"layers.*.mlp.shared_experts.{name}": style for name, style in GATED_MLP.items()}
    return plan | _experts_plan(config, SPLIT_EXPERTS)


def _attention_plan(config: PreTrainedConfig) -> dict[str, str]:
    """Heads over the ranks; whole attention on each where a norm covers all heads, or memory tokens do."""
    # The norm's mean runs over all heads, and a rank would have only its own.
    if config.num_memory_tokens or (config.use_qk_norm and config.qk_norm_scope == "projection"):
        return {}
    plan = {"layers.*.self_attn.o_proj": "rowwise"}
    num_cross_modal = len(set(config.cross_modal_layers))
    for name in ("q_proj", "k_proj", "v_proj"):
        is_shared = name == "q_proj" and config.share_cross_modal_query
        if is_shared or num_cross_modal < config.num_hidden_layers:
            plan[f"layers.*.self_attn.{name}"] = "chorus_colwise"
        if num_cross_modal and not is_shared:
            # Spelt out: transformers puts `*` for layer numbers alone, so a wildcard over modalities matches nothing.
            plan |= {f"layers.*.self_attn.{name}.{modality}": "colwise" for modality in config.modalities}
    if config.num_global_tokens and config.is_causal:
        # No linear layer: its forward concatenates, and runs on the rank's own rows as if they were all.
        learned = "layers.*.self_attn.global_tokens"
        plan |= {learned: "local_params", f"{learned}.key": "colwise", f"{learned}.value": "colwise"}
    return plan


def expert_parallel_plan(config: PreTrainedConfig) -> dict[str, str]:
    """Whole experts over the ranks: each rank holds a share of every bank and tokens travel."""
    return _experts_plan(config, DISPATCHED_EXPERTS)


def _experts_plan(config: Any, styles: dict[str, str]) -> dict[str, str]:
    """Rules for stacked experts; experts of linear layers are whole on every rank."""
    # A rule for each linear layer of each expert would gather and scatter once per expert.
    if config.experts_layout == "linear":
        return {}
    # Without a matching rule every expert would stay on every rank, in silence.
    banks = {bank.name for layer in config.sparse_layers for bank in config.banks_of_layer(layer)}
    plan = {f"layers.*.mlp.banks.{bank}.{name}": style for bank in sorted(banks) for name, style in styles.items()}
    # Each feed-forward of a deep expert is a stack of its own, whose ranks sum up before the next one reads.
    deep = {bank.name for bank in config.banks if bank.expert_depth > 1}
    return plan | {
        f"layers.*.mlp.banks.{bank}.{name.replace('experts', 'deeper_experts.*', 1)}": style
        for bank in sorted(banks & deep)
        for name, style in styles.items()
    }
