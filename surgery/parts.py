"""The parts of a model by name: what is frozen, trained or given a LoRA.

Unusual here:
- a part is a pattern over names below the head, so one name means the same under every head;
- a bank is a part of its own, and `router:NAME` and `experts:NAME` are parts of it;
- layers are a part by number or by their share of the depth, `layers:0-11` and `layers:top20%`.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from torch import nn

from chorus_moe.modeling.configuration_banks import check_name
from chorus_moe.modeling.configuration_modalities import ENCODED
from chorus_moe.modeling.configuration_text import ChorusTextConfig
from chorus_moe.modeling.modeling_text import ChorusTextModel
from chorus_moe.surgery.heads import HEADS
from chorus_moe.surgery.report import OperationReport, count_parameters, refuse_adapters

# What LoRA and the names of parts call an encoder: its module without `_tower`.
TOWERS = {row.tower.removesuffix("_tower"): row.tower for row in ENCODED}
CONNECTORS = rf"(?:{'|'.join(row.connector for row in ENCODED)})\..+"
# Exits by their smallest modules: PEFT, asked for `task_type="SEQ_CLS"`, also wraps all that ends in `score`, and one
# wrapped module within another cannot be saved.
# What PEFT puts before the names of the model below an adapter.
BELOW_ADAPTER = "base_model.model."
EXITS, SKIP_GATES = r"exits\.\d+\.(?:norm|score)", r"language_model\.layers\.\d+\.skip_gate"


def decoder_of(model: nn.Module) -> ChorusTextModel:
    """The [`ChorusTextModel`] below a head, an adapter and wrappers such as DistributedDataParallel.

    Raises:
        ValueError: there is none.
    """
    for module in model.modules():
        if isinstance(module, ChorusTextModel):
            return module
    raise ValueError(f"{type(model).__name__} holds no ChorusTextModel, so it has no expert banks")


def below_head(name: str) -> str:
    """A module's or parameter's name below the head, `language_model.layers...`, whichever head it is."""
    # A bare ChorusModel has no such prefix, and its names are those below the head already.
    return name.removeprefix("model.")


class BankTensor(NamedTuple):
    """Where a tensor of a bank lives: `part` is its name within the bank, such as `router.weight`."""

    layer: int
    bank: str
    part: str


def bank_tensor(name: str) -> BankTensor | None:
    """Read the name of a parameter, with any prefix of heads and wrappers; None if it belongs to no bank."""
    match = re.fullmatch(r"(?:.*\.)?layers\.(\d+)\.mlp\.banks\.(\w+)\.(.+)", name)
    return None if match is None else BankTensor(int(match[1]), match[2], match[3])


def layer_parts(text: ChorusTextConfig) -> dict[str, tuple[list[int], str]]:
    """Part of the decoder -> the layers that have it, and a pattern of its names within a layer."""
    cross_modal = sorted(set(text.cross_modal_layers))
    return {
        "attention": ([i for i in range(text.num_hidden_layers) if i not in cross_modal], r"self_attn\..+"),
        "cross_modal": (cross_modal, r"self_attn\..+"),
        "shared_experts": (text.sparse_layers, r"mlp\.shared_experts\..+"),
        "dense": ([i for i in range(text.num_hidden_layers) if i not in text.sparse_layers], r"mlp\..+"),
    }


def in_layers(layers: Iterable[int | str], path: str) -> str:
    """The pattern of `path` in some layers."""
    return rf"language_model\.layers\.(?:{'|'.join(map(str, layers))})\.{path}"


def part_patterns(text: ChorusTextConfig) -> dict[str, str]:
    """Part -> the pattern that the names of its parameters match in full; banks come last."""
    patterns = {
        "all": r".+",
        "embeddings": r"language_model\.embed_tokens\..+",
        # In front of a bidirectional sequence, or keys and values of causal layers.
        "global_tokens": r"language_model\.(?:layers\.\d+\.self_attn\.)?global_tokens\..+",
        "memory_tokens": in_layers([r"\d+"], r"self_attn\.memory_tokens\..+"),
        "head": rf"(?:{'|'.join(part for head in HEADS for part in head.parts)})(?:\..+)?",
        "exits": EXITS + r"\..+",
        "norms": r"language_model\.(?:layers\.\d+\.\w*norm|norm)\..+",
        "bank_gates": in_layers([r"\d+"], r"mlp\.bank_gate\..+"),
        "connectors": CONNECTORS,
        "towers": rf"(?:{'|'.join(TOWERS.values())})\..+",
        "banks": in_layers([r"\d+"], r"mlp\.banks\..+"),
        "routers": in_layers([r"\d+"], r"mlp\.banks\.\w+\.router\..+"),
        "skip_gates": SKIP_GATES + r"\..+",
    }
    patterns |= {part: rf"{part}\..+" for row in ENCODED for part in (row.tower, row.connector)}
    patterns |= {name: in_layers(layers, path) for name, (layers, path) in layer_parts(text).items()}
    for bank in text.banks:
        path = rf"mlp\.banks\.{bank.name}\."
        layers = bank.layers_among(text.sparse_layers)
        # `add_bank` refuses a bank with the name of a part, so no pattern here replaces another.
        within = {"router": r"router\..+", "experts": r"(?:deeper_)?experts\..+"}
        patterns |= {f"{part}:{bank.name}": in_layers(layers, path + pattern) for part, pattern in within.items()}
        patterns[bank.name] = in_layers(layers, path + ".+")
        patterns[f"banks.{bank.name}"] = patterns[bank.name]
    return patterns


def layers_named(name: str, count: int) -> range:
    """The layers that `layers:3`, `layers:0-11`, `layers:top20%` or `layers:bottom80%` names.

    Shares are rounded to whole layers, `top` to one at least; `bottom80%` is what `top20%` leaves.

    Args:
        count: layers of the model.

    Raises:
        ValueError: another form, or layers that the model does not have.
    """
    spec = name.removeprefix("layers:")
    share = re.fullmatch(r"(top|bottom)(\d+(?:\.\d+)?)%", spec)
    numbers = re.fullmatch(r"(\d+)(?:-(\d+))?", spec)
    if share and float(share[2]) <= 100:
        top = float(share[2]) if share[1] == "top" else 100 - float(share[2])
        first = count - (max(1, int(count * top / 100 + 0.5)) if top else 0)
        found = range(first, count) if share[1] == "top" else range(first)
    elif numbers:
        found = range(int(numbers[1]), int(numbers[2] or numbers[1]) + 1)
    else:
        raise ValueError(f"{name!r}: expected layers:3, layers:0-11, layers:top20% or layers:bottom80%")
    if not found or found[-1] >= count:
        raise ValueError(f"{name!r} names {_range_text(found)}; the model has layers 0 to {count - 1}")
    return found


def _range_text(layers: range) -> str:
    return f"layers {layers[0]} to {layers[-1]}" if layers else "no layer"


def parts_of(model: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """Part -> its parameters by name; parts without any are left out. `layers:...` are found by `parameters_in`."""
    names = _named_parameters(model)
    patterns = part_patterns(model.config.get_text_config())  # type: ignore[union-attr,operator]
    parts = {part: _matching(names, pattern) for part, pattern in patterns.items()}
    return {part: parameters for part, parameters in parts.items() if parameters}


def parameters_in(model: nn.Module, names: Iterable[str], where: str) -> dict[str, dict[str, nn.Parameter]]:
    """Named part -> its parameters, those of an adapter on it included, under their names below the head.

    Args:
        names: as in `freeze`.
        where: what an error begins with.

    Raises:
        ValueError: a part that the model does not have, with the nearest name, or layers that it does not have.
    """
    parts, text = parts_of(model), model.config.get_text_config()  # type: ignore[union-attr,operator]
    found = {}
    for name in names:
        if isinstance(name, str) and name.startswith("layers:"):
            try:
                pattern = in_layers(layers_named(name, text.num_hidden_layers), ".+")
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
            found[name] = _matching(parts["all"], pattern)
        else:
            # Layers have endless names, read above; two of them show the form.
            check_name(where, "part", name, [*parts, "layers:0-11", "layers:top20%"])
            found[name] = parts[name]
    return found


def _named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    # A bare decoder has no `language_model.` in its names; with it, one set of patterns fits all models.
    prefix = "" if hasattr(model.config, "text_config") else "language_model."
    return {
        prefix + below_head(name.removeprefix(BELOW_ADAPTER)): parameter for name, parameter in model.named_parameters()
    }


def _matching(names: Mapping[str, nn.Parameter], pattern: str) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in names.items() if re.fullmatch(pattern, name)}


def set_trained(model: nn.Module, names: Sequence[str], is_trained: bool) -> OperationReport:
    """Train or freeze whole parts; names and errors as in `freeze`."""
    operation = "unfreeze" if is_trained else "freeze"
    refuse_adapters(model, operation, may_be_quantized=True)
    # All names are checked before the first parameter changes.
    parts, everything = parameters_in(model, names, operation), dict(model.named_parameters())
    before = _num_trained(everything)
    for part in parts.values():
        for parameter in part.values():
            # Quantised weights are integers, and torch refuses a gradient for them.
            if parameter.is_floating_point():
                parameter.requires_grad_(is_trained)
    for module in model.modules():
        tower = getattr(module, "vision_tower", None)
        if tower is not None:
            # Frozen batch norms stop averaging, trained ones start; the tower decides that when its mode is set.
            tower.train(tower.training)
    total = count_parameters(model)
    return OperationReport(
        operation=operation,
        subject=", ".join(names),
        parameters_before=total,
        parameters_after=total,
        trainable_before=before,
        trainable_after=_num_trained(everything),
    )


def _num_trained(parameters: Mapping[str, nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters.values() if parameter.requires_grad)


def freeze(model: nn.Module, *names: str) -> OperationReport:
    """Exclude parts from training.

    Args:
        names: "all", a bank (also as "banks.BANK"), "banks", "router:BANK", "experts:BANK", "routers", "bank_gates",
            "attention", "cross_modal", "shared_experts", "dense", "towers", "vision_tower", "audio_tower",
            "connectors", "vision_connector", "audio_connector", "embeddings", "global_tokens", "memory_tokens",
            "norms", "head" (with its exits), "exits", "skip_gates"; layers of the decoder as "layers:3",
            "layers:0-11", "layers:top20%" or "layers:bottom80%", of which the last two make up the whole.

    Returns:
        A report with the trainable parameters before and after. A frozen router's balance bias does not move either.

    Raises:
        ValueError: adapters are active, or a part or layer that the model does not have, with the nearest name.
    """
    return set_trained(model, names, False)


def unfreeze(model: nn.Module, *names: str) -> OperationReport:
    """Train parts; names and errors as in `freeze`."""
    return set_trained(model, names, True)
