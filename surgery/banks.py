"""Add banks to a model, and experts to a bank. Outputs are unchanged until the added part is trained.

Unusual here:
- an added bank has a gate of its own (`gate="own"`), and its experts end in zeros, so at first it adds exactly zero;
- experts that are added to a bank form a bank themselves; the old stack keeps its shape, its optimizer state and its
  products bit for bit.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from chorus_moe.modeling.configuration_banks import ExpertBankConfig, check_name, read_expert_banks
from chorus_moe.modeling.modeling_base import ChorusPreTrainedModel
from chorus_moe.modeling.modeling_text import ChorusTextModel
from chorus_moe.modeling.moe_banks import EXPERT_CLASSES, ExpertBank
from chorus_moe.surgery.parts import decoder_of, part_patterns
from chorus_moe.surgery.report import OperationReport, count_parameters, refuse_adapters

Changes = dict[int, tuple[int, int]]


def add_bank(
    model: ChorusPreTrainedModel,
    name: str,
    modalities: Sequence[str] | None = None,
    num_experts: int | list[int] | None = None,
    **settings: Any,
) -> OperationReport:
    """Add an expert bank with a gate of its own. Outputs stay as they are, bit for bit, until it is trained.

    Train it alone with `freeze(model, "all")` and `unfreeze(model, name)`. Random numbers come from torch's global
    generator.

    Args:
        name: a name that no bank has.
        modalities: whose tokens may enter; those of the bank's name if it is one, else all of the model.
        num_experts: from the configuration if None, as all other sizes.
        settings: any other field of [`ExpertBankConfig`], such as `layers` or `router`.

    Raises:
        ValueError: adapters are active, the name is taken, or no bank can be built from the settings.
    """
    refuse_adapters(model, "add_bank")
    config = decoder_of(model).config
    if name in config.expert_banks:
        raise ValueError(
            f"add_bank: the model already has a bank {name!r}; its banks are {sorted(config.expert_banks)}"
        )
    # `freeze` and `unfreeze` address banks and other parts by name in one namespace.
    if name in part_patterns(config):
        raise ValueError(f"add_bank: {name!r} is the name of a part of the model; give the bank another")
    given = {"modalities": None if modalities is None else list(modalities), "num_experts": num_experts, **settings}
    # A softmax over banks would take weight from the others even while the new bank adds nothing.
    if "gate" in given:
        raise ValueError(
            f"add_bank: gate={given['gate']!r}; an added bank has a gate of its own, any other would change outputs"
        )
    # None means "as configured": only what was given may override the defaults of the configuration.
    given = {key: value for key, value in given.items() if value is not None}
    (bank,) = read_expert_banks({name: given | {"gate": "own"}}, config.bank_defaults)
    return _grow(model, "add_bank", name, bank, [])


def add_experts(
    model: ChorusPreTrainedModel, bank: str, num_experts: int | Mapping[int, int], **settings: Any
) -> OperationReport:
    """Add experts to a bank. Outputs stay as they are, bit for bit, until the new experts are trained.

    They form a bank of their own, `{bank}_2` (then `_3`, ...), open to the same tokens, in the same layers and with
    the settings of the old one, and a gate of their own weighs them. Each token visits the best of the new experts
    in addition to those of the old bank.

    Args:
        num_experts: how many in each layer of the bank, or layer -> how many.
        settings: fields of [`ExpertBankConfig`] that are to differ from the old bank's.

    Raises:
        ValueError: adapters are active, an unknown bank, a layer without it, or a number that no bank can have.
    """
    refuse_adapters(model, "add_experts")
    config = decoder_of(model).config
    banks = {found.name: found for found in config.banks}
    check_name("add_experts", "bank", bank, banks)
    old, layers = banks[bank], banks[bank].layers
    counts: int | list[int] = 0
    if isinstance(num_experts, Mapping):
        layers = sorted(num_experts)
        counts = [num_experts[layer] for layer in layers]
        wrong = [layer for layer in layers if layer not in old.layers_among(config.sparse_layers)]
        if wrong:
            raise ValueError(
                f"add_experts: layer {wrong[0]} does not hold the bank {bank!r}, which lives in "
                f"{old.layers_among(config.sparse_layers)}"
            )
    else:
        counts = num_experts
    smallest = min(counts, default=0) if isinstance(counts, list) else counts
    # K of the old bank may be more than the experts added in some layer.
    top_k = max(1, min(old.num_experts_per_tok, smallest))
    # Repeated additions give `text_2`, `text_3`, ...
    name = next(free for i in range(2, 10_000) if (free := f"{bank}_{i}") not in banks)
    # Within the old stack a new expert could only displace one of the top K, which changes outputs, or never be chosen,
    # which leaves it untrained. So the new experts are a companion bank, with the settings of the old one but for those
    # that its own size or its age decide.
    new = replace(
        old,
        name=name,
        num_experts=counts,
        num_experts_per_tok=top_k,
        layers=layers,
        # The old groups need not divide the new number of experts.
        num_groups=1,
        topk_groups=None,
        # With one expert per token there is nothing to adapt, and the configuration refuses it.
        adaptive_experts=old.adaptive_experts and top_k > 1,
        gate="own",
        # Added experts are there to be trained, even if the old bank is closed.
        closed=False,
    )
    if settings:
        (new,) = read_expert_banks({name: new.to_dict() | settings}, {})
    note = f"the new experts of {bank!r} are the bank {name!r}, with a router and a gate of their own"
    return _grow(model, "add_experts", bank, new, [note])


def deepen_experts(model: ChorusPreTrainedModel, bank: str, expert_depth: int) -> OperationReport:
    """Let each expert of a bank have more feed-forwards. Outputs stay as they are, up to rounding, until the new ones
    are trained: their last projections start as zeros.

    Args:
        expert_depth: feed-forwards of one expert, more than before.

    Raises:
        ValueError: adapters are active, an unknown bank, or a depth that is not above the present one. Nothing has
            been changed then.
    """
    refuse_adapters(model, "deepen_experts")
    decoder, before = decoder_of(model), count_parameters(model)
    config, sparse = decoder.config, decoder.config.sparse_layers
    banks = {found.name: found for found in config.banks}
    check_name("deepen_experts", "bank", bank, banks)
    old = banks[bank]
    if expert_depth <= old.expert_depth:
        raise ValueError(f"deepen_experts: bank {bank!r} has expert_depth={old.expert_depth}, found {expert_depth}")
    new = replace(old, expert_depth=expert_depth)
    new.validate(sparse, config.modalities)
    for layer in new.layers_among(sparse):
        mixture, of_layer = decoder.layers[layer].mlp, new.of_layer(layer, sparse)
        module = mixture.banks[bank]
        like = next(module.experts.parameters())
        for _ in range(expert_depth - old.expert_depth):
            stack = EXPERT_CLASSES[config.experts_layout](config, of_layer).to(like.device, like.dtype)
            for part in stack.modules():
                decoder._init_weights(part)
            module.deeper_experts.append(stack.train(module.training))
        silence(module.stacks[old.expert_depth :])
        module.router.bank = of_layer
        mixture.bank_gate.banks = [of_layer if b.name == bank else b for b in mixture.bank_gate.banks]
    write_bank(decoder, new)
    return OperationReport(
        operation="deepen_experts",
        subject=bank,
        parameters_before=before,
        parameters_after=count_parameters(model),
        notes=[f"expert_depth: {old.expert_depth} -> {expert_depth}"],
    )


@torch.no_grad()
def silence(stacks: Iterable[nn.Module]) -> None:
    """Let experts, stacked or linear, add zero: their last projections become zeros."""
    for stack in stacks:
        for name, parameter in stack.named_parameters():
            if "down_proj" in name:
                parameter.zero_()


def _grow(model: nn.Module, operation: str, subject: str, bank: ExpertBankConfig, notes: list[str]) -> OperationReport:
    decoder, before = decoder_of(model), count_parameters(model)
    bank.validate(decoder.config.sparse_layers, decoder.config.modalities)
    changes = place_bank(decoder, bank)
    with torch.no_grad():
        for layer in changes:
            # Zero output, non-zero input side: the bank adds exactly zero, and the first training step moves only this
            # matrix. If all of them were zero, no gradient would ever arrive.
            silence(decoder.layers[layer].mlp.banks[bank.name].stacks)
    return OperationReport(
        operation=operation,
        subject=subject,
        parameters_before=before,
        parameters_after=count_parameters(model),
        experts={bank.name: changes},
        notes=notes,
    )


def place_bank(decoder: ChorusTextModel, bank: ExpertBankConfig) -> Changes:
    """Put a new bank, with weights as every bank starts, into its layers and the configuration, in the place of one of
    the same name; returns layer -> experts before and after.

    The rows of the gates over banks are left to the caller.
    """
    config, changes = decoder.config, {}
    sparse = config.sparse_layers
    for layer in bank.layers_among(sparse):
        mlp = decoder.layers[layer].mlp
        # A norm is never quantised; which a layer has depends on where they are placed.
        like = next(value for name, value in decoder.layers[layer].named_parameters() if "norm" in name)
        module = ExpertBank(config, bank.of_layer(layer, sparse)).to(like.device, like.dtype).train(mlp.training)
        for part in module.modules():
            decoder._init_weights(part)
        banks = dict(mlp.banks.items())
        changes[layer] = (banks[bank.name].num_experts if bank.name in banks else 0, module.num_experts)
        # Sorted by name, as a model built from the saved configuration has them: `config.json` sorts its keys, and
        # optimizer states go by the order of parameters.
        mlp.banks = nn.ModuleDict(dict(sorted({**banks, bank.name: module}.items())))
    write_bank(decoder, bank)
    return changes


def write_bank(decoder: ChorusTextModel, bank: ExpertBankConfig) -> None:
    """Put a bank into the configuration, in the place of one of the same name."""
    decoder.config.expert_banks = dict(sorted({**decoder.config.expert_banks, bank.name: bank.to_dict()}.items()))
    decoder.banks = {found.name: found for found in decoder.config.banks}
    # The constructor decides this once from the banks it sees. An added bank may be the first with a balance bias, and
    # in half precision the small steps of that bias would round to nothing.
    if any(found.balance == "bias" for found in decoder.banks.values()):
        decoder._keep_in_fp32_modules_strict = ["e_score_correction_bias"]


def set_closed(model: nn.Module, name: str, is_closed: bool) -> OperationReport:
    """`close_bank` or `open_bank`, by flag."""
    # No check for adapters: the flag leaves every tensor and every module as it is.
    decoder, total = decoder_of(model), count_parameters(model)
    operation = "close_bank" if is_closed else "open_bank"
    check_name(operation, "bank", name, decoder.banks)
    write_bank(decoder, replace(decoder.banks[name], closed=is_closed))
    return OperationReport(operation=operation, subject=name, parameters_before=total, parameters_after=total)


def close_bank(model: ChorusPreTrainedModel, name: str) -> OperationReport:
    """Skip a bank in every call from now on, also after saving and loading, as if it were not there. To skip it in a
    single call, give `forward` or `generate` the argument `closed_banks`.

    Raises:
        ValueError: an unknown bank.
    """
    return set_closed(model, name, True)


def open_bank(model: ChorusPreTrainedModel, name: str) -> OperationReport:
    """Undo `close_bank`."""
    return set_closed(model, name, False)
