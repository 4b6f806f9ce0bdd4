"""Weights of `quantize` in vLLM: `from_pretrained` makes their modules, and vLLM is told to leave them alone."""

import torch
from torch import nn
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from chorus_moe.surgery.quantization_loading import METHOD


@register_quantization_config(METHOD)
class OwnWeights(QuantizationConfig):
    """Says that every layer keeps the weights it has."""

    def get_name(self) -> str:
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, object]) -> "OwnWeights":
        return cls()

    def get_quant_method(self, layer: nn.Module, prefix: str) -> None:
        return None
