"""LoRA on named parts of a model: a plain PEFT `LoraConfig`, and a table of exactly what it will train.

Unusual here:
- groups are found in the model, so a group that matches nothing is an error and the table counts what is really there;
- names are full paths below the head, so the same adapter fits every head and no other bank, tower or layer is hit;
- experts are stacked parameters (`target_parameters`): `r` is the rank of each one, and PEFT has no dropout for them.

A LoRA of rank r on a matrix `(out, in)` trains `r * (in + out)` numbers, on experts `(E, out, in)` E times that.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from peft import LoraConfig
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from chorus_moe.fastpaths.quantized_weights import Quantized, stored_weight
from chorus_moe.modeling.modeling_chorus import ChorusModel
from chorus_moe.surgery.parts import (
    CONNECTORS,
    EXITS,
    SKIP_GATES,
    TOWERS,
    below_head,
    in_layers,
    layer_parts,
    parameters_in,
)
from chorus_moe.surgery.report import count_parameters

Layers = bool | Sequence[int]
Banks = str | Sequence[str] | Mapping[str, Layers]
EXPERT_PARAMETERS = ("gate_up_proj", "down_proj")
# What the groups decide; everything else may go to `LoraConfig` as it is.
# PEFT has these for linear layers only, and says so with an error about its own classes, or (EVA) not at all.
LINEAR_ONLY = ("lora_dropout", "use_dora", "lora_bias", "fan_in_fan_out")
EXPERT_STARTS = (True, False, "gaussian")
# Ends of the names of modules that PEFT trains whole for these tasks, whatever the configuration says.
TASK_TYPES, TASK_HEADS = ("SEQ_CLS", "TOKEN_CLS"), ("classifier", "score")
RESERVED = ("target_modules", "target_parameters", "modules_to_save", "layers_to_transform", "layers_pattern", "bias")


@dataclass(frozen=True)
class LoraTargets:
    """What a caller of `lora_config` asks for; the arguments are explained there.

    Raises:
        ValueError: an unknown tower or way to treat routers.
    """

    banks: Banks
    attention: Layers
    cross_modal: Layers
    shared_experts: Layers
    dense: Layers
    connectors: bool
    towers: bool | Sequence[str]
    router: str
    exits: bool
    skip_gates: bool
    whole: Sequence[str]

    def __post_init__(self) -> None:
        if self.router not in ("frozen", "train"):
            raise ValueError(f"router={self.router!r}; choose 'frozen' or 'train'")
        for name in self.tower_names:
            if name not in TOWERS:
                raise ValueError(f"unknown tower {name!r}; choose from {list(TOWERS)}")

    @property
    def tower_names(self) -> list[str]:
        return list(TOWERS) if self.towers is True else list(self.towers or ())


@dataclass
class LoraGroup:
    """What one group trains: `linears` and `parameters` get a LoRA, `saved` modules are trained whole."""

    name: str
    linears: dict[str, nn.Linear] = field(default_factory=dict)
    parameters: dict[str, Tensor | Quantized] = field(default_factory=dict)
    saved: dict[str, nn.Module] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        return [*self.linears, *self.parameters, *self.saved]

    def num_trainable(self, options: Mapping[str, Any], prefix: str = "") -> int:
        """Trainable numbers of this group under the options of a `LoraConfig`.

        Args:
            prefix: what stands before the names in the model, which the keys of a `rank_pattern` may name.
        """
        # DoRA adds a magnitude and `lora_bias` a bias: one number for each output.
        ranks, extra = options.get("rank_pattern") or {}, bool(options.get("use_dora")) + bool(options.get("lora_bias"))

        def rank(name: str) -> int:
            return ranks.get(get_pattern_key(ranks.keys(), prefix + name), options["r"])

        total = sum(
            rank(n) * (m.in_features + m.out_features) + extra * m.out_features for n, m in self.linears.items()
        )
        # A stacked parameter is E matrices, each with its own LoRA.
        total += sum(rank(n) * p.shape[0] * (p.shape[1] + p.shape[2]) for n, p in self.parameters.items())
        return total + sum(p.numel() for module in self.saved.values() for p in module.parameters())


def lora_config(
    model: nn.Module,
    *,
    banks: Banks = (),
    attention: Layers = False,
    cross_modal: Layers = False,
    shared_experts: Layers = False,
    dense: Layers = False,
    connectors: bool = False,
    towers: bool | Sequence[str] = False,
    router: str = "frozen",
    exits: bool = False,
    skip_gates: bool = False,
    whole: Sequence[str] = (),
    r: int = 8,
    lora_alpha: int = 16,
    lora_dropout: float = 0.0,
    verbose: bool = True,
    **options: Any,
) -> LoraConfig:
    """The `LoraConfig` that trains the named groups and nothing else; prints the table of `lora_table`.

    Args:
        model: a Chorus model without an adapter.
        banks: expert banks by name, "all", or name -> layers.
        attention: all four projections of the ordinary layers; True for all of them or a list of layers.
        cross_modal: shared queries, keys and values of every modality, and outputs of the cross-modal layers.
        shared_experts: the always-on experts of the sparse layers.
        dense: the feed-forward of the dense layers.
        connectors: both projections of every connector.
        towers: linear layers of the encoders; True for all, or some of "vision" and "audio".
        router: "train" also trains, whole, the routers of `banks` (of all banks when none is named) and what weighs
            them: a bank's own gate, or the gates over the banks in its layers, which weigh every modality there.
        exits: also train, whole, the heads of a classifier's exits.
        skip_gates: also train, whole, the gates of the `skip_layers`.
        whole: other parts to train whole, by the names that `freeze` takes, such as "global_tokens" or "layers:top20%".
        options: anything else that `LoraConfig` takes, such as `use_rslora` or `rank_pattern`.

    Raises:
        ValueError: a group that matches nothing (naming what exists), nothing to train, a module that would be trained
            whole and by a LoRA, or with banks an option that PEFT has for linear layers only, such as dropout or PiSSA.
        TypeError: an option that the groups decide.
    """
    reserved = [name for name in RESERVED if name in options]
    if reserved:
        raise TypeError(f"{reserved[0]} is set by the groups; to choose it, build a peft.LoraConfig yourself")
    targets = LoraTargets(
        banks, attention, cross_modal, shared_experts, dense, connectors, towers, router, exits, skip_gates, whole
    )
    groups = find_groups(model, targets)
    parameters = [name for group in groups for name in group.parameters]
    options = {"r": r, "lora_alpha": lora_alpha, "lora_dropout": lora_dropout, **options}
    if parameters:
        _check_experts(options)
    if verbose:
        print(lora_table(model, [*groups, *_task_group(model, groups, options.get("task_type"))], options))
    linears = [name for group in groups for name in group.linears]
    return LoraConfig(
        # PEFT matches a list by suffix, which would also hit other banks and towers; a regular expression has to match
        # in full.
        target_modules=full_path_regex(linears) if linears else [],
        target_parameters=[*parameters, *_whole_names(model, parameters)] or None,
        modules_to_save=[name for group in groups for name in group.saved] or None,
        **options,
    )


def _whole_names(model: nn.Module, parameters: Sequence[str]) -> list[str]:
    """The names of quantised experts from the top of the model: PEFT finds them by no part of it."""
    prefix = "" if isinstance(model, ChorusModel) else "model."
    paths = {name: (prefix + name).rpartition(".")[0] for name in parameters}
    return [prefix + name for name, path in paths.items() if hasattr(model.get_submodule(path), "parametrizations")]


def lora_table(model: nn.Module, groups: Iterable[LoraGroup], options: Mapping[str, Any]) -> str:
    """One line per group: matched modules and parameters, trainable numbers, and their share of the model."""
    total = count_parameters(model)
    # The full names are those below the head only where there is no head.
    prefix = "" if isinstance(model, ChorusModel) else "model."
    rows = [(group.name, len(group.names), group.num_trainable(options, prefix)) for group in groups]
    rows.append(("all", sum(row[1] for row in rows), sum(row[2] for row in rows)))
    width = max(len("group"), *(len(row[0]) for row in rows)) + 2
    lines = [f"{'group':<{width}}{'modules':>9}{'trainable':>16}{'share':>9}"]
    lines += [f"{name:<{width}}{count:>9,}{size:>16,}{size / total:>9.2%}" for name, count, size in rows]
    return "\n".join(lines)


def _check_experts(options: Mapping[str, Any]) -> None:
    """Refuse what PEFT has for linear layers only. Raises ValueError."""
    cure = "leave it out, or make linear layers of the experts with unfuse_experts(model)"
    start = options.get("init_lora_weights", True)
    if start not in EXPERT_STARTS:
        raise ValueError(
            f"init_lora_weights={start!r} with expert banks: PEFT computes it from the weight of a linear layer; {cure}"
        )
    for name in LINEAR_ONLY:
        if options.get(name):
            raise ValueError(f"{name}={options[name]!r} with expert banks: PEFT has it for linear layers only; {cure}")


def _task_group(model: nn.Module, groups: Iterable[LoraGroup], task_type: str | None) -> list[LoraGroup]:
    """The heads, those of exits included, that PEFT itself trains whole for a task of this type."""
    named = {name for group in groups for name in group.saved}
    heads = {n: m for n, m in model.named_modules() if n.endswith(TASK_HEADS) and n not in named}
    return [LoraGroup(f"heads of {task_type}", saved=heads)] if task_type in TASK_TYPES and heads else []


def full_path_regex(names: Sequence[str]) -> str:
    """A regular expression that fully matches exactly `names`, below any head; the numbers of a list are joined."""
    numbers: dict[tuple[str, str], list[str]] = {}
    for name in names:
        # The first number in a path is the layer. Joining over it keeps the expression short: a deep model has hundreds
        # of names.
        found_number = re.match(r"(.*?\.)(\d+)(\..*)", name)
        before, number, after = found_number.groups() if found_number else (name, "", "")
        numbers.setdefault((before, after), []).append(number)
    choices = [
        re.escape(before) + (f"(?:{'|'.join(found)})" if len(found) > 1 else found[0]) + re.escape(after)
        for (before, after), found in numbers.items()
    ]
    return rf"(?:.*\.)?(?:{'|'.join(choices)})"


def find_groups(model: nn.Module, targets: LoraTargets) -> list[LoraGroup]:
    """The requested groups, in order, each with what it matched. Errors as in `lora_config`."""
    # Below an adapter the names have PEFT's prefixes, and no pattern would match.
    if hasattr(model, "peft_config"):
        raise ValueError("the model already carries an adapter; call lora_config on the model below it")
    text = getattr(model, "config").text_config  # noqa: B009  an nn.Module by type
    modules = {below_head(name): module for name, module in model.named_modules()}
    groups = []
    for name, (existing, path) in layer_parts(text).items():
        if layers := _layers(name, getattr(targets, name), existing):
            groups.append(LoraGroup(name, _linears(modules, in_layers(layers, path))))
    chosen = _banks(text, targets.banks)
    groups += [_bank_group(modules, name, layers) for name, layers in chosen.items()]
    if targets.connectors:
        groups.append(LoraGroup("connectors", _linears(modules, CONNECTORS)))
    for name in targets.tower_names:
        groups.append(LoraGroup(TOWERS[name], _linears(modules, rf"{TOWERS[name]}\..+")))
    if not groups:
        raise ValueError(
            "no group to put a LoRA on: name banks, attention, cross_modal, shared_experts, dense, connectors or "
            "towers. To train only routers, exits or skip gates, use freeze and unfreeze of chorus_moe.surgery"
        )
    if targets.router == "train":
        # Without banks "train" means the routers of all banks.
        groups.append(_router_group(modules, chosen or _banks(text, "all")))
    for name, pattern in {"exits": EXITS, "skip_gates": SKIP_GATES}.items():
        if getattr(targets, name):
            groups.append(LoraGroup(name, saved={n: m for n, m in modules.items() if re.fullmatch(pattern, n)}))
    groups += _whole_groups(model, modules, targets.whole, groups)
    # PEFT itself only minds when nothing matches at all.
    empty = [group.name for group in groups if not group.names]
    if empty:
        raise ValueError(f"the group {empty[0]!r} matches nothing in this model; remove it")
    return groups


def _whole_groups(
    model: nn.Module, modules: Mapping[str, nn.Module], names: Sequence[str], others: Sequence[LoraGroup]
) -> list[LoraGroup]:
    """A group for each part that is trained whole, of the outermost modules that hold its parameters themselves."""
    # PEFT wraps a module in place: what is wrapped twice would be saved under one name only.
    taken = {name: group.name for group in others for name in group.names}
    groups = []
    for part, parameters in parameters_in(model, names, "whole").items():
        owners = {name.rpartition(".")[0] for name in parameters}
        outermost = [name for name in sorted(owners) if not any(name.startswith(f"{other}.") for other in owners)]
        if "" in outermost:
            raise ValueError(f"whole: {part!r} holds parameters of the model itself, which an adapter cannot save")
        for name in outermost:
            if clash := next((other for other in taken if _is_within(other, name) or _is_within(name, other)), None):
                raise ValueError(f"whole: {part!r} holds {name}, which {taken[clash]!r} trains already; name one")
        groups.append(LoraGroup(part, saved={name: modules[name] for name in outermost}))
        taken |= dict.fromkeys(outermost, part)
    return groups


def _is_within(name: str, other: str) -> bool:
    return f"{name}.".startswith(f"{other}.")


def _linears(modules: Mapping[str, nn.Module], pattern: str) -> dict[str, nn.Linear]:
    """Linear layers by full path. Those inside torch's MultiheadAttention are never called: a LoRA would do nothing."""
    # torch reads their weights directly, so a wrapped layer would be skipped.
    inside = tuple(f"{name}." for name, module in modules.items() if isinstance(module, nn.MultiheadAttention))
    return {
        name: module
        for name, module in modules.items()
        if isinstance(module, nn.Linear) and re.fullmatch(pattern, name) and not name.startswith(inside)
    }


def _layers(group: str, wanted: Layers, existing: Sequence[int]) -> list[int]:
    if wanted is False or (not isinstance(wanted, bool) and not len(wanted)):
        return []
    if not existing:
        raise ValueError(f"{group}: this model has no such layer")
    if wanted is True:
        return list(existing)
    wrong = [layer for layer in wanted if layer not in existing]
    if wrong:
        raise ValueError(f"{group}: layer {wrong[0]} is not one of its layers {list(existing)}")
    return sorted(set(wanted))


def _banks(text: Any, banks: Banks) -> dict[str, list[int]]:
    """Name -> layers of the requested banks."""
    existing = {bank.name: bank.layers_among(text.sparse_layers) for bank in text.banks}
    if banks == "all":
        return existing
    names = [banks] if isinstance(banks, str) else list(banks)
    wrong = [name for name in names if name not in existing]
    if wrong:
        raise ValueError(f"no expert bank is named {wrong[0]!r}; this model has {list(existing)}")
    wanted = banks if isinstance(banks, Mapping) else dict.fromkeys(names, True)
    return {name: _layers(f"bank {name}", wanted[name], existing[name]) for name in names}


def _bank_group(modules: Mapping[str, nn.Module], name: str, layers: Sequence[int]) -> LoraGroup:
    stacks = in_layers(layers, rf"mlp\.banks\.{name}\.(?:experts|deeper_experts\.\d+)")
    paths = [path for path in modules if re.fullmatch(stacks, path)]
    if isinstance(modules[paths[0]], nn.ModuleList):  # experts_layout="linear"
        choice = "|".join(re.escape(path) for path in paths)
        return LoraGroup(f"bank {name}", _linears(modules, rf"(?:{choice})\..+"))
    # A quantised weight is computed anew whenever it is read, and here its shape is enough.
    parameters = {f"{path}.{key}": stored_weight(modules[path], key) for path in paths for key in EXPERT_PARAMETERS}
    return LoraGroup(f"bank {name}", parameters=parameters)


def _router_group(modules: Mapping[str, nn.Module], banks: Mapping[str, Sequence[int]]) -> LoraGroup:
    saved = {}
    for name, layers in banks.items():
        for layer in layers:
            mlp = f"language_model.layers.{layer}.mlp"
            saved[f"{mlp}.banks.{name}.router"] = modules[f"{mlp}.banks.{name}.router"]
            own_gate = f"{mlp}.banks.{name}.gate"
            # An added bank has a gate of its own; others share the layer's.
            gate = own_gate if own_gate in modules else f"{mlp}.bank_gate"
            # The gate over a single bank has no weight.
            if any(True for _ in modules[gate].parameters()):
                saved[gate] = modules[gate]
    return LoraGroup("routers", saved=saved)
