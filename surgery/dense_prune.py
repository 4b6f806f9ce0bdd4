"""Make a model narrower or shallower: fewer heads, units of feed-forwards and experts, and layers; towers as well.

Unusual here:
- shapes are really smaller afterwards: the part is built anew from the changed configuration, and what stays is copied;
- each layer keeps its own best units, and as many as the others, since a configuration has one number for all;
- nothing is rescaled: a pruned model computes what the whole one does with the weights of the cut units at zero.
"""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from chorus_moe.modeling.configuration_banks import check_name
from chorus_moe.modeling.configuration_text import ChorusTextConfig
from chorus_moe.surgery.dense_groups import (
    DEPTHS,
    LAYERS,
    WIDTHS,
    Group,
    groups_of,
    magnitude,
    owners_of,
    scores_of,
    tower_depth,
    tower_layers,
)
from chorus_moe.surgery.report import OperationReport, checked, count_parameters, refuse_adapters

OPERATION = "prune_dense"
DECODER = "language_model"
# Group -> what the units belong to -> score of each; of layers one tensor under the name "".
DenseScores = Mapping[str, Mapping[str, Tensor]]
# Group of the decoder -> the field of its configuration.
FIELDS = {
    "heads": "num_key_value_heads",
    "feed_forward": "intermediate_size",
    "shared_experts": "shared_expert_intermediate_size",
}


def prune_dense(
    model: nn.Module, keep: Mapping[str, int | float], scores: DenseScores | None = None
) -> OperationReport:
    """Keep the best units of some groups, and the best layers.

    | name | units |
    | --- | --- |
    | `heads` | heads of keys and values, each with the query heads that read it |
    | `feed_forward`, `shared_experts` | units of dense layers and of the always-on experts |
    | `experts:BANK` | units of each expert of a bank |
    | `layers` | layers of the decoder |
    | `vision_tower.feed_forward`, `audio_tower.layers` and so on | the same of an encoder |

    Args:
        keep: name -> how many stay, a number or a fraction (a float) of what is there, at least one.
        scores: name -> scores, the higher the more a unit is worth, as
            `chorus_moe.training.compression.importance.measure_importance` finds them. Of units without scores the
            magnitude decides (`torch.nn.utils.prune.ln_structured`, n=2); layers want scores. Ties go to the lower
            index.

    Raises:
        ValueError: adapters are active; an unknown name or a number that cannot be; layers without scores; scores of
            another shape; a part that cannot be rebuilt so. Nothing has been changed then.
    """
    refuse_adapters(model, OPERATION)
    inner: Any = getattr(model, "model", model)
    owners, before = owners_of(inner), count_parameters(model)
    if not keep:
        raise ValueError(f"{OPERATION}: no group is named")
    groups = {name: (owner, group) for owner in owners for name, group in groups_of(inner.config, owner, owners[owner])}
    depths = {DECODER: LAYERS} | {name: f"{name}.{LAYERS}" for name in owners if name != DECODER}
    for name in keep:
        check_name(OPERATION, "group", name, [*groups, *depths.values()])
    exits: Any = getattr(model, "exits", ())
    if LAYERS in keep and len(exits):
        raise ValueError(f"{OPERATION}: {LAYERS!r}: the exits of a classifier were trained after their layers")
    new, notes = {}, []
    for owner, part in owners.items():
        wanted = {name: keep[name] for name, (of, _) in groups.items() if of == owner and name in keep}
        depth = keep.get(depths[owner])
        if wanted or depth is not None:
            plan = Part(owner, part, {name: groups[name][1] for name in wanted}, scores or {})
            new[owner] = plan.rebuilt(wanted, depth)
            notes += plan.notes
    # All parts are built by now; nothing below can fail.
    for owner, part in new.items():
        setattr(inner, owner, part)
        field = "text_config" if owner == DECODER else owner.removesuffix("_tower") + "_config"
        setattr(model.config, field, part.config)
    whole: Any = model
    whole.tie_weights()
    return OperationReport(
        operation=OPERATION,
        subject=", ".join(keep),
        parameters_before=before,
        parameters_after=count_parameters(model),
        notes=notes,
    )


class Part:
    """The decoder or a tower, on its way to fewer units."""

    def __init__(self, owner: str, module: nn.Module, groups: Mapping[str, Group], scores: DenseScores):
        self.owner, self.groups, self.scores = owner, groups, scores
        self.module: Any = module
        self.notes: list[str] = []

    def rebuilt(self, keep: Mapping[str, int | float], depth: int | float | None) -> nn.Module:
        """A module of the smaller configuration with what stays."""
        config = deepcopy(self.module.config)
        if self.owner == DECODER:
            check_decoder(config, keep)
        tensors: dict[str, Tensor] = dict(self.module.state_dict())
        for name, group in self.groups.items():
            count = number_of(name, keep[name], group.size)
            chosen = {owner: best(score, count) for owner, score in self._scores(name, group).items()}
            for key, tensor in tensors.items():
                if (found := group.find(key)) is not None:
                    tensors[key] = group.cut(tensor, found[1], chosen[found[0]])
            self._narrow(config, name, count)
            self.notes.append(f"{name}: {group.size} -> {count}")
        if depth is not None:
            tensors = self._shallower(config, tensors, depth)
        return self._build(config, tensors)

    def _scores(self, name: str, group: Group) -> Mapping[str, Tensor]:
        wanted = scores_of(magnitude(self.module), group)
        if name not in self.scores:
            return wanted
        given = self.scores[name]
        for owner, score in wanted.items():
            shape = tuple(given[owner].shape) if owner in given else None
            if shape != tuple(score.shape):
                raise ValueError(
                    f"{OPERATION}: scores of {name!r} in {owner!r} have shape {shape}, expected {tuple(score.shape)}; "
                    "measure them on this model"
                )
            if not given[owner].isfinite().all():
                raise ValueError(f"{OPERATION}: scores of {name!r} in {owner!r} are not finite")
        return given

    def _narrow(self, config: Any, name: str, count: int) -> None:
        if self.owner != DECODER:
            timm = getattr(self.module, "timm_model", None)
            if timm is not None:
                # timm rounds `embed_dim * mlp_ratio` down.
                config.model_args = (config.model_args or {}) | {"mlp_ratio": (count + 0.5) / timm.embed_dim}
            else:
                set_first(config, WIDTHS, count)
        elif name in FIELDS:
            if name == "heads":
                config.num_attention_heads = config.num_attention_heads // config.num_key_value_heads * count
            setattr(config, FIELDS[name], count)
        else:
            bank = name.partition(":")[2]
            config.expert_banks = config.expert_banks | {bank: config.expert_banks[bank] | {"intermediate_size": count}}

    def _shallower(self, config: Any, tensors: dict[str, Tensor], keep: int | float) -> dict[str, Tensor]:
        is_decoder = self.owner == DECODER
        name = LAYERS if is_decoder else f"{self.owner}.{LAYERS}"
        where = LAYERS if is_decoder else tower_layers(self.module, config)
        if where is None:
            raise ValueError(
                f"{OPERATION}: {name!r}: the {self.owner} has no list of layers that its configuration counts"
            )
        total = config.num_hidden_layers if is_decoder else tower_depth(self.module, config)
        assert total is not None  # there is a list of this length
        count = number_of(name, keep, total)
        if name not in self.scores:
            raise ValueError(f"{OPERATION}: {name!r} wants scores: the magnitude of a layer says nothing of its effect")
        score_L = self.scores[name].get("")
        if score_L is None or score_L.shape != (total,) or not score_L.isfinite().all():
            raise ValueError(f"{OPERATION}: scores of {name!r} must be {total} finite numbers under the name ''")
        kept = best(score_L, count).tolist()
        if is_decoder:
            keep_layers(config, kept)
        elif getattr(self.module, "timm_model", None) is not None:
            config.model_args = (config.model_args or {}) | {"depth": count}
        else:
            set_first(config, DEPTHS, count)
        self.notes.append(f"{name}: {total} -> {count}, those of {kept} stay")
        place = {str(old): str(new) for new, old in enumerate(kept)}
        found = {}
        for key, tensor in tensors.items():
            if not key.startswith(f"{where}."):
                found[key] = tensor
                continue
            index, _, rest = key.removeprefix(f"{where}.").partition(".")
            if index in place:
                found[f"{where}.{place[index]}.{rest}"] = tensor
        return found

    def _build(self, config: Any, tensors: Mapping[str, Tensor]) -> nn.Module:
        old = self.module
        if self.owner == DECODER:
            # A changed copy is checked as a whole.
            config = checked(OPERATION, lambda: ChorusTextConfig.from_dict(config.to_dict()))
            config._attn_implementation = old.config._attn_implementation
            config._experts_implementation = old.config._experts_implementation
        trained = {name: parameter.requires_grad for name, parameter in old.named_parameters()}
        # Its first numbers are all replaced; the caller's random state is not moved.
        with torch.random.fork_rng(devices=[]):
            new: Any = type(old)._from_config(config)
        shapes = {name: tuple(tensor.shape) for name, tensor in new.state_dict().items()}
        for name in sorted(shapes.keys() | tensors.keys()):
            shape = tuple(tensors[name].shape) if name in tensors else None
            if shape != shapes.get(name):
                raise ValueError(
                    f"{OPERATION}: the {self.owner} cannot be rebuilt so: {name!r} has shape {shape} after the cut and "
                    f"{shapes.get(name)} in the smaller part"
                )
        parameter = next(old.parameters())
        new = new.to(device=parameter.device)
        new.load_state_dict({name: tensor.detach().clone() for name, tensor in tensors.items()}, assign=True)
        flags = set(trained.values())
        for name, tensor in new.named_parameters():
            tensor.requires_grad_(flags == {True} or trained.get(name, True in flags))
        return new.train(old.training)


def check_decoder(config: ChorusTextConfig, keep: Mapping[str, int | float]) -> None:
    """Refuse what another number of units would change beyond them."""
    if "heads" in keep and config.use_qk_norm and config.qk_norm_scope == "projection":
        raise ValueError(f"{OPERATION}: 'heads': qk_norm_scope='projection' norms all heads together")
    experts = [name for name in keep if name.startswith("experts:")]
    if experts and config.expert_width_shares:
        raise ValueError(
            f"{OPERATION}: {experts[0]!r}: expert_width_shares={config.expert_width_shares} count the leading units, "
            "which would be others"
        )
    if experts and config.experts_layout == "linear":
        raise ValueError(f"{OPERATION}: {experts[0]!r}: experts_layout='linear'; stack them with fuse_experts() first")


def keep_layers(config: ChorusTextConfig, kept: list[int]) -> None:
    """Bring all that a decoder's configuration says by layer down to some layers."""
    place = {old: new for new, old in enumerate(kept)}
    sparse = config.sparse_layers
    for name in ("layer_types", "mlp_layer_types", "no_rope_layers"):
        if (values := getattr(config, name)) is not None:
            setattr(config, name, [values[layer] for layer in kept])
    if "hybrid_sliding" not in config.layer_types:
        config.num_memory_tokens = 0
    for name in ("cross_modal_layers", "skip_layers"):
        if (values := getattr(config, name)) is not None:
            setattr(config, name, [place[layer] for layer in values if layer in place])
    if config.exit_layers:
        # An exit stands after so many layers; one that would stand where another does, or nowhere, goes.
        exits = {sum(layer < exit for layer in kept) for exit in config.exit_layers}
        config.exit_layers = sorted(exits - {0, len(kept)}) or None
        config.exit_loss_coef = config.exit_loss_coef if config.exit_layers else 0.0
    banks = {}
    for bank in config.banks:
        layers = bank.layers_among(sparse)
        stay = [layer for layer in layers if layer in place]
        values = config.expert_banks[bank.name]
        if not stay:
            raise ValueError(
                f"{OPERATION}: {LAYERS!r}: bank {bank.name!r} is in layers {layers}, and none of them stays"
            )
        if values["layers"] is not None:
            values = values | {"layers": [place[layer] for layer in stay]}
        if isinstance(values["num_experts"], list):
            counts = [bank.of_layer(layer, sparse).num_experts for layer in stay]
            values = values | {"num_experts": counts}
        banks[bank.name] = values
    config.num_hidden_layers, config.expert_banks = len(kept), banks


def number_of(name: str, wanted: int | float, total: int) -> int:
    """How many units stay."""
    if isinstance(wanted, float) and 0 < wanted <= 1:
        return max(round(wanted * total), 1)
    # `True` is an `int` for Python.
    if isinstance(wanted, bool) or not isinstance(wanted, int) or not 1 <= wanted <= total:
        raise ValueError(
            f"{OPERATION}: {name!r}: keep={wanted!r} is neither a number from 1 to {total} nor a fraction above 0 and "
            "up to 1"
        )
    return wanted


def best(score: Tensor, count: int) -> Tensor:
    """The indices of the best in rising order, along the last dimension; ties go to the lower index."""
    return score.argsort(dim=-1, descending=True, stable=True)[..., :count].sort(dim=-1).values


def set_first(config: PreTrainedConfig, names: tuple[str, ...], value: int) -> None:
    """Set what an encoder's configuration, or that of its backbone, calls a size."""
    inner = getattr(config, "backbone_config", None) or config
    setattr(inner, next(name for name in names if hasattr(inner, name)), value)
