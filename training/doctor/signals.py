"""Checks that everything has its effect: media change the output, gradients arrive, the fast implementations run."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from chorus_moe.fastpaths.experts_cpu import CPU_EXPERTS
from chorus_moe.modeling.attention import Attention
from chorus_moe.modeling.configuration_modalities import ENCODED_MODALITIES
from chorus_moe.modeling.moe_banks import ChorusExperts
from chorus_moe.training.doctor.finding import Finding, counted, difference, listed, skipped
from chorus_moe.training.doctor.inputs import (
    NUM_ANSWER_TOKENS,
    Batch,
    Patient,
    all_labels,
    answer_labels,
    gradient_norms,
    train_mode,
)
from chorus_moe.training.doctor.state import recorded_calls, recorded_inputs

# An exchanged image moves the logits of a fresh model by 1e-3 of their spread and more; a second pass over the same
# input by nothing on the CPU and by roundings elsewhere.
LEAST_CHANGE = 1e-6


def modalities(patient: Patient) -> Finding:
    """Another image or sound changes the logits of the words after it, and every cross-modal layer carries some of it
    from the media to the words."""
    if not patient.media:
        return skipped("the model takes text only")
    faults, changes = [], []
    for modality in patient.media:
        batch, other = (patient.encode([row]) for row in (patient.row_of(modality), patient.exchanged(modality)))
        # Only words behind the medium: its own positions change in any case.
        before, after = (patient.logits(one)[0][-NUM_ANSWER_TOKENS:] for one in (batch, other))
        changes.append((difference(after, before), modality))
        if changes[-1][0] < LEAST_CHANGE:
            faults.append(f"another {modality} changes nothing: {_where_it_ends(patient, modality, batch, other)}")
            continue
        faults += _silent_layers(patient, modality, batch)
    least, weakest = min(changes)
    cure = (
        "Train or reload the part that is named: a connector of zeros or a tower that was never loaded gives every "
        "input the same tokens. A cross-modal layer that was added with an output of zero must be trained first"
    )
    return Finding(
        verdict="failed" if faults else "ok",
        explanation=listed(faults) or f"exchanged {', '.join(patient.media)}; weakest: {weakest}",
        measured=least,
        tolerance=LEAST_CHANGE,
        at_least=True,
        cure=cure if faults else "",
    )


@torch.no_grad()
def _where_it_ends(patient: Patient, modality: str, batch: Batch, other: Batch) -> str:
    """The first part whose output is the same for both inputs."""
    row = ENCODED_MODALITIES[modality]
    (hidden, tokens), (other_hidden, other_tokens) = (_features(patient, modality, one) for one in (batch, other))
    if difference(other_hidden, hidden) < LEAST_CHANGE:
        return f"{row.tower} gives the same output for both"
    if difference(other_tokens, tokens) < LEAST_CHANGE:
        return f"{row.connector} gives the same tokens for both"
    return "the decoder does not read its tokens"


def _features(patient: Patient, modality: str, batch: Batch) -> tuple[Tensor, Tensor]:
    if modality == "image":
        output = patient.base.get_image_features(batch["pixel_values"])
        return output.last_hidden_state, output.pooler_output
    output = patient.base.get_audio_features(batch["input_features"], batch["input_features_mask"])
    return output.last_hidden_state, torch.cat(list(output.pooler_output))


def _silent_layers(patient: Patient, modality: str, batch: Batch) -> Iterator[str]:
    """Cross-modal layers in which the keys or values of a modality have no influence on the words after it."""
    parameters = {
        f"layer {layer}, {kind}.{modality}": _weight(getattr(patient.decoder.layers[layer].self_attn, kind)[modality])
        for layer in patient.text_config.cross_modal_layers
        for kind in ("k_proj", "v_proj")
    }
    norms = gradient_norms(patient, parameters, batch, answer_labels(batch))
    yield from (f"the words do not read {name} of cross-modal attention" for name, norm in norms.items() if norm == 0)


def _weight(module: Any) -> nn.Parameter:
    """The weight of a projection, below an adapter if there is one."""
    return getattr(module, "base_layer", module).weight


def gradients(patient: Patient) -> Finding:
    """Every router, gate and bank gets a gradient from the loss on tokens alone; the balance loss is there in
    training; and what the labels of an answer do not reach is named."""
    parameters = _bank_parameters(patient)
    if not parameters:
        return skipped("the model has no sparse layer")
    batch = patient.encode()
    reached = gradient_norms(patient, parameters, batch, all_labels(batch))
    answered = gradient_norms(patient, parameters, batch, answer_labels(batch))
    # No tower makes tokens for these banks, so no gradient is to be expected.
    idle = [place for place in parameters if place.bank in _idle_banks(patient)]
    silent = [place for place, norm in reached.items() if norm == 0 and place not in idle]
    # A single expert with weight 1 gives the same output whatever its score: only the balance loss sees the router.
    balanced = [place for place in silent if place.part == "router" and place.bank in _balanced_only(patient)]
    unheard = [place for place, norm in answered.items() if norm == 0 and reached[place] > 0]
    warnings = {
        f"{reason}: {listed([str(place) for place in places], separator=', ')}": cure
        for reason, cure, places in (
            (*NO_TOWER, idle),
            (*BALANCE_ONLY, balanced),
            (*UNHEARD, unheard),
        )
        if places
    }
    faults = [f"no gradient: {place}" for place in silent if place not in balanced] + _missing_balance(patient)
    passed = f"{len(parameters)} routers, gates and banks; {_unused_experts(patient)}"
    return counted(faults, passed, NO_GRADIENT, warnings)


NO_GRADIENT = (
    "Nothing trains what is named: look for a `detach` or `no_grad`, a choice made without its weight, or a layer "
    "whose output is dropped"
)
NO_TOWER = (
    "no tower of this model makes tokens for",
    "Leave banks without a tower out of the configuration: their parameters do nothing",
)
BALANCE_ONLY = (
    "one expert of weight 1 a token, so only the balance loss trains",
    "Set norm_topk_prob to False or num_experts_per_tok to 2 or more, so that answers train the router",
)
UNHEARD = (
    "the labels of an answer do not reach",
    "No later layer lets the words of an answer read image and audio positions (it is the last layer, or a sliding "
    "window ends before them): give these banks `layers` without it, or freeze them",
)


class Place(NamedTuple):
    """What gets a gradient: the gate of a layer, or the router or the experts of one of its banks."""

    layer: int
    bank: str
    part: str

    def __str__(self) -> str:
        return f"layer {self.layer} {self.bank} {self.part}".replace("  ", " ")


def _bank_parameters(patient: Patient) -> dict[Place, nn.Parameter]:
    """One parameter of every router and gate, and the last product of every bank's experts."""
    parameters = {}
    for layer in patient.text_config.sparse_layers:
        mlp: Any = patient.decoder.layers[layer].mlp
        for name, parameter in mlp.named_parameters():
            parts = name.split(".")
            if ".lora_" in name or ".original_module" in name or not parameter.is_floating_point():
                continue
            if parts[0] == "bank_gate":
                parameters[Place(layer, "", "gate")] = parameter
            elif parts[0] == "banks" and parts[2] == "router":
                parameters[Place(layer, parts[1], "router")] = parameter
            # The last product: in a bank that starts with an output of zero it is the only one with a gradient.
            elif parts[0] == "banks" and parts[-1] == "down_proj":
                parameters[Place(layer, parts[1], "experts")] = parameter
    return parameters


def _idle_banks(patient: Patient) -> list[str]:
    known = set(patient.base.config.modalities)
    return [bank.name for bank in patient.text_config.banks if not known & set(bank.modalities)]


def _balanced_only(patient: Patient) -> list[str]:
    """Banks whose one chosen expert always has weight 1, and which have a balance loss."""
    config = patient.text_config
    return [
        bank.name
        for bank in config.banks
        if bank.num_experts_per_tok == 1
        and bank.norm_topk_prob
        and bank.has_balance_loss
        and config.router_aux_loss_coef > 0
    ]


@torch.no_grad()
def _missing_balance(patient: Patient) -> list[str]:
    """What training should add to the loss but does not."""
    config = patient.text_config
    wanted = {
        "aux_loss": config.router_aux_loss_coef > 0 and any(bank.has_balance_loss for bank in config.banks),
        "z_loss": config.router_z_loss_coef > 0,
    }
    # Auxiliary losses are computed in training mode only.
    train_mode(patient)
    output = patient.base(**patient.encode())
    patient.model.eval()
    values = {name: getattr(output, name) for name, is_wanted in wanted.items() if is_wanted}
    return [
        f"{name} is {value if value is None else float(value)} in training"
        for name, value in values.items()
        if value is None or not (torch.isfinite(value) and value > 0)
    ]


@torch.no_grad()
def _unused_experts(patient: Patient) -> str:
    """How many experts no token of the samples visits; with few tokens this is only a hint."""
    used: dict[tuple[int, str], set[int]] = {}
    total = 0
    routing = patient.base(**patient.encode(), output_router_logits=True).routing
    for layer, banks in enumerate(routing):
        for name, bank in banks.items():
            total += bank.router_logits.shape[1]
            # The id E marks an unused slot.
            used[layer, name] = set(bank.selected_experts.flatten().tolist()) - {bank.router_logits.shape[1]}
    unused = total - sum(map(len, used.values()))
    return f"{unused} of {total} experts took none of the few tokens shown (`chorus-moe routing` counts on your data)"


@torch.no_grad()
def fast_paths(patient: Patient) -> Finding:
    """Which function really computed the attention of every layer and the experts of every bank."""
    modules: dict[str, nn.Module] = {
        name: module
        for name, module in patient.decoder.named_modules()
        if isinstance(module, Attention | ChorusExperts)
    }
    batch = patient.encode()
    with (
        recorded_inputs(modules) as called,
        recorded_calls(ALL_ATTENTION_FUNCTIONS) as attention,
        recorded_calls(ALL_EXPERTS_FUNCTIONS) as experts,
    ):
        patient.base(**batch)
    # What no table recorded ran the module's own forward, which is `eager`.
    ran = {name: (attention | experts).get(modules[name], "eager") for name in called}
    kinds = {name: type(modules[name]) for name in called}
    return counted(
        [*_wrong_functions(patient, ran, kinds)],
        f"ran {', '.join(sorted(set(ran.values())))}",
        "The model is slower than it need be. Load without experts_implementation and attn_implementation; a class of "
        "your own must keep `use_experts_implementation` and `_can_set_experts_implementation`",
        dict(_slow_functions(patient, ran, kinds)),
    )


def _wrong_functions(patient: Patient, ran: Mapping[str, str], kinds: Mapping[str, type]) -> Iterator[str]:
    """Modules that ran another function than was asked for; experts that ran one expert after another in any case."""
    config = patient.text_config
    for name, function in ran.items():
        if issubclass(kinds[name], ChorusExperts) and function == "eager":
            yield f"{name} ran eager, the configuration says {config._experts_implementation}"
        elif issubclass(kinds[name], Attention) and function != config._attn_implementation:
            yield f"{name} ran {function}, the configuration says {config._attn_implementation}"


def _slow_functions(patient: Patient, ran: Mapping[str, str], kinds: Mapping[str, type]) -> Iterator[tuple[str, str]]:
    """What could run faster, each with a cure."""
    for name, function in ran.items():
        if issubclass(kinds[name], Attention) and function == "eager":
            yield f"{name} ran eager attention", "Load without attn_implementation, unless you read attention maps"
        elif issubclass(kinds[name], ChorusExperts) and patient.device.type == "cpu" and function != CPU_EXPERTS:
            yield f"{name} ran {function} on the CPU", f"Load without experts_implementation: {CPU_EXPERTS} is faster"
