"""A whole model spread over the processes of a layout: FSDP2, tensor and expert parallelism of transformers.

Not by accelerate's FSDP plugin: it knows no experts, and on a CPU it trains plain data parallel without a word.
"""

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, PreTrainedModel
from transformers.distributed import DistributedConfig
from transformers.distributed.tensor_parallel import replace_layer_number_by_wildcard

from chorus_moe.training.loading import ModelOrAdapter, base_model
from chorus_moe.training.scale.adapters import expand_with_adapters
from chorus_moe.training.scale.context import share_sequences
from chorus_moe.training.scale.layout import Layout, check_layout

TOWERS = ("vision_tower", "audio_tower")


def spread(model: ModelOrAdapter, layout: Layout) -> None:
    """Leave each process its share of a model that all of them hold alike. Every rank must call it.

    A model that `loading_in_shares` has loaded is left as it is.

    Raises:
        ValueError: as `check_layout`, `share_sequences`, `expand_with_adapters`.
        RuntimeError: after all that, a parameter is whole on every rank.
    """
    below = base_model(model)
    check_layout(layout, below.config)
    if layout.context > 1:
        share_sequences(model, layout.context)
    if not layout.is_sharded:
        return
    if getattr(below, "_device_mesh", None) is None:
        config = _distributed(layout)
        below.fsdp_plan = _units(below)
        if below is not model:
            # Found by transformers in the place of the method.
            below._expand_parallel_plan = partial(expand_with_adapters, below)
        config, _, mesh = below.prepare_distribute_model(config)
        below.maybe_distribute_model(below, config, mesh)
        vars(below).pop("_expand_parallel_plan", None)
    if layout.fsdp > 1 and not all(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise RuntimeError(f"parallel: {layout.name}: the model was not spread")


def loading_in_shares(layout: Layout, model_class: type[PreTrainedModel], folder: str) -> dict[str, Any]:
    """Options of `from_pretrained`, with which each process reads its own share of the weights and no other.

    Raises:
        ValueError: as `check_layout`.
    """
    config = AutoConfig.from_pretrained(folder)
    check_layout(layout, config)
    # Its units are known from the modules; tensors on the meta device take no memory.
    with torch.device("meta"):
        plan = _units(model_class._from_config(config))
    return {"distributed_config": _distributed(layout, fsdp_plan=plan)}


def _distributed(layout: Layout, **plans: Any) -> DistributedConfig:
    sizes = {"dp_replicate_size": layout.data, "fsdp_size": layout.shards}
    return DistributedConfig(**sizes, tp_size=layout.tensor, ep_size=layout.expert, **plans)


def _units(model: PreTrainedModel) -> dict[str, str]:
    """What FSDP2 gathers at a time: each layer, each tower, what the model's class says; all else is one more."""
    modules = dict(model.named_modules())
    blocks = [name for name, module in modules.items() if type(module).__name__ in (model._no_split_modules or ())]
    towers = [name for name in modules if name.rpartition(".")[2] in TOWERS]
    # Rules have `*` for the numbers of layers. Those of transformers for any model name parts that this one has not.
    known = {replace_layer_number_by_wildcard(name) for name in modules}
    units = {replace_layer_number_by_wildcard(name): "free_full_weight" for name in (*blocks, *towers)}
    return units | {name: style for name, style in model.fsdp_plan.items() if name in known}


def shares(model: nn.Module) -> dict[str, Any]:
    """What of a model lies on this rank.

    Returns:
        `units`: modules that FSDP2 manages; `own` and `whole`: numbers held here, and in all.
    """
    parameters = list(model.parameters())
    own = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in parameters)
    units = sum(isinstance(module, FSDPModule) for module in model.modules())
    return {"units": units, "own": own, "whole": sum(p.numel() for p in parameters)}
