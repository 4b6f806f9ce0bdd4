"""Which weights of a model are quantised, and how: groups of weights, formats, and what the configuration says of them.

Unusual here:
- a bank's own name overrides "experts", and a tower's "towers", whatever the order;
- all is planned and checked by name before the first weight changes.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from chorus_moe.fastpaths.quantized_weights import (
    CLASSES,
    QuantizedWeight,
    quantized,
    restore,
    store_quantized,
    stored_weight,
)
from chorus_moe.modeling.configuration_banks import check_name
from chorus_moe.modeling.moe_banks import ChorusExperts
from chorus_moe.surgery.parts import TOWERS, below_head, part_patterns

OPERATION = "quantize"
FORMATS, NONE = ("int8", "int4"), "none"
# Weights that share a scale at 4 bits, unless a group says otherwise: the largest of these that divides the row.
GROUP_SIZES = (64, 32, 16)
# The weights of a module that may be quantised.
WEIGHTS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: ("weight",),
    nn.Embedding: ("weight",),
    ChorusExperts: ("gate_up_proj", "down_proj"),
}
# What is quantised where one format is given for all. Towers are small, and convolutions in them are no matrices.
DEFAULT = ("experts", "attention", "cross_modal", "shared_experts", "dense", "connectors", "head", "embeddings")
# A group before those that override it.
GROUPS = (*DEFAULT, "towers", *TOWERS.values())


@dataclass(frozen=True)
class WeightFormat:
    """How the weights of a group are stored.

    Args:
        bits: 8 or 4.
        group: neighbours in a row that share a scale; None for the whole row at 8 bits, and at 4 bits for the largest
            of 64, 32 and 16 that divides the row.
        symmetric: whole numbers stand around zero; otherwise they span what lies between least and greatest.
    """

    bits: int
    group: int | None = None
    symmetric: bool = True

    def group_of(self, width: int, name: str) -> int:
        """The size of the groups of a weight with rows of `width` numbers."""
        if self.group is None and self.bits == 8:
            return width
        sizes = GROUP_SIZES if self.group is None else (self.group,)
        found = next((size for size in sizes if width % size == 0), None)
        if found is None:
            choice = " or ".join(map(str, sizes))
            raise ValueError(f"{OPERATION}: {name} has rows of {width} weights, which groups of {choice} do not divide")
        return found


Format = str | Mapping[str, int | bool | None]
Groups = Format | Mapping[str, Format]


def read_format(given: object, group: str) -> WeightFormat | None:
    """`"int8"`, `"int4"`, or a mapping as `WeightFormat`; None for `"none"`.

    Raises:
        ValueError: anything else, naming the group.
    """
    where = f"{OPERATION}: {group!r}"
    if isinstance(given, WeightFormat):
        given = asdict(given)
    if isinstance(given, str):
        check_name(where, "format", given, (*FORMATS, NONE))
        return None if given == NONE else WeightFormat(int(given.removeprefix("int")))
    if not isinstance(given, Mapping):
        raise ValueError(f"{where}: expected int8, int4, none or a mapping such as {{bits: 4}}; found {given!r}")
    for key in given:
        check_name(where, "setting", key, ("bits", "group", "symmetric"))
    bits, size, symmetric = given.get("bits"), given.get("group"), given.get("symmetric", True)
    if type(bits) is not int or bits not in (4, 8):
        raise ValueError(f"{where}: bits={bits!r}; choose 8 or 4")
    if size is not None and (type(size) is not int or size < 2 or size % 2):
        raise ValueError(f"{where}: group={size!r}; expected an even number, or None")
    if type(symmetric) is not bool:
        raise ValueError(f"{where}: symmetric={symmetric!r}; expected true or false")
    return WeightFormat(bits, size, symmetric)


class Weight(NamedTuple):
    """A weight that can be quantised: its module, and its name there."""

    module: nn.Module
    name: str


def weights_of(model: nn.Module) -> dict[str, Weight]:
    """Name below the head -> each weight that can be quantised or is."""
    below = below_adapter(model)
    prefix = "" if hasattr(below.config, "text_config") else "language_model."
    found: dict[str, Weight] = {}
    for path, module in below.named_modules():
        if ".lora_" in path or ".modules_to_save" in path:
            continue  # an adapter's own
        path = path.replace(".base_layer", "")
        for kind, names in WEIGHTS.items():
            # Exact types: a subclass of somebody else computes in a way of its own.
            if type(module) is kind or isinstance(module, CLASSES[kind]):
                found |= {f"{prefix}{below_head(path)}.{name}": Weight(module, name) for name in names}
    return found


def below_adapter(model: nn.Module) -> PreTrainedModel:
    """The model itself, without PEFT's wrapper."""
    below: Any = model
    return below.get_base_model() if hasattr(model, "get_base_model") else below


def is_stored(module: nn.Module, name: str) -> bool:
    """Whether a weight is quantised by this file."""
    steps = getattr(module, "parametrizations", {})
    return name in steps and isinstance(steps[name][0], QuantizedWeight)


def groups_of(model: nn.Module) -> dict[str, dict[str, Weight]]:
    """Group -> its weights; groups without any are left out, banks come last."""
    text = below_adapter(model).config.get_text_config()
    patterns = part_patterns(text)
    banks = {bank.name: patterns[f"experts:{bank.name}"] for bank in text.banks}
    patterns["experts"] = "|".join(f"(?:{pattern})" for pattern in banks.values()) or r"(?!)"
    weights = weights_of(model)
    groups = {}
    for group, pattern in ({name: patterns[name] for name in GROUPS if name in patterns} | banks).items():
        matching = {name: weight for name, weight in weights.items() if re.fullmatch(pattern, name)}
        if matching:
            groups[group] = matching
    return groups


def plan_formats(model: nn.Module, groups: Groups) -> dict[str, WeightFormat]:
    """Name below the head -> format, of every weight that is to be quantised.

    Raises:
        ValueError: as in [`quantize`].
    """
    found = groups_of(model)
    is_for_all = isinstance(groups, str) or "bits" in groups
    asked: Any = dict.fromkeys(filter(found.__contains__, DEFAULT), groups) if is_for_all else groups
    for name in asked:
        check_name(OPERATION, "group", name, found)
    plan: dict[str, WeightFormat | None] = {}
    # In the order of the model's groups, not of the caller's: what is more special comes later.
    for name, weights in found.items():
        if name in asked:
            plan |= dict.fromkeys(weights, read_format(asked[name], name))
    wanted = {name: chosen for name, chosen in plan.items() if chosen is not None}
    if not wanted:
        raise ValueError(f"{OPERATION}: nothing is named that could be quantised; choose from {list(found)}")
    weights = weights_of(model)
    for name, chosen in wanted.items():
        module, key = weights[name]
        if is_stored(module, key):
            raise ValueError(f"{OPERATION}: {name} is quantised already; call dequantize(model) first")
        weight = getattr(module, key)
        if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
            raise ValueError(f"{OPERATION}: {name} is {weight.dtype}, quantised by something else")
        chosen.group_of(weight.shape[-1], name)
    return wanted


@torch.no_grad()
def apply_formats(model: nn.Module, plan: Mapping[str, WeightFormat]) -> None:
    """Quantise weights, also those on the meta device: then what is saved can be loaded into them."""
    weights = weights_of(model)
    _untie(below_adapter(model), plan)
    # Module by module: beside the model, memory holds the weights of one.
    for module, names in groupby(plan, lambda name: weights[name].module):
        made = {}
        for name in names:
            key, chosen = weights[name].name, plan[name]
            weight = getattr(module, key)
            size = chosen.group_of(weight.shape[-1], name)
            made[key] = quantized(weight, chosen.bits, size, chosen.symmetric)
        store_quantized(module, made)


def restore_weights(model: nn.Module) -> int:
    """Make floating-point weights of all stored ones; in how many modules."""
    stored = {id(w.module): w.module for w in weights_of(model).values() if is_stored(*w)}
    for module in stored.values():
        restore(module)
    return len(stored)


def _untie(model: Any, plan: Mapping[str, WeightFormat]) -> None:
    """Give the output layer a table of its own where it shares that of the embeddings and one of them is quantised."""
    tables = {"lm_head.weight", "language_model.embed_tokens.weight"}
    if not getattr(model, "all_tied_weights_keys", None) or not tables & set(plan):
        return
    model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False
    model.all_tied_weights_keys = {}
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone(), model.lm_head.weight.requires_grad)


def described(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What is quantised, for the configuration: names, or patterns of names alike in all layers -> format."""
    formats = {name: _format_of(weight) for name, weight in weights_of(model).items()}
    kinds: dict[str, list[Any]] = {}
    for name, found in formats.items():
        kinds.setdefault(_pattern(name), []).append(found)
    alike = {pattern for pattern, found in kinds.items() if all(each == found[0] for each in found)}
    return {
        (_pattern(name) if _pattern(name) in alike else name): asdict(found)
        for name, found in formats.items()
        if found is not None
    }


def _format_of(weight: Weight) -> WeightFormat | None:
    if not is_stored(*weight):
        return None
    stored: Any = stored_weight(*weight)
    count = stored.scale.shape[-1]
    group = None if stored.bits == 8 and count == 1 else stored.shape[-1] // count
    return WeightFormat(stored.bits, group, stored.offset is None)


def _pattern(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def plan_described(model: nn.Module, weights: Mapping[str, Format]) -> dict[str, WeightFormat]:
    """Name below the head -> format, as [`described`] wrote it."""
    names = weights_of(model)
    found = {name: weights.get(name, weights.get(_pattern(name))) for name in names}
    plan = {name: read_format(given, name) for name, given in found.items() if given is not None}
    return {name: chosen for name, chosen in plan.items() if chosen is not None}
