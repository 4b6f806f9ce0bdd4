"""Quantised models in `save_pretrained` and `from_pretrained`, registered with transformers by `import chorus_moe`.

Unusual here:
- `ChorusQuantizationConfig` is our own method: the weights of `quantize`, saved as the plain tensors that they are;
- quantizers of other libraries pass stacked experts by. That of torchao is made to reach them in our models, where the
  format exists for stacks; after every one of them, the bytes by group are shown.
"""

import sys
from typing import Any, cast

import torch
from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer, get_keys_to_not_convert
from transformers.quantizers.quantizer_torchao import TorchAoHfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from chorus_moe.modeling.modeling_base import ChorusPreTrainedModel
from chorus_moe.surgery.parts import TOWERS
from chorus_moe.surgery.quantization_formats import (
    Groups,
    apply_formats,
    below_adapter,
    described,
    plan_described,
    plan_formats,
    restore_weights,
)
from chorus_moe.surgery.quantization_report import bytes_report

METHOD = "chorus"
# Libraries whose quantizers meet our models.
OTHERS = ("bitsandbytes_4bit", "bitsandbytes_8bit", "torchao")
# Not torchao's "_default", which would quantise biases as well.
LINEARS = r"re:.*\.(?:q|k|v|o|gate|up|down)_proj(?:\.\w+)?\.weight"
EXPERTS = r"re:.*\bexperts(?:\.\d+)?\.(?:gate_up_proj|down_proj)"


@register_quantization_config(METHOD)
class ChorusQuantizationConfig(QuantizationConfigMixin):
    """For `from_pretrained(..., quantization_config=...)`: what `quantize` would do, once the weights are loaded.

    Args:
        groups: as in `chorus_moe.surgery.quantize`.
        weights: what a saved model holds; written by `save_pretrained`.
    """

    def __init__(self, groups: Groups | None = None, weights: dict[str, dict[str, Any]] | None = None, **kwargs: Any):
        if (groups is None) == (weights is None):
            raise ValueError("ChorusQuantizationConfig: give groups, such as {'experts': 'int8'}")
        self.quant_method: Any = METHOD
        self.groups, self.weights = groups, weights

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if value is not None}


@register_quantizer(METHOD)
class ChorusQuantizer(HfQuantizer):
    """Weights of `quantize`."""

    quantization_config: ChorusQuantizationConfig
    # An adapter on them is trained; the Trainer refuses a quantised model without one.
    is_trainable = True
    is_compileable = True

    def is_serializable(self) -> bool:
        return True

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        _check_model(model, METHOD)
        if self.quantization_config.weights is not None:
            apply_formats(model, plan_described(model, self.quantization_config.weights))
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.quantization_config.groups is not None:
            apply_formats(model, plan_formats(model, self.quantization_config.groups))
            mark_quantized(model)
        _show(model)
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        restore_weights(model)
        return model


def _check_model(model: nn.Module, method: str) -> None:
    if not isinstance(model, ChorusPreTrainedModel):
        raise ValueError(f"quantization_config of {method!r} is for Chorus models; this one is {type(model).__name__}")


def _show(model: nn.Module) -> None:
    """The bytes of each group, on the error stream: a program's own output stays as it is."""
    report = bytes_report(model)
    print(report, file=sys.stderr)
    report.warn()


def mark_quantized(given: nn.Module) -> None:
    """Say in the model and its configuration what is quantised, or that nothing is."""
    weights, model = described(given), cast(Any, below_adapter(given))
    if not weights:
        getattr(model, "hf_quantizer", ChorusQuantizer).remove_quantization_config(model)
        return
    config = ChorusQuantizationConfig(weights=weights)
    model.hf_quantizer = ChorusQuantizer(config, pre_quantized=True)
    model.config.quantization_config = config
    model.is_quantized, model.quantization_method = True, METHOD


def _with_table(base: type[HfQuantizer]) -> type[HfQuantizer]:
    """A quantizer that shows what it did to a model of ours."""

    def _process_model_after_weight_loading(self: Any, model: Any, **kwargs: Any) -> Any:
        model = base._process_model_after_weight_loading(self, model, **kwargs)
        if isinstance(model, ChorusPreTrainedModel):
            _show(model)
        return model

    members = {"_process_model_after_weight_loading": _process_model_after_weight_loading}
    return type(base.__name__, (base,), members)


class ChorusTorchAoQuantizer(TorchAoHfQuantizer):
    """torchao's formats also for stacked experts, and not for towers, where the caller leaves both open."""

    def _process_model_before_weight_loading(self, model: Any, *args: Any, **kwargs: Any) -> None:
        config = self.quantization_config
        if isinstance(model, ChorusPreTrainedModel) and not self.pre_quantized:
            if config.modules_to_not_convert is None:
                towers = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in TOWERS.values()]
                config.modules_to_not_convert = [*get_keys_to_not_convert(model), *towers]
            config.quant_type = _with_stacks(config.quant_type)
        super()._process_model_before_weight_loading(model, *args, **kwargs)

    @property
    def is_trainable(self) -> bool:
        # As transformers decides it: 8-bit weights, here also of the formats by name.
        given = self.quantization_config.quant_type
        formats = getattr(given, "fqn_to_config", {"": given}).values()
        return all("8weight" in type(each).__name__.lower() for each in formats)


def _with_stacks(given: Any) -> Any:
    """A configuration of torchao that names stacked experts, where its format exists for stacks of matrices."""
    from torchao.quantization import FqnToConfig, quantize_

    if isinstance(given, FqnToConfig):
        return given
    probe = nn.Module()
    probe.stack = nn.Parameter(torch.zeros(2, 128, 128), requires_grad=False)
    try:
        quantize_(probe, FqnToConfig({"stack": given}), filter_fn=None)
    except (AssertionError, AttributeError, ImportError, NotImplementedError, RuntimeError, ValueError):
        return given  # the table and its warning say what was not reached
    return FqnToConfig({EXPERTS: given, LINEARS: given})


AUTO_QUANTIZER_MAPPING["torchao"] = ChorusTorchAoQuantizer
for _name in OTHERS:
    AUTO_QUANTIZER_MAPPING[_name] = _with_table(AUTO_QUANTIZER_MAPPING[_name])
