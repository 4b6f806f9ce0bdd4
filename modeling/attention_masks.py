"""Who sees whom: one mask per layer type, built once per forward; for long prefills a rule.

Shape suffixes: B batch, Q queries, K keys.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers.cache_utils import Cache
from transformers.masking_utils import (
    create_bidirectional_mask,
    create_bidirectional_sliding_window_mask,
    create_causal_mask,
    create_sliding_window_causal_mask,
)

from .configuration_services import SERVICES
from .configuration_text import WINDOW_TYPES, ChorusTextConfig
from .modeling_outputs import CACHE

BLOCK_LOCAL = "block_local"
# What a decoder is given: padding `(B, past + S)`, a mask of its own form by layer type, or nothing.
Masks = Tensor | dict[str, Any] | None
# Attention implementations whose masks can show global tokens to every query.
WITH_GLOBAL_TOKENS = ("eager", "sdpa", "flex_attention", BLOCK_LOCAL)


class MaskRule:
    """The mask of a sliding layer as a rule instead of a matrix: `import chorus_moe` makes them (`LocalMask`)."""


def is_packed(attention_mask: Masks, position_ids: Tensor | None) -> bool:
    """Whether positions restart within a row, which then holds several sequences; a mask says otherwise."""
    # Positions with gaps are one sequence. A graph cannot look at them, so it takes every row for one.
    if attention_mask is not None or position_ids is None or torch.compiler.is_compiling():
        return False
    return bool((position_ids.diff(dim=-1) < 1).any())


def build_masks(
    config: ChorusTextConfig,
    inputs_embeds: Tensor,
    attention_mask: Tensor | dict[str, Any] | None,
    past_key_values: Cache | None,
    position_ids: Tensor | None,
) -> dict[str, Any]:
    """Layer type -> mask, in the form that the attention implementation takes.

    Args:
        inputs_embeds: `(B, Q, D)`, global tokens of a bidirectional model included.
        attention_mask: `(B, past + Q)`, 1 for real tokens; a mask `(B, 1, Q, K)`; or what this function returns.

    Raises:
        ValueError: global tokens with an attention implementation that cannot show them to every query; packed
            sequences, or a mask that is not `(B, S)`, with memory tokens.
    """
    # Made before, by `create_masks_for_generate` for caches that can be compiled.
    if isinstance(attention_mask, dict):
        return attention_mask
    num_global, name = config.num_global_tokens, config._attn_implementation
    if num_global and name not in WITH_GLOBAL_TOKENS:
        raise ValueError(f"num_global_tokens={num_global} with {name!r} attention; it takes {WITH_GLOBAL_TOKENS}")
    if config.num_memory_tokens:
        if attention_mask is not None and attention_mask.ndim != 2:
            raise ValueError("a model with memory tokens takes an attention_mask (batch, sequence) and no other form")
        if past_key_values is None and is_packed(attention_mask, position_ids):
            raise ValueError("packed sequences would read each other through memory tokens; pad them instead")
    inputs: dict[str, Any] = {
        "config": config,
        "inputs_embeds": inputs_embeds,
        "attention_mask": attention_mask,
        CACHE: past_key_values,
        "position_ids": position_ids,
    }
    masks: dict[str, Any] = {}
    if "full_attention" in config.layer_types:
        create = create_causal_mask if config.is_causal else create_bidirectional_mask
        masks["full_attention"] = create(**inputs)
    windows = [kind for kind in WINDOW_TYPES if kind in config.layer_types]
    if windows:
        # A rule where there is one: a long prefill's dense mask costs more than the attention that its window spares.
        rule = SERVICES["local_mask"](**inputs) if "local_mask" in SERVICES else None
        masks |= dict.fromkeys(windows, rule or _dense_sliding_mask(num_global, inputs))
    return masks


def _dense_sliding_mask(num_global: int, inputs: dict[str, Any]) -> Any:
    if not inputs["config"].is_causal:
        return create_bidirectional_sliding_window_mask(
            **inputs, or_mask_function=_sees_global_tokens(num_global) if num_global else None
        )
    # A mask that is skipped (None) could not get columns for the global keys.
    mask = create_sliding_window_causal_mask(**inputs, allow_is_causal_skip=not num_global)
    return _with_global_keys(mask, num_global) if num_global else mask


def _sees_global_tokens(num_global: int) -> Any:
    def overlay(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query < num_global) | (key < num_global)

    return overlay


def _with_global_keys(mask: Any, num_global: int) -> Any:
    """A mask with columns in front for keys that every query sees."""
    if not isinstance(mask, BlockMask):
        is_seen: bool | float = True if mask.dtype == torch.bool else 0.0
        return F.pad(mask, (num_global, 0), value=is_seen)
    inner, (batch, _, queries, keys) = mask.mask_mod, mask.shape

    # Both sides are computed for every key, so the inner rule is asked about global keys, too: at index 0, not below.
    def shifted(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key < num_global) | inner(batch, head, query, (key - num_global).clamp(min=0))

    device = mask.kv_num_blocks.device
    return create_block_mask(shifted, batch, None, queries, keys + num_global, device=device)
