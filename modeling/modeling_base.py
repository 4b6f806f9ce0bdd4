"""The base class of every Chorus model: what transformers needs to know, how weights start, and what may be loaded."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils.output_capturing import OutputRecorder

from .attention import Attention, CrossModalAttention, ModalityProjection
from .bank_operations import BankOperations
from .checkpoint import CheckpointError, align_parameters, check_shapes, describe_misfit
from .configuration_chorus import ChorusConfig
from .experts import BankGate, ChorusExperts, MixtureOfBanks, OwnGate
from .experts_cpu import CPU_EXPERTS
from .global_tokens import GlobalKeyValues, GlobalTokens
from .layer_skip import SkipGate
from .routers import Router


class ChorusPreTrainedModel(BankOperations, PreTrainedModel):
    """Weights start as in Llama: normal with `initializer_range`, norms one, biases zero."""

    config: ChorusConfig
    base_model_prefix = "model"
    input_modalities: tuple[str, ...] = ("text", "image", "audio")
    supports_gradient_checkpointing = True
    _no_split_modules = ["ChorusDecoderLayer", "ConformerBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    # Attention and experts live in files of their own, which the source search of transformers does not read:
    # without these two, both would silently run their slowest implementation.
    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """`cpu_mm` unless another is asked for: the fastest way on the CPU, and transformers' own elsewhere."""
        return super().get_correct_experts_implementation(requested_experts or CPU_EXPERTS)

    def _expand_parallel_plan(self, plan: dict[str, str]) -> dict[str, str]:
        """Rules of `q_proj`, `k_proj` and `v_proj` are for the ordinary layers: in a cross-modal layer these are
        dictionaries, and the projections in them have rules of their own."""
        dictionaries = {name for name, module in self.named_modules() if isinstance(module, ModalityProjection)}
        return {name: style for name, style in super()._expand_parallel_plan(plan).items() if name not in dictionaries}

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, but a checkpoint that does not fit is an error; see `describe_misfit` for what fits.

        With `output_loading_info=True` missing and unexpected tensors are returned beside the model instead; with an
        empty `state_dict` all weights are new; `ignore_mismatched_sizes=True` starts tensors of another shape anew.

        Raises:
            CheckpointError: naming the missing, unexpected or mismatched tensors.
        """
        loaded = super().from_pretrained(*args, **kwargs)
        reports = bool(kwargs.get("output_loading_info"))
        misfit = vars(loaded[0] if reports else loaded).pop("_misfit", None)
        if misfit and not reports and kwargs.get("state_dict") != {}:
            raise CheckpointError(misfit)
        return loaded

    @staticmethod
    def _finalize_model_loading(model: Any, load_config: Any, loading_info: Any) -> Any:
        """Notes what does not fit for `from_pretrained`, which alone knows whether the caller wants it as a report, and
        which gets no other account of the model below an adapter; takes the weights out of the mapped file."""
        if not load_config.ignore_mismatched_sizes:
            check_shapes(model, load_config.pretrained_model_name_or_path, loading_info.mismatched_keys)
        info = PreTrainedModel._finalize_model_loading(model, load_config, loading_info)
        model._misfit = describe_misfit(
            model, load_config.pretrained_model_name_or_path, info.missing_keys, info.unexpected_keys
        )
        align_parameters(model)
        return info

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.get_text_config().initializer_range
        if isinstance(module, ChorusExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)
        elif isinstance(module, GlobalKeyValues | GlobalTokens):
            for parameter in module.parameters():
                init.normal_(parameter, mean=0.0, std=std)
        elif isinstance(module, Router):
            for parameter in module.parameters():
                init.normal_(parameter, mean=0.0, std=std)
            if module.e_score_correction_bias is not None:
                init.zeros_(module.e_score_correction_bias)
        elif isinstance(module, OwnGate):
            init.zeros_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, SkipGate):
            init.zeros_(module.weight)
            init.ones_(module.bias)
        elif isinstance(module, BankGate):
            init.copy_(module.is_open, module.open_table())
            if module.weight is not None:
                init.normal_(module.weight, mean=0.0, std=std)


def recorded_outputs(layer_class: type[nn.Module]) -> dict[str, Any]:
    """What `capture_outputs` can record: hidden states, attention maps, routing, the rotated queries and keys of the
    cross-modal layers, and the gates of skipped layers."""
    return {
        "hidden_states": layer_class,
        "attentions": OutputRecorder(Attention, index=1),
        "router_logits": OutputRecorder(MixtureOfBanks, index=1),
        "cross_modal_states": OutputRecorder(CrossModalAttention, index=2),
        "skip_logits": OutputRecorder(SkipGate),
    }
