"""Adapters on what tensor and expert parallelism share out.

PEFT spreads a LoRA that is put on a model which is spread already. Here it is there before, as in every other layout;
so its rules (`peft/tuners/lora/model.py`) become rules of the plan that transformers applies: of a LoRA on columns B
is split as they are, on rows A; the other matrix is whole on each process, which all compute the same gradient for it.
"""

from peft.tuners.lora.layer import Linear, LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from chorus_moe.modeling.modeling_base import ChorusPreTrainedModel

# Style of a rule -> the matrices of a LoRA that follow it.
FOLLOWS = {"colwise": "lora_B", "chorus_colwise": "lora_B", "rowwise": "lora_A"}


def expand_with_adapters(model: ChorusPreTrainedModel, plan: dict[str, str]) -> dict[str, str]:
    """A plan by the names of modules and parameters, with those of the adapters in it.

    Args:
        model: without PEFT's own class around it.

    Raises:
        ValueError: an adapter on a module that is shared out and whose adapter is not, naming it.
    """
    expanded: dict[str, str] = type(model)._expand_parallel_plan(model, plan)
    modules = dict(model.named_modules())
    for name in [name for name in expanded if isinstance(modules.get(name), BaseTunerLayer | AuxiliaryTrainingWrapper)]:
        layer, style = modules[name], expanded.pop(name)
        if not _follows(layer, style):
            raise ValueError(
                f"parallel: {name} is shared between processes by the rule {style!r}, the adapter on it "
                f"({type(layer).__name__}) is not; leave it out of the adapter, or use fsdp alone"
            )
        parts = {f"{name}.base_layer": layer.base_layer}
        for adapter, matrix in getattr(layer, FOLLOWS[style]).items():
            parts[f"{name}.{FOLLOWS[style]}.{adapter}"] = matrix
        for path, part in parts.items():
            # As transformers lists them: parameters to split, then the module to hook.
            expanded |= {f"{path}.{parameter}": style for parameter, _ in part.named_parameters(recurse=False)}
            expanded[path] = style
    return expanded


def _follows(layer: nn.Module, style: str) -> bool:
    """Whether it is a plain LoRA: DoRA, for one, takes norms over whole weights."""
    return (
        isinstance(layer, Linear)
        and isinstance(layer, LoraLayer)
        and not layer.lora_variant
        and isinstance(layer.base_layer, nn.Linear)
        and style in FOLLOWS
    )
