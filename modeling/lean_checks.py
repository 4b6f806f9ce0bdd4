"""What lean decoding may pass by: modules that are exactly those which `lean_layers` writes out.

Every class is listed with the children, parameters and attributes that are known of it. A module with anything more (an
option added later, a hook, an adapter, a quantised or sharded weight, a replaced forward) runs as it is.
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import SiLUActivation
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.utils.output_capturing import install_output_capuring_hook

from .attention import Attention, CrossModalAttention, ModalityProjection, SharedProjection
from .experts import BankGate, ChorusExperts, ExpertBank, GatedMLP, MixtureOfBanks, OwnGate
from .experts_cpu import CPU_EXPERTS
from .global_tokens import GlobalKeyValues
from .layer_skip import SkipGate
from .modeling_chorus import ChorusModel
from .norms import RMSNorm
from .routers import AttentionRouter, SigmoidRouter, SoftmaxRouter
from .text_model import ChorusDecoderLayer, ChorusTextModel, DenseFeedForward

ATTENTION = {
    *("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm", "config", "layer_idx", "head_dim", "scaling"),
    *("num_key_value_groups", "attention_dropout", "is_causal", "sliding_window", "use_rope"),
    *("query_norm_size", "key_norm_size", "global_tokens"),
}
ROUTER = {"bank", "top_k", "norm_topk_prob", "limits_groups", "is_plain", "e_score_correction_bias"}
GATED = {"gate_proj", "up_proj", "down_proj", "act_fn", "chunk_size"}
# Children, parameters, buffers and public attributes; None for a class that is not ours to change.
KNOWN: dict[type[nn.Module], set[str] | None] = {
    **dict.fromkeys((nn.Linear, nn.Embedding, nn.Identity, nn.ModuleList, nn.ModuleDict, nn.SiLU, SiLUActivation)),
    LlamaRotaryEmbedding: None,
    ChorusModel: {"vision_tower", "audio_tower", "vision_connector", "audio_connector", "language_model"},
    ChorusTextModel: {"embed_tokens", "layers", "norm", "rotary_emb"},
    ChorusDecoderLayer: {
        *("self_attn", "mlp", "input_layernorm", "post_attention_layernorm", "gradient_checkpointing"),
        *("attention_output_norm", "feed_forward_output_norm", "skip_gate"),
    },
    Attention: ATTENTION,
    CrossModalAttention: ATTENTION,
    GlobalKeyValues: {"key", "value", "head_dim"},
    SharedProjection: {"weight", "bias", "in_features", "out_features"},
    ModalityProjection: {"text", "image", "audio"},
    RMSNorm: {"weight", "eps", "normalized_shape", "elementwise_affine"},
    DenseFeedForward: GATED,
    GatedMLP: GATED,
    MixtureOfBanks: {"shared_experts", "bank_gate", "banks"},
    BankGate: {"banks", "weight", "is_open"},
    ExpertBank: {
        *("name", "modalities", "num_experts", "router", "experts", "gate", "may_skip_slots", "chunk_size"),
        "automatic_chunk",
    },
    OwnGate: {"weight", "bias"},
    SkipGate: {"weight", "bias"},
    SoftmaxRouter: ROUTER | {"weight"},
    SigmoidRouter: ROUTER | {"weight"},
    AttentionRouter: ROUTER | {"query", "expert_keys", "expert_values", "up", "down"},
    ChorusExperts: {
        *("gate_up_proj", "down_proj", "act_fn", "num_experts", "hidden_dim", "intermediate_dim", "config"),
        *("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "is_concatenated"),
    },
}
# A class whose forward is replaced later is no longer the one that is written out.
FORWARDS = {kind: kind.forward for kind in KNOWN}
OF_EVERY_MODULE = vars(nn.Module()).keys()


def parts(module: nn.Module) -> set[str]:
    """Names of children, parameters, buffers and public attributes; transformers gives its models attributes of its
    own, which are left out."""
    names = {*module._modules, *module._parameters, *module._buffers}
    if not isinstance(module, PreTrainedModel):
        names |= {name for name in vars(module).keys() - OF_EVERY_MODULE if not name.startswith("_")}
    return names


def is_recorder(hook: Any) -> bool:
    """Whether a forward hook is one of those by which transformers records outputs. They stay on a model for good once
    outputs were recorded, and do nothing in a step that asks for none."""
    made_by = install_output_capuring_hook.__qualname__
    return getattr(hook, "__module__", "") == install_output_capuring_hook.__module__ and hook.__qualname__.startswith(
        f"{made_by}.<locals>."
    )


def is_plain(module: nn.Module, dtype: torch.dtype) -> bool:
    """Whether a module does what its class says and nothing else, on ordinary CPU parameters of this dtype."""
    kind = type(module)
    if kind not in KNOWN or kind.forward is not FORWARDS[kind] or "forward" in vars(module):
        return False
    known = KNOWN[kind]
    recorders = all(map(is_recorder, module._forward_hooks.values()))
    changes = (not recorders, module._forward_pre_hooks, module._compiled_call_impl)
    return (
        (known is None or parts(module) <= known)
        and not any(changes)
        and all(
            type(parameter) is nn.Parameter and parameter.device.type == "cpu" and parameter.dtype == dtype
            for parameter in module.parameters(recurse=False)
        )
    )


def is_plain_mixture(mlp: Any, dtype: torch.dtype) -> bool:
    """Whether a sparse layer is one of known routers and SwiGLU experts that run as `cpu_mm`."""
    return all(is_plain(module, dtype) for module in mlp.modules()) and not any(
        bank.experts.config._experts_implementation != CPU_EXPERTS
        or bank.experts.num_experts != bank.num_experts  # spread over ranks
        for bank in mlp.banks.values()
    )


def _norms(layer: Any) -> list[nn.Module]:
    return [
        *(layer.input_layernorm, layer.post_attention_layernorm),
        *(layer.attention_output_norm, layer.feed_forward_output_norm),
    ]


def is_usual(layer: Any) -> bool:
    """Whether a layer has its norms in front, query and key norms by head if any, and no bias in its feed-forward."""
    attention = layer.self_attn
    return (
        [type(norm) for norm in _norms(layer)] == [RMSNorm, RMSNorm, nn.Identity, nn.Identity]
        and attention.query_norm_size == attention.key_norm_size == attention.head_dim
        and (type(layer.mlp) is not DenseFeedForward or layer.mlp.gate_proj.bias is None)
    )


def can_decode(model: Any) -> bool:
    """Whether all of a generative model but its head and its sparse layers can be passed by, as it stands now."""
    text, config = model.model.language_model, model.config.text_config
    within = [model.model, text, text.embed_tokens, text.norm, text.rotary_emb, text.layers]
    for layer in text.layers:
        within += [layer, *_norms(layer), *layer.self_attn.modules()]
        within += layer.mlp.modules() if type(layer.mlp) is DenseFeedForward else []
        within += [layer.skip_gate] if layer.skip_gate is not None else []
    asked = (config.output_attentions, config.output_hidden_states, config.output_router_logits)
    return (
        config._attn_implementation == "sdpa"
        and config.is_causal
        and config.rms_norm_eps > 0
        and not model.training
        and not any(asked)
        # A limited capacity is refused with a cache, by the modules.
        and not any(bank.limits_capacity(False) for bank in text.banks.values())
        and text.embed_tokens.max_norm is None
        and not nn.modules.module._has_any_global_hook()
        and all(is_plain(module, text.embed_tokens.weight.dtype) for module in within)
        and all(map(is_usual, text.layers))
    )
