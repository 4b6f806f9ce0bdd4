"""Total and active parameters by bank, tower and modality, counted on the meta device.

A parameter is active for a modality if one token of that modality is multiplied by it: a bank counts with the share
K / E of its experts, the embedding table not at all (a lookup), and an encoder for its own modality only.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from chorus_moe.modeling.configuration_modalities import ENCODED, MODALITY_IDS
from chorus_moe.modeling.modeling_generation import ChorusForConditionalGeneration
from chorus_moe.surgery.parts import bank_tensor
from chorus_moe.surgery.printing import Table
from chorus_moe.surgery.report import numbers_in


@dataclass(frozen=True)
class ParameterReport:
    """Numbers of parameters.

    Args:
        total: all parameters, shared ones once.
        active: modality -> parameters that work on one of its tokens.
        parts: `embeddings`, `vision_tower`, `audio_tower`, `connectors`, `attention`, `dense_mlp`, `shared_experts`,
            `bank_gates`, `skip_gates`, `norms`, `heads` -> parameters.
        banks: bank -> {"total", "active"}, summed over its layers; active is what one token of the bank uses.
    """

    total: int
    active: dict[str, int]
    parts: dict[str, int]
    banks: dict[str, dict[str, int]]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{'total':<24}{self.total:>20,}"]
        lines += [f"{'active for ' + name:<24}{count:>20,}" for name, count in self.active.items()]
        lines += ["", f"{'part':<24}{'parameters':>20}"]
        lines += [f"{name:<24}{count:>20,}" for name, count in self.parts.items() if count]
        lines += ["", f"{'expert bank':<24}{'parameters':>20}{'active a token':>20}"]
        lines += [f"{name:<24}{bank['total']:>20,}{bank['active']:>20,}" for name, bank in self.banks.items()]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        rows = [("total", self.total), *((f"active for {name}", count) for name, count in self.active.items())]
        rows += [(name, count) for name, count in self.parts.items() if count]
        banks = [(name, bank["total"], bank["active"]) for name, bank in self.banks.items()]
        return (
            Table(("part", "parameters"), rows).to_html()
            + Table(("expert bank", "parameters", "active a token"), banks).to_html()
        )


def parameter_report(config_or_model: PreTrainedConfig | nn.Module, expert_width_share: float = 1.0) -> ParameterReport:
    """Count a built Chorus model of any head, or what the generative model of a [`ChorusConfig`] will have: that one is
    built on the meta device and takes no memory.

    Args:
        expert_width_share: what is active of an expert where a call asks for this share, one of `expert_width_shares`.

    Raises:
        ValueError: a share that the model does not have.
    """
    config: Any = getattr(config_or_model, "config", config_or_model)
    shares = config.text_config.expert_width_shares or [1.0]
    if expert_width_share not in shares:
        raise ValueError(f"expert_width_share={expert_width_share} is none of expert_width_shares={shares}")
    if isinstance(config_or_model, nn.Module):
        return _count(config_or_model, expert_width_share)
    with torch.device("meta"):
        return _count(ChorusForConditionalGeneration(config_or_model), expert_width_share)


def _count(model: nn.Module, width_share: float) -> ParameterReport:
    config: Any = model.config
    text = config.text_config
    banks = {layer: {bank.name: bank for bank in text.banks_of_layer(layer)} for layer in text.sparse_layers}
    modalities: list[str] = config.modalities
    active = dict.fromkeys(modalities, 0.0)
    parts: dict[str, int] = {}
    by_bank: dict[str, dict[str, float]] = {name: {"total": 0, "active": 0} for name in text.expert_banks}
    total = 0
    for name, parameter in model.named_parameters():
        size = numbers_in(parameter)
        total += size
        # Names, not modules: the same code counts every head and a model on the meta device.
        place = bank_tensor(name)
        if place is None:
            part = part_of(name)
            parts[part] = parts.get(part, 0) + size
            for modality in modalities:
                active[modality] += size * _works_on(name, modality, config)
            continue
        bank = banks[place.layer][place.bank]
        # A token visits K of E experts. Router and gate see every token of the bank.
        is_expert = place.part.startswith(("experts.", "deeper_experts."))
        share = width_share * bank.num_experts_per_tok / bank.num_experts if is_expert else 1.0
        by_bank[place.bank]["total"] += size
        by_bank[place.bank]["active"] += size * share
        for modality in set(bank.modalities) & set(modalities):
            active[modality] += size * share
    return ParameterReport(
        total=total,
        active={name: round(count) for name, count in active.items()},
        parts=parts,
        banks={name: {key: round(value) for key, value in bank.items()} for name, bank in by_bank.items()},
    )


def part_of(name: str) -> str:
    """The part of [`ParameterReport`] that a parameter outside of banks belongs to."""
    for row in ENCODED:
        if row.tower in name:
            return row.tower
    for key, part in (
        ("_connector.", "connectors"),
        ("language_model.global_tokens", "embeddings"),
        ("embed_tokens", "embeddings"),
        ("norm", "norms"),
        (".self_attn.", "attention"),
        (".shared_experts.", "shared_experts"),
        (".bank_gate.", "bank_gates"),
        (".skip_gate.", "skip_gates"),
        (".mlp.", "dense_mlp"),
    ):
        if key in name:
            return part
    return "heads"


def _works_on(name: str, modality: str, config: Any) -> float:
    """1 if a token of the modality is multiplied by the parameter, else 0."""
    for row in ENCODED:
        if row.tower in name or row.connector in name:
            return float(modality == row.name)
    if "embed_tokens" in name:
        # As the head, a tied table is multiplied by every token; as the embedding it is only looked up.
        return float(config.tie_word_embeddings)
    # Cross-modal layers have projections by modality, `q_proj.image.`; all other parameters serve everyone.
    owners = [m for m in MODALITY_IDS if f"_proj.{m}." in name]
    return float(not owners or modality in owners)
