"""Experts as stacked parameters or as linear layers, and checkpoints with one tensor per expert.

Unusual here:
- both layouts hold the same numbers; nothing is computed, rounded or transposed on the way;
- transformers can stack such a checkpoint while it loads (`WeightConverter`), but a registered conversion is also run
  backwards by every `save_pretrained`. The layout is a setting of the configuration instead, so that what is saved is
  what is in memory.

Shape suffixes: E experts in the bank, D hidden size, I expert width, H = 2I.
"""

import os
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from chorus_moe.modeling.configuration_text import ChorusTextConfig
from chorus_moe.modeling.modeling_base import ChorusPreTrainedModel
from chorus_moe.modeling.moe_banks import EXPERT_CLASSES, ChorusExperts, ExpertBank, LinearExperts
from chorus_moe.processors.processing_chorus import ChorusProcessor
from chorus_moe.surgery.checkpoint_writer import PlannedTensor, write_checkpoint
from chorus_moe.surgery.parts import decoder_of
from chorus_moe.surgery.report import OperationReport, count_parameters, refuse_adapters

LINEARS = ("gate_proj", "up_proj", "down_proj")


def unfuse_experts(model: ChorusPreTrainedModel) -> OperationReport:
    """Make every expert a feed-forward of linear layers, with the same weights (`experts_layout="linear"`).

    The weights are the same bits, and `fuse_experts` gives back the same model. Outputs agree to rounding: the two
    halves of the first product are two products now.

    Raises:
        ValueError: adapters are active, the experts are linear layers already, or shares of their width are used.
    """
    return _convert(model, "unfuse_experts", "linear", _linear_tensors)


def fuse_experts(model: ChorusPreTrainedModel) -> OperationReport:
    """Undo `unfuse_experts`: stack the experts of each bank (`experts_layout="fused"`), which computes much faster.

    Raises:
        ValueError: adapters are active, a weight is quantised, or the experts are stacked already.
    """
    return _convert(model, "fuse_experts", "fused", _stacked_tensors)


def _refuse_shares(operation: str, config: ChorusTextConfig) -> None:
    if config.expert_width_shares:
        raise ValueError(
            f"{operation}: expert_width_shares={config.expert_width_shares} take stacked experts; to use them whole "
            "from now on, load the model with text_config.expert_width_shares = None"
        )


@torch.no_grad()
def _convert(
    model: nn.Module, operation: str, layout: str, tensors_of: Callable[[nn.Module], dict[str, Tensor]]
) -> OperationReport:
    refuse_adapters(model, operation)
    decoder, before = decoder_of(model), count_parameters(model)
    config = decoder.config
    if config.experts_layout == layout:
        raise ValueError(f"{operation}: the experts already have the layout {layout!r}")
    _refuse_shares(operation, config)
    banks: list[ExpertBank] = [
        bank for layer in config.sparse_layers for bank in decoder.layers[layer].mlp.banks.values()
    ]
    for bank in banks:
        experts = (parameter for stack in bank.stacks for parameter in stack.named_parameters())
        for name, parameter in experts:
            # Quantised and sharded parameters are subclasses of `Parameter` or hold integers; slices of them mean
            # something else.
            if not parameter.is_floating_point() or type(parameter) is not nn.Parameter:
                raise ValueError(
                    f"{operation}: bank {bank.name!r}: {name} is quantised or sharded; "
                    "load the model unquantised on one device"
                )
    # Every bank is checked before the first one is converted: a model of two layouts would not load.
    config.experts_layout = layout
    for bank in banks:
        # One by one, so that old and new experts of one bank at most are in memory together.
        bank.experts = _converted(config, bank, bank.experts, layout, tensors_of)
        for index, stack in enumerate(bank.deeper_experts):
            bank.deeper_experts[index] = _converted(config, bank, stack, layout, tensors_of)
    return OperationReport(
        operation=operation,
        subject=f"{len(banks)} banks",
        parameters_before=before,
        parameters_after=count_parameters(model),
    )


def _converted(
    config: ChorusTextConfig,
    bank: ExpertBank,
    old: nn.Module,
    layout: str,
    tensors_of: Callable[[nn.Module], dict[str, Tensor]],
) -> ChorusExperts | LinearExperts:
    with torch.device("meta"):  # structure only
        new = EXPERT_CLASSES[layout](config, bank.router.bank)
    # Frozen experts stay frozen.
    is_trained = any(parameter.requires_grad for parameter in old.parameters())
    for name, tensor in tensors_of(old).items():
        owner, _, key = name.rpartition(".")
        setattr(new.get_submodule(owner), key, nn.Parameter(tensor, is_trained))
    return new.train(old.training)


def _linear_tensors(experts: Any) -> dict[str, Tensor]:
    """Name within linear experts -> a copy of its part of the stacked ones."""
    # Without the copy every linear layer would keep the whole stack alive.
    return {name: part.clone() for name, part in split_experts(experts.gate_up_proj, experts.down_proj)}


def split_experts(gate_up_EHD: Tensor, down_EDI: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Name and part of every linear layer, without a copy."""
    for expert, (gate_up_HD, down_DI) in enumerate(zip(gate_up_EHD.detach(), down_EDI.detach(), strict=True)):
        # The first half of H is the gate, the second the up projection.
        for name, part in zip(LINEARS, (*gate_up_HD.chunk(2), down_DI), strict=True):
            yield f"{expert}.{name}.weight", part


def _stacked_tensors(experts: Any) -> dict[str, Tensor]:
    gate, up, down = (torch.stack([getattr(expert, name).weight for expert in experts]) for name in LINEARS)
    return {"gate_up_proj": torch.cat((gate, up), dim=1), "down_proj": down}


def export_experts(
    model: ChorusPreTrainedModel,
    folder: str | os.PathLike[str],
    max_shard_bytes: int = 5_000_000_000,
    processor: ChorusProcessor | None = None,
) -> list[str]:
    """Write a checkpoint with one tensor per expert, under the names that other engines use, shard by shard.

    Names end in `mlp.banks.{bank}.experts.{e}.gate_proj.weight`, `up_proj` and `down_proj`, as those of Qwen3-MoE
    checkpoints do below `mlp`. `from_pretrained` reads the folder as a model with `experts_layout="linear"`, of
    which `fuse_experts` makes the same as this one. Beside this model, memory holds one tensor.

    Args:
        max_shard_bytes: largest size of one file of weights.
        processor: saved beside the model, so that the folder answers on its own.

    Returns:
        The names of the files that hold weights.

    Raises:
        ValueError: adapters are active, or shares of the experts' width are used.
    """
    refuse_adapters(model, "export_experts")
    _refuse_shares("export_experts", model.config.get_text_config())
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    # A recipe for each tensor: parts of the model's own memory, so that nothing is held twice.
    tensors = {
        name: PlannedTensor(tuple(tensor.shape), tensor.dtype, partial(_whole, tensor))
        for name, tensor in _exported(model)
    }
    files = write_checkpoint(path, tensors, max_shard_bytes)
    config = deepcopy(model.config)
    config.get_text_config().experts_layout = "linear"
    # `save_pretrained` of a model sets this; loading checks the class by it.
    config.architectures = [type(model).__name__]
    config.save_pretrained(path)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(path)
    if processor is not None:
        processor.save_pretrained(path)
    return files


def _whole(tensor: Tensor) -> list[Tensor]:
    """The recipe of a tensor that is there already; the writer wants it on the CPU."""
    return [tensor.detach().cpu()]


def _exported(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of all that a checkpoint holds; experts one by one, as parts of the model's own memory."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    state = model.state_dict()
    for name, tensor in state.items():
        # `down_proj` is written with its `gate_up_proj`, expert by expert; a tied weight is stored once.
        if name in tied or name.endswith(".down_proj"):
            continue
        if not name.endswith(".gate_up_proj"):
            yield name, tensor
            continue
        prefix = name.removesuffix("gate_up_proj")
        for part, value in split_experts(tensor, state[f"{prefix}down_proj"]):
            yield prefix + part, value
