"""What of a model can be cut narrower: heads, and units of feed-forwards and experts, with all tensors that hold them.

Unusual here: a group states once where its units lie in each tensor. Scores are sums over the same places, and a cut
takes them out, so a score can never be that of another unit.

Shape suffixes: L layers, E experts of a bank, N units of a group.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from chorus_moe.modeling.configuration_chorus import ChorusConfig
from chorus_moe.modeling.configuration_modalities import ENCODED
from chorus_moe.modeling.configuration_text import ChorusTextConfig

LAYERS = "layers"
# A pair of linear layers with the units between them: timm, SigLIP, Whisper; wav2vec 2.0; ViT; the Conformer.
PAIRS = (
    ("fc1", "fc2"),
    ("intermediate_dense", "output_dense"),
    ("intermediate.dense", "output.dense"),
    ("sequential.1", "sequential.4"),
)
# What configurations of encoders call the width of a feed-forward, and the number of layers.
WIDTHS = ("encoder_ffn_dim", "intermediate_size")
DEPTHS = ("encoder_layers", "num_hidden_layers")


class Place(NamedTuple):
    """Where the units of a group lie in the tensors whose names match.

    Args:
        pattern: of a name below the decoder or tower, in full; its first group is what the units belong to, such as a
            layer.
        dim: of the tensor.
        blocks: of this dimension, one after the other, each with all units; gate and up stand so in stacked experts.
    """

    pattern: str
    dim: int
    blocks: int = 1


class Group(NamedTuple):
    """Units that can be cut out, the same number in each layer.

    Args:
        size: how many there are now.
        places: of their tensors.
        per_expert: the first dimension of each tensor is that of experts, each with units of its own.
    """

    size: int
    places: tuple[Place, ...]
    per_expert: bool = False

    def find(self, name: str) -> tuple[str, Place] | None:
        """Whom the units in a tensor belong to, and where they are; None if it holds none."""
        for place in self.places:
            if match := re.fullmatch(place.pattern, name):
                return match[1], place
        return None

    def opened(self, tensor: Tensor, place: Place) -> tuple[Tensor, int]:
        """The tensor with a dimension for the units alone, and which one that is."""
        # (..., blocks, units, numbers of one unit, ...)
        parts = (place.blocks, self.size, tensor.shape[place.dim] // (place.blocks * self.size))
        return tensor.unflatten(place.dim, parts), place.dim + 1

    def sums(self, tensor: Tensor, place: Place) -> Tensor:
        """`(N,)` or `(E, N)`: the sum of the numbers of each unit."""
        opened, unit = self.opened(tensor, place)
        kept = {unit, 0} if self.per_expert else {unit}
        return opened.sum(dim=[dim for dim in range(opened.ndim) if dim not in kept])

    def cut(self, tensor: Tensor, place: Place, index: Tensor) -> Tensor:
        """The tensor with some of the units.

        Args:
            index: `(K,)` or `(E, K)`, in rising order.
        """
        opened, unit = self.opened(tensor, place)
        shape = [1] * opened.ndim
        shape[unit] = index.shape[-1]
        if self.per_expert:
            shape[0] = len(index)
        expanded = [size if dim not in (unit, 0) else -1 for dim, size in enumerate(opened.shape)]
        rows = index.to(tensor.device).view(shape)
        if not self.per_expert:
            expanded = [index.shape[-1] if dim == unit else size for dim, size in enumerate(opened.shape)]
        return opened.gather(unit, rows.expand(expanded)).flatten(place.dim, place.dim + 2)


def decoder_groups(config: ChorusTextConfig) -> dict[str, Group]:
    """`heads` (a head of keys and values with the query heads that read it), `feed_forward` of dense layers,
    `shared_experts`, and `experts:BANK`."""
    projection = r"layers\.(\d+)\.self_attn\."
    # `ModalityProjection` has one projection for each modality.
    weight = r"(?:\w+\.)?weight"
    heads = [
        Place(rf"{projection}[qkv]_proj\.(?:{weight}|(?:\w+\.)?bias)", 0),
        Place(rf"{projection}o_proj\.{weight}", 1),
    ]
    heads.append(Place(rf"{projection}(?:global_tokens\.(?:key|value)|memory_tokens\.(?:write|gate))", 0))
    groups = {"heads": Group(config.num_key_value_heads, tuple(heads))}
    if len(config.sparse_layers) < config.num_hidden_layers:
        groups["feed_forward"] = Group(config.intermediate_size, _gated(r"layers\.(\d+)\.mlp\."))
    if config.sparse_layers and config.shared_expert_intermediate_size:
        size = config.shared_expert_intermediate_size
        groups["shared_experts"] = Group(size, _gated(r"layers\.(\d+)\.mlp\.shared_experts\."))
    for bank in config.banks:
        stack = rf"layers\.(\d+\.mlp\.banks\.{bank.name}\.(?:experts|deeper_experts\.\d+))\."
        places = (Place(rf"{stack}gate_up_proj", 1, blocks=2), Place(rf"{stack}down_proj", 2))
        groups[f"experts:{bank.name}"] = Group(bank.intermediate_size, places, per_expert=True)
    return groups


def _gated(prefix: str) -> tuple[Place, ...]:
    return (Place(rf"{prefix}(?:gate|up)_proj\.(?:weight|bias)", 0), Place(rf"{prefix}down_proj\.weight", 1))


def tower_group(tower: nn.Module) -> Group | None:
    """The units of the feed-forwards of an encoder; None where its feed-forwards are no pairs of linear layers of one
    width."""
    modules = dict(tower.named_modules())
    found: dict[str, int] = {}
    for first, second in PAIRS:
        for name, module in modules.items():
            if not name.endswith(f".{first}"):
                continue
            other = modules.get(name.removesuffix(first) + second)
            if isinstance(module, nn.Linear) and isinstance(other, nn.Linear):
                found[name.removesuffix(f".{first}")] = module.out_features
        if found:
            break
    if len(set(found.values())) != 1:
        return None
    owner = rf"({'|'.join(map(re.escape, found))})\."
    places = (
        Place(rf"{owner}{re.escape(first)}\.(?:weight|bias)", 0),
        Place(rf"{owner}{re.escape(second)}\.weight", 1),
    )
    return Group(next(iter(found.values())), places)


def tower_layers(tower: nn.Module, config: PreTrainedConfig) -> str | None:
    """The name of the list of an encoder's layers; None where its configuration does not say how many there are."""
    depth = tower_depth(tower, config)
    lists = [
        name
        for name, module in tower.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(module) == depth and name.count(".") <= 2
    ]
    named = [name for name in lists if name.rpartition(".")[2] in ("blocks", "layers", "layer")]
    return named[0] if len(named) == 1 else None


def tower_depth(tower: nn.Module, config: PreTrainedConfig) -> int | None:
    """Layers of an encoder as its configuration counts them."""
    timm: Any = getattr(tower, "timm_model", None)
    if timm is not None:
        return len(timm.blocks) if isinstance(getattr(timm, "blocks", None), nn.Sequential | nn.ModuleList) else None
    inner = getattr(config, "backbone_config", None) or config
    return next((getattr(inner, name) for name in DEPTHS if hasattr(inner, name)), None)


def scores_of(values: Mapping[str, Tensor], group: Group) -> dict[str, Tensor]:
    """Owner -> `(N,)` or `(E, N)`: the sums of the values of each unit, over all tensors of the group.

    Args:
        values: name below the decoder or tower -> numbers of the shape of the tensor.
    """
    totals: dict[str, Tensor] = {}
    for name, tensor in values.items():
        if (found := group.find(name)) is not None:
            owner, place = found
            sums = group.sums(tensor.double(), place)
            totals[owner] = totals[owner] + sums if owner in totals else sums
    return totals


def groups_of(model_config: ChorusConfig, owner: str, module: nn.Module) -> Iterator[tuple[str, Group]]:
    """Name -> group of the decoder (`language_model`) or of a tower."""
    if owner == "language_model":
        yield from decoder_groups(model_config.text_config).items()
    elif (group := tower_group(module)) is not None:
        yield f"{owner}.feed_forward", group


def owners_of(model: nn.Module) -> dict[str, nn.Module]:
    """The decoder and the towers of a model, by their names in it."""
    names = ["language_model", *(row.tower for row in ENCODED)]
    return {name: module for name in names if (module := getattr(model, name, None)) is not None}


def magnitude(module: nn.Module) -> dict[str, Tensor]:
    """Squares of all weights: the sum over a unit orders units as `torch.nn.utils.prune.ln_structured` with n=2."""
    with torch.no_grad():
        return {name: parameter.double().square() for name, parameter in module.named_parameters()}
