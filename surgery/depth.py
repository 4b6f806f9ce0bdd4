"""Adaptive depth for a model that was trained without it: exits, and gates that let tokens skip feed-forwards.

Unusual here:
- what is added changes no output: exits answer only when they are asked, no sample leaves at a new exit, and a new
  gate is open for every token;
- the new exit of a classifier starts as if the model ended there, with copies of the final norm and of the head, as
  the exits of a generative model, which share both.
"""

import re
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers.utils.output_capturing import install_output_capuring_hook

from chorus_moe.modeling.configuration_services import SERVICES
from chorus_moe.modeling.depth_exits import Exits
from chorus_moe.modeling.depth_skip import SkipGate
from chorus_moe.modeling.modeling_base import ChorusPreTrainedModel
from chorus_moe.surgery.parts import decoder_of
from chorus_moe.surgery.report import OperationReport, checked, count_parameters, refuse_adapters

# Operation -> names of the tensors that it adds.
ADDED = {"add_exits": r"exits\.\d+\..+", "add_skip_gates": r".*\.skip_gate\..+"}


def add_exits(
    model: ChorusPreTrainedModel, layers: Sequence[int], exit_loss_coef: float | None = None
) -> OperationReport:
    """Add exits to a classifier or a generative model. Outputs stay as they are, bit for bit.

    In a classifier each new exit has a head, which starts with copies of the final norm and of `score`: as if the
    model ended there. Train them alone with `freeze(model, "all")` and `unfreeze(model, "exits")`. If
    `config.exit_thresholds` is set, a new exit gets the threshold 1 and is never taken until `calibrate_exits` runs
    again. In a generative model exits share the final norm and the head, so only the configuration changes.

    Args:
        layers: after how many layers each new exit stands.
        exit_loss_coef: weight of the exits in training; if None that of the exits before, 1 if there were none.

    Raises:
        ValueError: adapters are active, the head does not support exits, `layers` is empty, or one of them has an exit
            already or cannot have one. The model is unchanged then.
    """
    refuse_adapters(model, "add_exits")
    decoder, config, before = decoder_of(model), model.config, count_parameters(model)
    text, heads = decoder.config, getattr(model, "exits", None)
    if heads is None and not model.can_generate():
        raise ValueError(f"add_exits: {type(model).__name__} has no head that could answer after a layer")
    if exit_loss_coef is None:
        exit_loss_coef = text.exit_loss_coef if text.exit_layers else 1.0
    # A changed copy of the configuration, checked as a whole. The model's own is written last, when nothing can fail.
    new = _grown(text, "add_exits", "exit_layers", layers, exit_loss_coef=exit_loss_coef)
    notes = [f"exits after layers {new.exit_layers}", f"exit_loss_coef: {text.exit_loss_coef} -> {new.exit_loss_coef}"]
    if heads is None:
        notes.append("no parameters: an exit of a generative model runs the final norm and the head")
    else:
        model.exits = _grown_heads(model, decoder, new)
    if config.exit_thresholds is not None:
        # Thresholds are stored in the order of the layers, and a new exit may stand between old ones.
        old = dict(zip(sorted(text.exit_layers or []), config.exit_thresholds, strict=True))
        # A probability is never above 1, so no sample leaves at the new exit.
        thresholds = [old.get(layer, 1.0) for layer in new.exit_layers]
        notes.append(f"exit_thresholds: {config.exit_thresholds} -> {thresholds}, none leaves at a new exit as yet")
        config.exit_thresholds = thresholds
    text.exit_layers, text.exit_loss_coef = new.exit_layers, new.exit_loss_coef
    return _report("add_exits", f"after layers {sorted(layers)}", model, before, notes)


def _grown_heads(model: Any, decoder: Any, text: Any) -> Exits:
    """The heads of all exits of `text`, those that are there already as they are."""
    exits, like = Exits(text, model.num_labels), model.score.weight
    old = dict(zip(model.exits.layers, model.exits, strict=True))
    for index, layer in enumerate(exits.layers):
        if layer in old:
            # The same module and parameters, trained state and optimizer state included.
            exits[index] = old[layer]
            continue
        head: Any = exits[index].to(like.device, like.dtype)
        head.norm.load_state_dict(decoder.norm.state_dict())
        head.score.load_state_dict(model.score.state_dict())
    return exits.train(model.training)


def add_skip_gates(
    model: ChorusPreTrainedModel,
    layers: Sequence[int],
    skip_budget: float | None = None,
    skip_scope: str | None = None,
) -> OperationReport:
    """Add gates that let tokens skip the feed-forward of a layer, or all of it. New gates are open for every token:
    outputs stay as they are, bit for bit, at any `skip_threshold` below 0.73. Train them alone with
    `freeze(model, "all")` and `unfreeze(model, "skip_gates")`.

    Args:
        layers: indices of the layers that get a gate.
        skip_budget: the share of the tokens of all these layers that training lets pass; the model's own if None.
        skip_scope: what is skipped, `feed_forward` or `layer`; the model's own if None.

    Raises:
        ValueError: adapters are active, no layers, one that has a gate already or that the model does not have, no
            budget between 0 and 1, or another scope than that of gates that are there. Nothing has been changed then.
    """
    refuse_adapters(model, "add_skip_gates")
    decoder, before = decoder_of(model), count_parameters(model)
    text = decoder.config
    budget = text.skip_budget if skip_budget is None else skip_budget
    scope = text.skip_scope if skip_scope is None else skip_scope
    if text.skip_layers and scope != text.skip_scope:
        raise ValueError(
            f"add_skip_gates: skip_scope={scope!r}, but the gates of skip_layers={text.skip_layers} were made for "
            f"{text.skip_scope!r}"
        )
    new = _grown(text, "add_skip_gates", "skip_layers", layers, skip_budget=budget, skip_scope=scope)
    for decoder_layer in decoder.layers:
        decoder_layer.skip_scope = scope
    for index in layers:
        layer = decoder.layers[index]
        gate = SkipGate(text.hidden_size).to(next(layer.parameters()).device, decoder.norm.weight.dtype)
        # The initial bias opens the gate with probability sigmoid(1) = 0.73: hence the limit on `skip_threshold`.
        decoder._init_weights(gate)
        if getattr(decoder, "_output_capturing_hooks_installed", False):
            install_output_capuring_hook(gate, "skip_logits", index=0)  # as on gates that were there before
        _attach(layer, gate.train(layer.training))
    notes = [f"gates in layers {new.skip_layers}", f"skip_budget: {text.skip_budget} -> {budget}"]
    text.skip_layers, text.skip_budget, text.skip_scope = new.skip_layers, new.skip_budget, new.skip_scope
    return _report("add_skip_gates", f"in layers {sorted(layers)}", model, before, notes)


def _attach(layer: Any, gate: SkipGate) -> None:
    """Where a layer built with a gate has it, in front of the norms: the states of an optimizer go by the order."""
    layer.skip_gate = gate
    # Re-inserted behind the gate, in their old order.
    for name in [name for name in layer._modules if name.endswith("norm")]:
        layer._modules[name] = layer._modules.pop(name)


def _grown(text: Any, operation: str, field: str, layers: Sequence[int], **changes: Any) -> Any:
    """The decoder's configuration with more layers in `field`.

    Raises:
        ValueError: no layers, one that is there already, or what the configuration refuses.
    """
    old = list(getattr(text, field) or [])
    if not layers:
        raise ValueError(f"{operation}: layers is empty; the model has {field}={old}")
    twice = [layer for position, layer in enumerate(layers) if layer in layers[:position]]
    if twice:
        raise ValueError(f"{operation}: layers={list(layers)} names {twice[0]} twice")
    there = [layer for layer in layers if layer in old]
    if there:
        raise ValueError(f"{operation}: the model has {there[0]} already, {field}={old}")
    # Built anew, so that every check of the configuration runs on the result.
    values = text.to_dict() | changes | {field: sorted([*old, *layers])}
    return checked(operation, lambda: type(text)(**values))


def _report(operation: str, subject: str, model: nn.Module, before: int, notes: list[str]) -> OperationReport:
    return OperationReport(
        operation=operation,
        subject=subject,
        parameters_before=before,
        parameters_after=count_parameters(model),
        notes=notes,
    )


def advise_missing(missing: list[str]) -> str:
    """What to do where a checkpoint lacks just the tensors of exits or skip gates, which a configuration alone asks for
    in vain; empty if one is of another kind."""
    found = {name: sum(bool(re.fullmatch(pattern, tensor)) for tensor in missing) for name, pattern in ADDED.items()}
    operations = [name for name, count in found.items() if count] if sum(found.values()) == len(missing) else []
    return f"Load it with its own configuration and call {' and '.join(operations)}. " if operations else ""


SERVICES["advise_missing"] = advise_missing
