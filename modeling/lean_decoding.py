"""Decoding in `generate` with few operations: one-token steps on the CPU pass the modules by.

[`lean_decoding`] opens while `generate` decodes. It reads the model once; where every module of the decoder is exactly
one that `lean_layers` writes out, steps of one text token run through [`LeanDecoder`], on the same parameters and the
same cache. Where one is not (a hook, an adapter, a quantised weight, a shard, another attention backend), or where more
than logits is asked for, the modules run as ever. Routers decide in Python numbers (`one_token_choice`); a sparse layer
with experts of another kind is called as a module within the lean step.

Shape suffixes: D hidden size, C head size.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticCache,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from .attention import rotary_tables
from .configuration_banks import ExpertBankConfig
from .layer_skip import threshold_logit
from .lean_checks import can_decode, is_plain, is_plain_mixture
from .lean_layers import FeedForward, LeanAttention, LeanBanks, LeanDense, LeanNorm, LeanSkipGate, ModuleFeedForward
from .row_products import multiply, operand, weight_operand
from .text_model import DenseFeedForward

CACHES = (DynamicCache, StaticCache)
CACHE_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer)
# Positions whose rotations are computed at once, and the kinds of rotation that depend on the length of the sequence.
POSITIONS = 128
CHANGING_ROTATIONS = ("dynamic", "longrope")


class LeanDecoder:
    """Steps of one text token through a generative model.

    Args:
        model: [`ChorusForConditionalGeneration`] that [`can_decode`] accepts.
    """

    def __init__(self, model: Any):
        text, config = model.model.language_model, model.config.text_config
        self.model = model
        self.embedding: Tensor = text.embed_tokens.weight
        self.rotary = text.rotary_emb
        normed = operand(torch.empty_like(text.norm.weight))
        self.final_norm = LeanNorm(text.norm, normed)
        has_plain_head = is_plain(model.lm_head, self.embedding.dtype) and model.lm_head.bias is None
        self.head = weight_operand(model.lm_head.weight) if has_plain_head else None
        self.media = {model.config.image_token_id, model.config.audio_token_id}
        self.kinds = config.layer_types
        self.tables: list[tuple[Tensor, Tensor]] = []
        self.first_position = 0
        self.layers = [
            (
                LeanNorm(layer.input_layernorm, normed),
                LeanAttention(layer.self_attn),
                LeanNorm(layer.post_attention_layernorm, normed),
                None if layer.skip_gate is None else LeanSkipGate(layer.skip_gate),
                self._feed_forward(layer.mlp, text.banks),
            )
            for layer in text.layers
        ]

    def _feed_forward(self, mlp: Any, banks: Mapping[str, ExpertBankConfig]) -> FeedForward:
        if type(mlp) is DenseFeedForward:
            return LeanDense(mlp)
        if not is_plain_mixture(mlp, self.embedding.dtype):
            return ModuleFeedForward(mlp, banks)
        return LeanBanks(mlp, {name for name, bank in banks.items() if "text" in bank.modalities and not bank.closed})

    def step(
        self,
        mm_token_type_ids: Tensor | None,
        input_ids: Tensor,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | dict[str, Tensor | None] | None = None,
        position_ids: Tensor | None = None,
        use_cache: bool | None = None,
        skip_threshold: float | None = None,
        exit_layer: int | None = None,
        **others: Any,
    ) -> Tensor | None:
        """Last hidden state `(1, 1, D)` of one text token, with the cache one position longer. None, and nothing done,
        if the inputs are anything else or ask for anything more."""
        if any(value is not None and value is not False for value in others.values()):
            return None
        if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or not self._knows(past_key_values):
            return None
        token = int(input_ids)
        is_media = token in self.media or (mm_token_type_ids is not None and mm_token_type_ids.tolist() != [[0]])
        total = int(past_key_values.get_seq_length()) + 1  # type: ignore[union-attr]
        masks, first = self._read_mask(attention_mask, total)
        if token < 0 or is_media or first is None or (position_ids is not None and position_ids.shape != (1, 1)):
            return None
        position = total - 1 if position_ids is None else int(position_ids)
        layers = self.layers[:exit_layer]
        open_above = threshold_logit(skip_threshold)
        return self._run(token, position, past_key_values, first, total, masks, layers, open_above).view(1, 1, -1)

    def logits(self, states_11D: Tensor) -> Tensor:
        """What the head makes of the last hidden state `(1, 1, D)`."""
        is_module = self.head is None or self.head.array is None or states_11D.dtype != self.embedding.dtype
        if is_module or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return self.model.lm_head(states_11D)
        out = states_11D.new_empty(1, 1, len(self.head.tensor))
        multiply(self.head, operand(states_11D.view(-1)), operand(out.view(-1)))
        return out

    def _knows(self, cache: Any) -> bool:
        """Whether the cache is a stock one that holds one sequence already."""
        return (
            type(cache) in CACHES
            and not cache.offloading
            and len(cache.layers) == len(self.layers)
            and all(
                type(layer) in CACHE_LAYERS
                and layer.is_initialized
                and layer.keys.shape[0] == 1
                and layer.keys.dtype == self.embedding.dtype
                for layer in cache.layers
            )
        )

    def _read_mask(self, attention_mask: Any, total: int) -> tuple[dict[str, Tensor | None], int | None]:
        """Masks by kind of layer, and how many padding tokens stand in front; None for padding elsewhere."""
        if isinstance(attention_mask, dict):
            return attention_mask, 0
        masks = dict.fromkeys(self.kinds)
        if attention_mask is None:
            return masks, 0
        if attention_mask.shape != (1, total):
            return masks, None
        real = int(attention_mask.count_nonzero())
        is_left = real == total or not attention_mask[0, : total - real].any()
        return masks, total - real if is_left and real else None

    def _run(
        self,
        token: int,
        position: int,
        cache: Cache,
        first: int,
        total: int,
        masks: dict[str, Tensor | None],
        layers: Sequence[Any],
        open_above: float,
    ) -> Tensor:
        residual_D = operand(self.embedding[token].clone())
        tables = self._tables(position)
        of_layers = zip(layers, cache.layers, self.kinds, strict=False)
        for (norm, attention, feed_norm, gate, feed), layer, kind in of_layers:
            attention(residual_D, norm(residual_D.tensor), tables, layer, first, total, masks[kind])
            states_D = feed_norm(residual_D.tensor)
            if gate is None or gate(states_D) > open_above:
                feed(residual_D, states_D)
        return self.final_norm(residual_D.tensor).tensor.clone()

    def _tables(self, position: int) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines `(C,)` of a position; made for many positions at once where they are fixed."""
        index = position - self.first_position
        if not 0 <= index < len(self.tables):
            count = 1 if self.rotary.rope_type in CHANGING_ROTATIONS else POSITIONS
            position_ids = torch.arange(position, position + count).unsqueeze(0)
            cos_BHSC, sin_BHSC = rotary_tables(*self.rotary(self.embedding, position_ids=position_ids))
            self.tables = list(zip(cos_BHSC[0, 0], sin_BHSC[0, 0], strict=True))
            self.first_position, index = position, 0
        return self.tables[index]


class _Decoding:
    """A model that is decoding. It is read at its first step: `generate` of one token, or of a batch, has none."""

    def __init__(self, model: Any):
        self.model = model

    @cached_property
    def decoder(self) -> LeanDecoder | None:
        return LeanDecoder(self.model) if can_decode(self.model) else None


_decoding: ContextVar[_Decoding | None] = ContextVar("lean_decoding", default=None)


@contextmanager
def lean_decoding(model: Any) -> Iterator[None]:
    """Within it, and within this thread, a [`LeanDecoder`] takes the model's one-token steps, if the model allows."""
    token = _decoding.set(_Decoding(model))
    try:
        yield
    finally:
        _decoding.reset(token)


def lean_decoder(model: Any, input_ids: Tensor | None) -> LeanDecoder | None:
    """The decoder that is open for this very model, if one is and the input is one token of one sample."""
    if torch.compiler.is_compiling() or input_ids is None or input_ids.shape != (1, 1):
        return None
    decoding = _decoding.get()
    return decoding.decoder if decoding is not None and decoding.model is model else None
