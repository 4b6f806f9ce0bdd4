"""How much a decoder computes on a token of a mix of text, images and sound, from its active parameters."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from chorus_moe.modeling.configuration_chorus import ChorusConfig
from chorus_moe.modeling.configuration_modalities import MODALITY_IDS
from chorus_moe.modeling.modeling_generation import ChorusForConditionalGeneration
from chorus_moe.surgery import parameter_report
from chorus_moe.surgery.parameters import ParameterReport

ENCODERS = ("vision_tower", "vision_connector", "audio_tower", "audio_connector")


@dataclass(frozen=True)
class TokenMix:
    """What the held-out questions consist of: share of each modality, and tokens that a token sees in the mean."""

    shares: dict[str, float]
    visible: float

    @classmethod
    def of(cls, batches: Sequence[Mapping[str, Any]]) -> "TokenMix":
        counts, lengths = dict.fromkeys(MODALITY_IDS, 0), []
        for batch in batches:
            real_BS: Tensor = batch["attention_mask"].bool()
            lengths += real_BS.sum(dim=-1).tolist()
            for name, value in MODALITY_IDS.items():
                counts[name] += int((real_BS & (batch["mm_token_type_ids"] == value)).sum())
        total = sum(counts.values())
        visible = sum(length * (length + 1) / 2 for length in lengths) / total
        return cls({name: count / total for name, count in counts.items()}, visible)

    def mean(self, values: Mapping[str, float]) -> float:
        return sum(share * values[name] for name, share in self.shares.items())


def active_in_decoder(config: ChorusConfig) -> tuple[ParameterReport, dict[str, float]]:
    """The report, and modality -> parameters of the decoder that work on one of its tokens, encoders left out."""
    with torch.device("meta"):
        model = ChorusForConditionalGeneration(config).model
    report = parameter_report(config)
    encoders = {
        "image": (model.vision_tower, model.vision_connector),
        "audio": (model.audio_tower, model.audio_connector),
    }
    sizes = {name: sum(p.numel() for part in parts for p in part.parameters()) for name, parts in encoders.items()}
    return report, {name: count - sizes.get(name, 0) for name, count in report.active.items()}


def decoder_mflops(config: ChorusConfig, mix: TokenMix) -> float:
    """Million floating-point operations of the decoder on a token in the mean, forward: two for each active parameter,
    and four for each token seen and each channel of the attention heads (scores, then values)."""
    text: Any = config.text_config
    _, active = active_in_decoder(config)
    attention = 4 * mix.visible * text.num_attention_heads * text.head_dim * text.num_hidden_layers
    return (2 * mix.mean(active) + attention) / 1e6
