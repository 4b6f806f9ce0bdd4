"""Change the number of experts of a built bank: its tensors, its modules' sizes and the configuration together."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from chorus_moe.modeling.configuration_banks import ExpertBankConfig, check_name
from chorus_moe.modeling.configuration_text import ChorusTextConfig
from chorus_moe.modeling.moe_banks import ChorusExperts, ExpertBank
from chorus_moe.modeling.moe_routers import Router
from chorus_moe.surgery.parts import decoder_of
from chorus_moe.surgery.report import OperationReport, count_parameters

EXPERT_TENSORS = ("gate_up_proj", "down_proj")
NewTensors = dict[int, dict[str, Tensor]]


def layers_of_bank(model: nn.Module, name: str, operation: str) -> dict[int, ExpertBank]:
    """Layer -> the bank in it, with its experts stacked and whole.

    Raises:
        ValueError: an unknown bank, or experts that are not stacked in one piece on this rank.
    """
    decoder = decoder_of(model)
    banks = {bank.name: bank for bank in decoder.config.banks}
    check_name(operation, "bank", name, banks)
    layers = {i: decoder.layers[i].mlp.banks[name] for i in banks[name].layers_among(decoder.config.sparse_layers)}
    for layer, bank in layers.items():
        # Exact type: subclasses and wrappers (quantised, linear) store their experts differently.
        if other := [stack for stack in bank.stacks if type(stack) is not ChorusExperts]:
            raise ValueError(
                f"{operation}: bank {name!r} of layer {layer} holds {type(other[0]).__name__}; stack its experts "
                "with fuse_experts() first"
            )
        if bank.experts.num_experts != bank.num_experts:
            raise ValueError(
                f"{operation}: bank {name!r} of layer {layer} has {bank.experts.num_experts} of its "
                f"{bank.num_experts} experts on this rank; load the whole model on one rank"
            )
    return layers


def expert_tensors(bank: ExpertBank) -> list[str]:
    """Names of the experts' tensors, each with one row per expert; the first feed-forward's first."""
    stacks = ["experts", *(f"deeper_experts.{index}" for index in range(len(bank.deeper_experts)))]
    return [f"{stack}.{name}" for stack in stacks for name in EXPERT_TENSORS]


def expert_rows(router: Router) -> dict[str, Tensor]:
    """Parameters and buffers with one row an expert, by name, those that score first."""
    names = [*router.rows_of_experts, "e_score_correction_bias"]
    return {name: getattr(router, name) for name in names if getattr(router, name) is not None}


def router_tensors(bank: ExpertBank) -> list[str]:
    """Names of the router's tensors with one row per expert, those that score first."""
    return [f"router.{name}" for name in expert_rows(bank.router)]


def with_counts(config: ChorusTextConfig, name: str, counts: Mapping[int, int]) -> ExpertBankConfig:
    """The configuration of a bank with other numbers of experts in some layers.

    Raises:
        ValueError: numbers that no bank can have, naming bank, layer and both numbers.
    """
    bank = next(bank for bank in config.banks if bank.name == name)
    sparse = config.sparse_layers
    layers = bank.layers_among(sparse)
    merged = [counts.get(layer, bank.of_layer(layer, sparse).num_experts) for layer in layers]
    changed = replace(bank, num_experts=merged[0] if len(set(merged)) == 1 else merged)
    changed.validate(sparse)
    return changed


@torch.no_grad()
def replace_experts(
    model: nn.Module, operation: str, new: Mapping[str, NewTensors], notes: list[str]
) -> OperationReport:
    """Give banks other experts.

    Args:
        new: bank -> layer -> name within the bank -> all its rows, for every tensor with one row per expert.
        notes: lines of the report.

    Raises:
        ValueError: numbers that no bank can have; nothing is changed then.
    """
    decoder = decoder_of(model)
    config, before = decoder.config, count_parameters(model)
    counts = {
        name: {layer: len(tensors["experts.down_proj"]) for layer, tensors in layers.items()}
        for name, layers in new.items()
    }
    # Raises before the loop below changes the first tensor.
    changed = {name: with_counts(config, name, of_layer) for name, of_layer in counts.items()}
    experts: dict[str, dict[int, tuple[int, int]]] = {name: {} for name in new}
    for name, layers in new.items():
        for layer, tensors in layers.items():
            mixture = decoder.layers[layer].mlp
            bank = mixture.banks[name]
            experts[name][layer] = (bank.num_experts, counts[name][layer])
            for path, rows in tensors.items():
                _set_tensor(bank, path, rows)
            resolved = changed[name].of_layer(layer, config.sparse_layers)
            # Bank, experts, router and gate each hold the size or the resolved settings. All change together, or
            # routing would index rows that are gone.
            bank.num_experts = counts[name][layer]
            for stack in bank.stacks:
                stack.num_experts = bank.num_experts
            bank.router.bank = resolved
            mixture.bank_gate.banks = [resolved if b.name == name else b for b in mixture.bank_gate.banks]
    config.expert_banks = config.expert_banks | {name: bank.to_dict() for name, bank in changed.items()}
    decoder.banks = {bank.name: bank for bank in config.banks}
    return OperationReport(
        operation=operation,
        subject=", ".join(new),
        parameters_before=before,
        parameters_after=count_parameters(model),
        experts=experts,
        notes=notes,
    )


def _set_tensor(bank: nn.Module, path: str, rows: Tensor) -> None:
    """Replace a parameter or buffer by a tensor of the same dtype, on the same device, trained if the old one was."""
    owner, _, name = path.rpartition(".")
    module = bank.get_submodule(owner)
    old = getattr(module, name)
    # A new parameter, because its shape changes: an optimizer has to be built anew.
    value = rows.to(device=old.device, dtype=old.dtype).contiguous()
    setattr(module, name, nn.Parameter(value, old.requires_grad) if isinstance(old, nn.Parameter) else value)
