"""The parts of a model as modules from tensors to tensors, which `torch.export` turns into graphs.

Unusual here:
- a model is several graphs: what encodes a picture runs once a picture, what decodes runs once a token;
- the caller puts image and audio tokens in the place of their placeholders, since a graph has no loop over samples.

Shape suffixes: B batch, S new tokens, P cached tokens, D hidden size, N images or clips.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from chorus_moe.modeling.configuration_modalities import ENCODED, MODALITY_IDS
from chorus_moe.modeling.depth_exits import pool_tokens
from chorus_moe.modeling.modeling_base import ChorusPreTrainedModel
from chorus_moe.modeling.modeling_chorus import ChorusModel
from chorus_moe.modeling.modeling_generation import ChorusForConditionalGeneration
from chorus_moe.modeling.modeling_heads import ChorusForContrastive, ChorusForSequenceClassification, ChorusHead
from chorus_moe.modeling.modeling_outputs import CACHE
from chorus_moe.surgery.report import refuse_adapters

EMBED_TOKENS, DECODER = "embed_tokens", "decoder"
# Sizes of the examples that graphs are traced with: 0 and 1 would be taken for constants.
BATCH, NEW, CACHED, SECONDS = 2, 5, 3, 0.5
SEQUENCES = {0: "batch", 1: "tokens"}


class Part(NamedTuple):
    """One graph.

    Args:
        name: of its file.
        module: takes the inputs in order, and returns the outputs.
        inputs: an example of each.
        axes: input -> axis -> name of a size that may change.
        outputs: their names.
    """

    name: str
    module: nn.Module
    inputs: dict[str, Tensor]
    axes: dict[str, dict[int, str]]
    outputs: list[str]


class TokenEmbedding(nn.Module):
    """`input_ids (B, S)` to `inputs_embeds (B, S, D)`; in the place of placeholders stands what is to be replaced."""

    def __init__(self, model: ChorusModel):
        super().__init__()
        self.table = model.get_input_embeddings()
        self.placeholders = [getattr(model.config, row.token_id) for row in ENCODED]

    def forward(self, input_ids: Tensor) -> Tensor:
        for token in self.placeholders:
            if token is not None:
                input_ids = input_ids.masked_fill(input_ids == token, 0)
        return self.table(input_ids)


class ImageEncoder(nn.Module):
    """`pixel_values (N, C, H, W)` to `image_tokens (N, tokens, D)`."""

    def __init__(self, model: ChorusModel):
        super().__init__()
        self.tower, self.connector = model.vision_tower, model.vision_connector

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.connector(self.tower(pixel_values=pixel_values).last_hidden_state)


class AudioEncoder(nn.Module):
    """`input_features (N, frames, bins)` and their mask to `audio_tokens (N, tokens, D)` and theirs. Padding is on the
    right."""

    def __init__(self, model: ChorusModel):
        super().__init__()
        self.tower, self.connector = model.audio_tower, model.audio_connector

    def forward(self, input_features: Tensor, input_features_mask: Tensor) -> tuple[Tensor, Tensor]:
        encoded = self.tower(input_features=input_features, input_features_mask=input_features_mask)
        return self.connector(encoded.last_hidden_state, encoded.attention_mask)


class CachedDecoder(nn.Module):
    """New tokens behind cached ones, to the logits of the last, `(B, 1, vocabulary)`, and the longer cache: keys and
    values of each layer in turn."""

    def __init__(self, model: ChorusForConditionalGeneration):
        super().__init__()
        self.decoder, self.lm_head = model.model.language_model, model.lm_head

    def forward(
        self, inputs_embeds: Tensor, attention_mask: Tensor, modality: Tensor, position_ids: Tensor, *past: Tensor
    ) -> tuple[Tensor, ...]:
        # Without the configuration it keeps all keys, also of layers with a window: the mask hides what is outside.
        cache = DynamicCache(list(zip(past[::2], past[1::2], strict=True)))
        outputs = self.decoder(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            mm_token_type_ids=modality,
            use_cache=True,
            **{CACHE: cache},
        )
        present = [states for layer in outputs[CACHE].layers for states in (layer.keys, layer.values)]
        return self.lm_head(outputs.last_hidden_state[:, -1:]), *present


class PoolingDecoder(nn.Module):
    """Whole sequences to one vector each: logits `(B, labels)`, or a unit vector of one modality."""

    def __init__(self, model: ChorusHead, output: nn.Module, modality: str | None = None):
        super().__init__()
        self.decoder, self.output, self.modality = model.model.language_model, output, modality

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor, modality: Tensor | None = None) -> Tensor:
        if self.modality is not None:
            modality = torch.full_like(attention_mask, MODALITY_IDS[self.modality])
        states = self.decoder(
            inputs_embeds=inputs_embeds, attention_mask=attention_mask, mm_token_type_ids=modality, use_cache=False
        ).last_hidden_state
        vectors = self.output(pool_tokens(states, attention_mask, self.decoder.config.is_causal))
        return vectors if self.modality is None else F.normalize(vectors, dim=-1)


def parts_of(model: ChorusPreTrainedModel) -> list[Part]:
    """The graphs of a model: token embedding, encoders, and the decoder with its head.

    Raises:
        ValueError: a model, or a setting of it, that no graph can hold; says what to do.
    """
    check_exportable(model)
    inner: ChorusModel = model.model
    ids = torch.randint(inner.config.text_config.vocab_size, (BATCH, NEW))
    found = [Part(EMBED_TOKENS, TokenEmbedding(inner), {"input_ids": ids}, {"input_ids": SEQUENCES}, ["inputs_embeds"])]
    if inner.vision_tower is not None:
        found.append(image_part(inner))
    if inner.audio_tower is not None:
        found.append(audio_part(inner))
    inputs = {
        "inputs_embeds": torch.randn(BATCH, NEW, inner.config.text_config.hidden_size),
        "attention_mask": torch.ones(BATCH, NEW, dtype=torch.long),
        "mm_token_type_ids": torch.zeros_like(ids),
    }
    if isinstance(model, ChorusForConditionalGeneration):
        return [*found, generating_part(model, inputs)]
    axes = dict.fromkeys(inputs, SEQUENCES)
    if isinstance(model, ChorusForSequenceClassification):
        return [*found, Part(DECODER, PoolingDecoder(model, model.score), inputs, axes, ["logits"])]
    del inputs["mm_token_type_ids"], axes["mm_token_type_ids"]
    return found + [
        Part(f"{name}_{DECODER}", PoolingDecoder(model, output, name), inputs, axes, [f"{name}_embeds"])
        for name, output in model.projections.items()
    ]


def image_part(model: ChorusModel) -> Part:
    config: Any = model.config.vision_config
    pixels = torch.randn(BATCH, config.num_channels, config.image_size, config.image_size)
    axes = {"pixel_values": {0: "images"}}
    return Part("image_encoder", ImageEncoder(model), {"pixel_values": pixels}, axes, ["image_tokens"])


def audio_part(model: ChorusModel) -> Part:
    config: Any = model.config.audio_config
    # Whisper's own features fill its window, always.
    is_fixed = config.feature_type == "whisper"
    seconds = config.max_seconds if is_fixed else min(SECONDS, config.max_seconds)
    frames = round(seconds * config.sampling_rate / config.hop_length)
    inputs = {
        "input_features": torch.randn(BATCH, frames, config.num_mel_bins),
        "input_features_mask": torch.ones(BATCH, frames, dtype=torch.long),
    }
    axes = dict.fromkeys(inputs, {0: "clips"} if is_fixed else {0: "clips", 1: "frames"})
    return Part("audio_encoder", AudioEncoder(model), inputs, axes, ["audio_tokens", "audio_tokens_mask"])


def generating_part(model: ChorusForConditionalGeneration, inputs: dict[str, Tensor]) -> Part:
    text = model.config.text_config
    shape = (BATCH, text.num_key_value_heads, CACHED, text.head_dim)
    names = [f"{layer}.{kind}" for layer in range(text.num_hidden_layers) for kind in ("key", "value")]
    whole = torch.ones(BATCH, CACHED + NEW, dtype=torch.long)
    positions = torch.arange(CACHED, CACHED + NEW).expand(BATCH, NEW)
    past = {f"past_key_values.{name}": torch.randn(shape) for name in names}
    inputs = {**inputs, "attention_mask": whole, "position_ids": positions, **past}
    axes: dict[str, dict[int, str]] = dict.fromkeys(inputs, SEQUENCES)
    axes |= {"attention_mask": {0: "batch", 1: "all_tokens"}, **dict.fromkeys(past, {0: "batch", 2: "cached_tokens"})}
    return Part(DECODER, CachedDecoder(model), inputs, axes, ["logits", *(f"present.{name}" for name in names)])


def check_exportable(model: nn.Module) -> None:
    """Raises: ValueError: as in `parts_of`."""
    if not isinstance(model, ChorusForConditionalGeneration | ChorusForSequenceClassification | ChorusForContrastive):
        raise ValueError(f"{type(model).__name__} cannot be exported: merge an adapter, give a headless model a head")
    refuse_adapters(model, "export")
    if model.dtype != torch.float32 or model.device.type != "cpu":
        raise ValueError(f"export: a model in {model.dtype} on {model.device}; model.float().cpu() makes it fit")
    if model.config.exit_thresholds:
        raise ValueError(
            "export: samples leave this classifier at its exits, and a graph keeps its batch; set "
            "config.exit_thresholds = None to export all layers"
        )
    if model.config.text_config.experts_layout != "fused":
        raise ValueError("export: experts of linear layers; stack them first, fuse_experts(model)")
    limited = [bank.name for bank in model.config.text_config.banks if bank.limits_capacity(False)]
    if limited:
        raise ValueError(
            f"export: banks {limited} limit the capacity of their experts by capacity_in_eval, and how often tokens "
            "ask again depends on the data; leave capacity_in_eval out"
        )
