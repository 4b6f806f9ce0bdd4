"""The configuration of one expert bank: a router and its experts, open to some modalities."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from typing import Any

# Values of `mm_token_type_ids` (transformers: 0 text, 1 image, 2 video, 3 audio). Chorus has no video encoder.
MODALITY_IDS: dict[str, int] = {"text": 0, "image": 1, "audio": 3}
ROUTERS = ("softmax",)
MAX_EXPERTS, MAX_EXPERT_WIDTH = 65_536, 1_048_576


@dataclass(frozen=True, kw_only=True)
class ExpertBankConfig:
    """One named bank of the gate over banks.

    Args:
        name: how the bank is addressed everywhere (parameters, LoRA, statistics).
        modalities: the modalities whose tokens may enter.
        num_experts: experts in the bank.
        num_experts_per_tok: experts that a token visits.
        intermediate_size: width of one expert.
        router: how experts are chosen, one of `ROUTERS`.
        layers: indices of the sparse layers that hold the bank; all sparse layers if None.
        norm_topk_prob: whether the weights of the chosen experts are divided by their sum.
    """

    name: str
    num_experts: int
    num_experts_per_tok: int
    intermediate_size: int
    modalities: list[str] = field(default_factory=list)
    router: str = "softmax"
    layers: list[int] | None = None
    norm_topk_prob: bool = True

    @property
    def is_open_to_all(self) -> bool:
        return set(self.modalities) == set(MODALITY_IDS)

    def to_dict(self) -> dict[str, Any]:
        """The bank as it stands in `config.expert_banks[name]`: every field but the name."""
        values = asdict(self)
        del values["name"]
        return values

    def validate(self, sparse_layers: list[int]) -> None:
        """Raise ValueError, naming the bank and both numbers, for anything that no model could be built from."""
        where = f"expert bank {self.name!r}"
        if not self.name.isidentifier():
            raise ValueError(f"{where}: a bank's name must be a Python identifier, since parameters carry it")
        if not self.modalities:
            raise ValueError(f"{where}: `modalities` is empty; choose from {list(MODALITY_IDS)}")
        for modality in self.modalities:
            if modality not in MODALITY_IDS:
                raise ValueError(f"{where}: unknown modality {modality!r}; choose from {list(MODALITY_IDS)}")
        if len(set(self.modalities)) != len(self.modalities):
            raise ValueError(f"{where}: `modalities` names one twice: {self.modalities}")
        if not 1 <= self.num_experts <= MAX_EXPERTS:
            raise ValueError(f"{where}: num_experts={self.num_experts} is outside 1..{MAX_EXPERTS}")
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"{where}: num_experts_per_tok={self.num_experts_per_tok} must be between 1 and "
                f"num_experts={self.num_experts}"
            )
        if not 1 <= self.intermediate_size <= MAX_EXPERT_WIDTH:
            raise ValueError(f"{where}: intermediate_size={self.intermediate_size} is outside 1..{MAX_EXPERT_WIDTH}")
        if self.router not in ROUTERS:
            raise ValueError(f"{where}: unknown router {self.router!r}; choose from {list(ROUTERS)}")
        for layer in self.layers or []:
            if layer not in sparse_layers:
                raise ValueError(f"{where}: layer {layer} is not a sparse layer; the sparse layers are {sparse_layers}")


def read_expert_banks(banks: Mapping[str, Mapping[str, Any]], defaults: Mapping[str, Any]) -> list[ExpertBankConfig]:
    """Turn `config.expert_banks` into bank configurations; missing sizes come from `defaults`.

    Banks come in the order of their names. That order is the order of the gate's columns, and a `config.json` is
    written with sorted keys: any other order would be lost, and the columns exchanged, by saving and loading.

    Raises:
        ValueError: a bank has a key that does not exist (a misspelt key would otherwise be ignored in silence).
    """
    known = {f.name for f in fields(ExpertBankConfig)} - {"name"}
    result = []
    for name, values in sorted(banks.items()):
        for key in values:
            if key not in known:
                hint = get_close_matches(key, known, n=1)
                raise ValueError(
                    f"expert bank {name!r}: unknown key {key!r}" + (f"; did you mean {hint[0]!r}?" if hint else "")
                )
        named_after = [name] if name in MODALITY_IDS else list(MODALITY_IDS)
        result.append(ExpertBankConfig(name=name, **{"modalities": named_after, **defaults, **values}))
    return result
