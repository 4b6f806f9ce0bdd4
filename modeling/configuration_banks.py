"""The configuration of one expert bank: a router and its experts, open to some modalities."""

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from math import isfinite
from typing import TYPE_CHECKING, Any

from huggingface_hub.dataclasses import type_validator
from torch import nn

from .configuration_checks import check_range
from .configuration_modalities import MODALITY_IDS

BALANCES = ("switch", "cv2", "variance", "bias", "none")
OVERFLOWS = ("reroute", "drop")
CAPACITY_SCOPES = ("sequence", "batch")
ROUNDINGS = ("ceil", "floor")
PRESETS = ("uniform", "specific_then_common")
GATES = ("softmax", "own")
# PEFT finds its own tensors by these words in a parameter's name, so a bank of that name is saved and loaded wrongly.
PEFT_NAMES = ("router", "base_layer", "modules_to_save", "original_module")
# Far above any real model: a configuration from the Hub must not make us allocate without limit.
MAX_EXPERTS, MAX_EXPERT_WIDTH, MAX_EXPERT_DEPTH = 65_536, 1_048_576, 64
# Router -> what keeps its load even unless a bank says otherwise. A configuration is read and checked where no model
# code has been loaded, so these two facts stand here; the class of that name in `moe_routers` states all others.
ROUTERS: dict[str, str] = {"softmax": "switch", "sigmoid": "bias", "attention": "switch"}


@dataclass(frozen=True, kw_only=True)
class ExpertBankConfig:
    """One named expert bank.

    Args:
        name: how the bank is addressed everywhere (parameters, LoRA, statistics).
        modalities: the modalities whose tokens may enter; that of the bank's name, or all of the model if it is not
            named after one.
        num_experts: experts in the bank; a list has one number for each layer the bank lives in, in rising order.
        num_experts_per_tok: experts that a token visits.
        intermediate_size: width of one expert.
        expert_depth: feed-forwards of one expert, one after the other: each adds to the sum of those before it, and
            reads what the first reads plus that sum.
        layers: indices of the sparse layers that hold the bank; all sparse layers if None.
        router: how experts are scored, one of `ROUTERS`.
        router_bias: a linear router adds a learned number to each expert's score, zero at the start.
        norm_topk_prob: whether the weights of the chosen experts are divided by their sum.
        routed_scaling_factor: factor on the weights of the chosen experts.
        router_jitter_noise: while training, what the router reads is multiplied by a number between 1 - noise and
            1 + noise (Switch Transformer, arXiv 2101.03961).
        num_groups, topk_groups: experts lie in `num_groups` groups of neighbours and a token chooses within its best
            `topk_groups`, all if None (DeepSeek-V3, arXiv 2412.19437).
        balance: what keeps the load even, one of `BALANCES`; what `ROUTERS` says of the router if None.
        bias_update_rate: step of the correction bias at each optimizer step, with `balance="bias"`.
        expert_capacity: tokens of one sequence that an expert takes at most: a number, or a factor (float) on the even
            share of the sequence so far, see `moe_selection.py`; unlimited if None.
        capacity_overflow: a choice whose expert is full goes to the token's next best (`reroute`) or is lost (`drop`).
        capacity_scope: what capacity is counted over: a `sequence`, or the whole `batch`, whose later samples then
            depend on earlier ones; for training alone, on a device with buffers of a fixed size.
        capacity_in_eval: whether capacity holds outside training as well.
        adaptive_experts: visit between 1 and `num_experts_per_tok` experts, by the complexity c of the token: `c * K`
            rounded by `adaptive_rounding`, up (`ceil`) or down (`floor`), and at least one.
        mean_experts: the complexity is learned, instead of the entropy of the scores, and training brings the mean
            number of experts of a token to this, see `expert_budget_loss_coef` of [`ChorusTextConfig`].
        gate: the bank gate that weighs it: `softmax` is shared by the banks of the layer, so a bank that is added
            takes weight from the others; `own` is a sigmoid of this bank beside that softmax and takes nothing.
        closed: the bank is skipped as if it were not there; see `closed_banks` of [`ChorusTextModel`].
    """

    name: str
    num_experts: int | list[int]
    num_experts_per_tok: int
    intermediate_size: int
    expert_depth: int = 1
    modalities: list[str] = field(default_factory=list)
    layers: list[int] | None = None
    router: str = "softmax"
    router_bias: bool = False
    norm_topk_prob: bool = True
    routed_scaling_factor: int | float = 1.0
    router_jitter_noise: int | float = 0.0
    num_groups: int = 1
    topk_groups: int | None = None
    if TYPE_CHECKING:  # what it is once `__post_init__` has asked the router
        balance: str = ""
    else:
        balance: str | None = None
    bias_update_rate: int | float = 1e-3
    expert_capacity: int | float | None = None
    capacity_overflow: str = "reroute"
    capacity_scope: str = "sequence"
    capacity_in_eval: bool = False
    adaptive_experts: bool = False
    adaptive_rounding: str = "ceil"
    mean_experts: int | float | None = None
    gate: str = "softmax"
    closed: bool = False

    def __post_init__(self) -> None:
        for item in fields(self):
            value, kind = getattr(self, item.name), item.type.__name__ if type(item.type) is type else item.type
            try:
                type_validator(item.name, value, item.type)
            except TypeError as error:
                raise ValueError(f"expert bank {self.name!r}: {item.name}={value!r} must be of type {kind}") from error
            if isinstance(value, float) and not isfinite(value):
                raise ValueError(f"expert bank {self.name!r}: {item.name}={value} must be finite")
        if self.balance is None:  # an unknown router is named by `validate`
            object.__setattr__(self, "balance", ROUTERS.get(self.router, "switch"))

    @property
    def has_own_gate(self) -> bool:
        return self.gate == "own"

    @property
    def has_balance_loss(self) -> bool:
        return self.balance not in ("bias", "none")

    def layers_among(self, sparse_layers: list[int]) -> list[int]:
        """The layers the bank lives in, in rising order."""
        return [layer for layer in sparse_layers if self.layers is None or layer in self.layers]

    def of_layer(self, layer: int, sparse_layers: list[int]) -> "LayerBankConfig":
        """The bank as it stands in one of its layers."""
        count = self.num_experts
        if isinstance(count, list):
            count = count[self.layers_among(sparse_layers).index(layer)]
        return LayerBankConfig(name=self.name, **self.to_dict() | {"num_experts": count})

    def limits_capacity(self, is_training: bool) -> bool:
        """Whether experts can be full."""
        return self.expert_capacity is not None and (is_training or self.capacity_in_eval)

    def to_dict(self) -> dict[str, Any]:
        """The bank as it stands in `config.expert_banks[name]`: every field but the name."""
        values = asdict(self)
        del values["name"]
        return values

    def validate(self, sparse_layers: list[int], of_model: Collection[str] = tuple(MODALITY_IDS)) -> None:
        """Raise ValueError, naming the bank and both numbers, for anything that no model could be built from.

        Args:
            of_model: the modalities of the model. A bank may name others besides, as one from another model does.
        """
        where = f"expert bank {self.name!r}"
        if not self.name.isidentifier():
            raise ValueError(f"{where}: a bank's name must be a Python identifier, since parameters carry it")
        if hasattr(nn.ModuleDict, self.name) or self.name in PEFT_NAMES or self.name.startswith("lora_"):
            raise ValueError(f"{where}: torch or PEFT uses this name for a part of its own; give the bank another")
        if not self.modalities:
            raise ValueError(f"{where}: `modalities` is empty; choose from {list(MODALITY_IDS)}")
        for modality in self.modalities:
            check_name(where, "modality", modality, MODALITY_IDS)
        # One in common is enough: a bank may come from a model with more modalities than this one.
        if not set(self.modalities) & set(of_model):
            raise ValueError(
                f"{where}: it takes {self.modalities} but the model has {list(of_model)}; leave the bank out, or name "
                "its modality in the `modalities` of the text configuration"
            )
        if len(set(self.modalities)) != len(self.modalities):
            raise ValueError(f"{where}: `modalities` names one twice: {self.modalities}")
        check_name(where, "router", self.router, ROUTERS)
        check_name(where, "balance", self.balance, BALANCES)
        check_name(where, "capacity_overflow", self.capacity_overflow, OVERFLOWS)
        check_name(where, "capacity_scope", self.capacity_scope, CAPACITY_SCOPES)
        check_name(where, "adaptive_rounding", self.adaptive_rounding, ROUNDINGS)
        check_name(where, "gate", self.gate, GATES)
        for layer in self.layers or []:
            if layer not in sparse_layers:
                raise ValueError(f"{where}: layer {layer} is not a sparse layer; the sparse layers are {sparse_layers}")
        if not isinstance(self.num_experts, list):
            # The same number in all layers: the rules of a layer are checked once.
            LayerBankConfig(**vars(self)).validate_layer(where)
            return
        layers = self.layers_among(sparse_layers)
        if len(self.num_experts) != len(layers):
            raise ValueError(
                f"{where}: num_experts={self.num_experts} has {len(self.num_experts)} numbers for the {len(layers)} "
                f"layers {layers}"
            )
        for layer in layers:
            self.of_layer(layer, sparse_layers).validate_layer(f"{where}, layer {layer}")


@dataclass(frozen=True, kw_only=True)
class LayerBankConfig(ExpertBankConfig):
    """A bank as it stands in one layer, which is what modules are built from: `num_experts` is a number."""

    num_experts: int

    def validate_layer(self, where: str) -> None:
        """The rules that hold in each layer; raises as `validate` does."""
        self._validate_sizes(where)
        self._validate_routing(where)

    def _validate_sizes(self, where: str) -> None:
        limits = {"num_experts": MAX_EXPERTS, "intermediate_size": MAX_EXPERT_WIDTH, "expert_depth": MAX_EXPERT_DEPTH}
        check_range(self, {name: (1, most) for name, most in limits.items()}, where)
        # A lone expert whose bank has its own gate still leaves a choice: how much of it is added.
        if self.num_experts == 1 and not self.has_own_gate:
            raise ValueError(
                f"{where}: num_experts=1 leaves a router nothing to choose from; a feed-forward that sees every token "
                "is shared_expert_intermediate_size, or a layer of type 'dense'"
            )
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"{where}: num_experts_per_tok={self.num_experts_per_tok} must be between 1 and "
                f"num_experts={self.num_experts}"
            )

    def _validate_routing(self, where: str) -> None:
        if not self.routed_scaling_factor > 0:
            raise ValueError(f"{where}: routed_scaling_factor={self.routed_scaling_factor} must be positive")
        if not 0 <= self.router_jitter_noise < 1:
            raise ValueError(f"{where}: router_jitter_noise={self.router_jitter_noise} must be at least 0 and below 1")
        if not self.bias_update_rate > 0:
            raise ValueError(f"{where}: bias_update_rate={self.bias_update_rate} must be positive")
        if self.num_groups < 1 or self.num_experts % self.num_groups:
            raise ValueError(f"{where}: num_groups={self.num_groups} does not divide num_experts={self.num_experts}")
        if self.topk_groups is not None:
            if not 1 <= self.topk_groups <= self.num_groups:
                raise ValueError(f"{where}: topk_groups={self.topk_groups} is outside 1..num_groups={self.num_groups}")
            # A token that may not fill its K slots would be routed to closed experts.
            open_experts = self.topk_groups * self.num_experts // self.num_groups
            if open_experts < self.num_experts_per_tok:
                raise ValueError(
                    f"{where}: topk_groups={self.topk_groups} of num_groups={self.num_groups} leave {open_experts} "
                    f"experts to choose num_experts_per_tok={self.num_experts_per_tok} from"
                )
        capacity = self.expert_capacity
        if capacity is not None and not capacity > 0:
            raise ValueError(
                f"{where}: expert_capacity={capacity} must be a positive number of tokens (int) or a positive factor "
                "(float); leave it out for no limit"
            )
        if capacity is None and self.capacity_in_eval:
            raise ValueError(f"{where}: capacity_in_eval=True needs an expert_capacity, which is None")
        if self.capacity_scope == "batch" and (capacity is None or self.capacity_in_eval):
            raise ValueError(
                f"{where}: capacity_scope='batch' needs an expert_capacity, found {capacity}, in training alone, found "
                f"capacity_in_eval={self.capacity_in_eval}: an answer must not depend on batch mates"
            )
        if self.adaptive_experts and self.num_experts_per_tok == 1:
            raise ValueError(
                f"{where}: adaptive_experts chooses between 1 and num_experts_per_tok=1 experts, which is no choice"
            )
        if not self.adaptive_experts and (self.mean_experts is not None or self.adaptive_rounding != "ceil"):
            raise ValueError(
                f"{where}: mean_experts={self.mean_experts} and adaptive_rounding={self.adaptive_rounding!r} are of "
                "adaptive_experts, which is False"
            )
        # Rounded down, no expert is ever used in part, and a score that changes nothing learns nothing.
        if self.mean_experts is not None and not (
            1 <= self.mean_experts <= self.num_experts_per_tok and self.adaptive_rounding == "ceil"
        ):
            raise ValueError(
                f"{where}: mean_experts={self.mean_experts} must lie between 1 and num_experts_per_tok="
                f"{self.num_experts_per_tok}, with adaptive_rounding='ceil', found {self.adaptive_rounding!r}"
            )


def check_name(where: str, what: str, value: object, known: Collection[str]) -> None:
    """Raise ValueError, with the nearest name, for a name that is not known."""
    if value not in known:
        hint = get_close_matches(str(value), list(known), n=1)
        meant = f"; did you mean {hint[0]!r}?" if hint else ""
        raise ValueError(f"{where}: unknown {what} {value!r}{meant}; choose from {list(known)}")


def preset_banks(
    preset: str, sparse_layers: list[int], modalities: Collection[str] = tuple(MODALITY_IDS)
) -> dict[str, dict[str, Any]]:
    """The banks that a preset stands for in a model of some modalities.

    `uniform`: one bank a modality and one for all, in every sparse layer. `specific_then_common`: the banks of one
    modality in the lower half of the sparse layers, the common bank in the upper half.

    Raises:
        ValueError: an unknown preset, or too few sparse layers to have two halves.
    """
    check_name("ChorusTextConfig", "preset of expert_banks", preset, PRESETS)
    if preset == "uniform":
        return {name: {} for name in (*modalities, "common")}
    if len(sparse_layers) < 2:
        raise ValueError(f"ChorusTextConfig: expert_banks={preset!r} needs 2 sparse layers, found {len(sparse_layers)}")
    # Early layers see modalities apart, late ones see what they have in common.
    half = len(sparse_layers) // 2
    banks: dict[str, dict[str, Any]] = {name: {"layers": sparse_layers[:half]} for name in modalities}
    return banks | {"common": {"layers": sparse_layers[half:]}}


def read_expert_banks(banks: Mapping[str, Mapping[str, Any]], defaults: Mapping[str, Any]) -> list[ExpertBankConfig]:
    """Turn `config.expert_banks` into bank configurations, in the order of their names; missing sizes come from
    `defaults`, and so do the modalities of a bank that is not named after one.

    Raises:
        ValueError: a bank has a key that does not exist, which would be ignored in silence, or a value of another type.
    """
    known = [f.name for f in fields(ExpertBankConfig) if f.name != "name"]
    result = []
    # The columns of the bank gate follow this order, and `config.json` is written with sorted keys: any other order
    # would be lost, and the columns exchanged, by saving and loading.
    for name, values in sorted(banks.items()):
        for key in values:
            check_name(f"expert bank {name!r}", "key", key, known)
        every = defaults.get("modalities", list(MODALITY_IDS))
        named_after = [name] if name in MODALITY_IDS else list(every)
        result.append(ExpertBankConfig(name=name, **{**defaults, "modalities": named_after, **values}))
    return result
