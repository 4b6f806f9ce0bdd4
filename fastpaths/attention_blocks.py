"""Sliding-window attention in blocks, registered with transformers as the attention implementation `block_local`.

Each block of queries meets the keys that its window reaches and the global tokens, many blocks in one call of
`scaled_dot_product_attention`: O(S * window), where a dense mask makes a window slower than no window at all.

Shape suffixes: B batch, S queries, K keys, H heads, G key-value heads, R query heads of a key head, C head size,
N blocks, Q queries of a block, W keys of its window, E the same and the global ones.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from chorus_moe.modeling.attention_masks import BLOCK_LOCAL, MaskRule, is_packed
from chorus_moe.modeling.configuration_services import SERVICES
from chorus_moe.modeling.configuration_text import WINDOW_TYPES, ChorusTextConfig
from chorus_moe.modeling.modeling_outputs import takes_cache

# Rows of queries in one call on the CPU: with few, copies of windows stay in cache. A training step keeps them all in
# memory for the backward and gains nothing from small calls.
INFERENCE_ROWS, TRAINING_ROWS = 512, 4096
# With `sdpa`, prefills longer than this many windows are worked on in blocks: below, nothing is gained.
WINDOWS_THAT_PAY = 2


@dataclass(frozen=True)
class LocalMask(MaskRule):
    """The mask of a sliding layer as a rule. The last keys are those of the queries, the first the global ones.

    Args:
        window: keys that a causal query sees, its own included; other queries see this many on either side.
        num_global_tokens: keys in front that every query sees. If nothing is causal the first queries are theirs and
            see every key.
        real_BK: True for real keys; None for all.
    """

    window: int
    is_causal: bool
    num_global_tokens: int = 0
    real_BK: Tensor | None = None

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> "LocalMask":
        """The mask on another device (layers of one model may live on several)."""
        return (
            self if self.real_BK is None else replace(self, real_BK=self.real_BK.to(device, non_blocking=non_blocking))
        )


def block_size(window: int) -> int:
    """Queries of a block: the fastest are 64 for windows of 64 and 128, and 256 for 512."""
    return min(256, max(64, window // 2))


class _Blocks:
    """Where the blocks of queries and their windows of keys lie.

    Args:
        mask: the rule.
        num_queries, num_keys: without global tokens; the last keys are those of the queries.
    """

    def __init__(self, mask: LocalMask, num_queries: int, num_keys: int, device: torch.device):
        self.size = block_size(mask.window)
        self.count = -(-num_queries // self.size)
        # A causal window counts the query's own key; the other kind reaches `window` keys on either side besides it.
        before, behind = (mask.window - 1, 0) if mask.is_causal else (mask.window, mask.window)
        self.width = before + self.size + behind
        # Zeros around the keys; a negative margin cuts off keys that no window reaches.
        self.margins = before - (num_keys - num_queries), self.count * self.size - num_queries + behind
        query_Q1 = torch.arange(self.size, device=device)[:, None]
        distance_QW = query_Q1 + before - torch.arange(self.width, device=device)
        self.reached_QW = (distance_QW <= before) & (distance_QW >= -behind)
        # Padding of the sequence and the zeros around it are hidden by the same table.
        real_BK = torch.ones(1, num_keys, dtype=torch.bool, device=device)
        if mask.real_BK is not None:
            real_BK = mask.real_BK[:, mask.num_global_tokens :]
        self.real_BNW = F.pad(real_BK, self.margins).unfold(1, self.width, self.size)

    def queries(self, query_BSHC: Tensor, per_call: int) -> Iterator[Tensor]:
        """Queries of each call `(B, N, Q, H, C)`, zeros behind the last query."""
        for part_BSHC in query_BSHC.split(per_call * self.size, dim=1):
            missing = -part_BSHC.shape[1] % self.size
            # The last block is filled up with zeros, whose outputs are cut off at the end.
            if missing:
                part_BSHC = F.pad(part_BSHC, (0, 0, 0, 0, 0, missing))
            yield part_BSHC.unflatten(1, (-1, self.size))

    def windows(self, states_BGKC: Tensor, num_global: int, per_call: int) -> Iterator[Tensor]:
        """Keys or values of each call `(B, N, G, E, C)`: windows, overlapping views until they stand behind the global
        tokens."""
        global_BNGEC, local_BGKC = states_BGKC[:, None, :, :num_global], states_BGKC[:, :, num_global:]
        count = local_BGKC.shape[2]
        for first in range(0, self.count, per_call):
            start = first * self.size - self.margins[0]
            stop = min(first + per_call, self.count) * self.size + self.width - self.size - self.margins[0]
            part_BGKC = local_BGKC[:, :, max(start, 0) : stop]
            if start < 0 or stop > count:
                part_BGKC = F.pad(part_BGKC, (0, 0, max(-start, 0), max(stop - count, 0)))
            # Overlapping views: only standing behind the global tokens takes a copy.
            window = part_BGKC.unfold(2, self.width, self.size).permute(0, 2, 1, 4, 3)
            if num_global:
                window = torch.cat((global_BNGEC.expand(-1, window.shape[1], -1, -1, -1), window), dim=3)
            yield window

    def biases(self, num_global: int, dtype: torch.dtype, per_call: int) -> list[Tensor]:
        """What is added to the scores of each call: `(1, 1, Q, E)` where its windows lie inside the real keys,
        `(B or 1, N, Q, E)` where they do not."""
        reached_11QW = self.reached_QW[None, None]
        inside = _bias(reached_11QW, num_global, dtype)
        # `all()` would wait for the device. A GPU takes all blocks in one call anyway, so its one bias is made unseen.
        if self.real_BNW.device.type != "cpu":
            return [_bias(reached_11QW & self.real_BNW[:, :, None], num_global, dtype)]
        return [
            inside if bool(real_BNW.all()) else _bias(reached_11QW & real_BNW[:, :, None], num_global, dtype)
            for real_BNW in self.real_BNW.split(per_call, dim=1)
        ]


def _bias(is_seen: Tensor, num_global: int, dtype: torch.dtype) -> Tensor:
    """The mask to add. A row that sees nothing gets zeros, as under a dense mask."""
    is_seen = F.pad(is_seen, (num_global, 0), value=True)
    return torch.zeros(is_seen.shape, dtype=dtype, device=is_seen.device).masked_fill_(~is_seen, -torch.inf)


def attend_in_blocks(
    query_BHSC: Tensor,
    key_BGKC: Tensor,
    value_BGKC: Tensor,
    mask: LocalMask,
    dropout: float = 0.0,
    scaling: float | None = None,
) -> Tensor:
    """Attention under a rule, `(B, S, H, C)`, with gradients; equal to a dense mask at all real queries."""
    options: dict[str, Any] = {"dropout_p": dropout, "scale": scaling}
    num_global = mask.num_global_tokens
    # Bidirectional: the first queries are those of global tokens, which see everything and so fit no block.
    if num_global and not mask.is_causal:
        first, rest = query_BHSC.split((num_global, query_BHSC.shape[2] - num_global), dim=2)
        of_global = _see_everything(first, key_BGKC, value_BGKC, mask.real_BK, options)
        others = _attend(rest, key_BGKC, value_BGKC, mask, options)
        return torch.cat((of_global, others), dim=1)
    return _attend(query_BHSC, key_BGKC, value_BGKC, mask, options)


def _see_everything(
    query_BHSC: Tensor, key_BGKC: Tensor, value_BGKC: Tensor, real_BK: Tensor | None, options: dict[str, Any]
) -> Tensor:
    """Queries of global tokens over all real keys, `(B, S, H, C)`."""
    count, groups = query_BHSC.shape[2], key_BGKC.shape[1]
    # Query heads that share a key head become rows of one product, here as in `_call`: no key is repeated.
    rows = query_BHSC.unflatten(1, (groups, -1)).flatten(2, 3)
    seen = None if real_BK is None else real_BK[:, None, None]
    attended = F.scaled_dot_product_attention(rows, key_BGKC, value_BGKC, attn_mask=seen, **options)
    return attended.unflatten(2, (-1, count)).flatten(1, 2).transpose(1, 2)


def _attend(
    query_BHSC: Tensor, key_BGKC: Tensor, value_BGKC: Tensor, mask: LocalMask, options: dict[str, Any]
) -> Tensor:
    batch, _, count, _ = query_BHSC.shape
    num_global = mask.num_global_tokens
    blocks = _Blocks(mask, count, key_BGKC.shape[2] - num_global, query_BHSC.device)
    rows = TRAINING_ROWS if torch.is_grad_enabled() else INFERENCE_ROWS
    per_call = max(1, rows // (batch * blocks.size)) if query_BHSC.device.type == "cpu" else blocks.count
    calls = zip(
        blocks.queries(query_BHSC.transpose(1, 2), per_call),
        blocks.windows(key_BGKC, num_global, per_call),
        blocks.windows(value_BGKC, num_global, per_call),
        blocks.biases(num_global, query_BHSC.dtype, per_call),
        strict=True,
    )
    outputs = [_call(query, key, value, bias, options) for query, key, value, bias in calls]
    return torch.cat(outputs, dim=1).flatten(1, 2)[:, :count]


def _call(
    query_BNQHC: Tensor, key_BNGEC: Tensor, value_BNGEC: Tensor, bias_BNQE: Tensor, options: dict[str, Any]
) -> Tensor:
    """One call for some blocks, `(B, N, Q, H, C)`."""
    batch, blocks, size, heads, width = query_BNQHC.shape
    groups = key_BNGEC.shape[2]
    shared = heads // groups
    rows = query_BNQHC.reshape(batch * blocks, size, groups, shared, width).permute(0, 2, 1, 3, 4).flatten(2, 3)
    # A bias that all blocks share is broadcast; only blocks at the edges of real keys have their own.
    if bias_BNQE.shape[1] > 1 or len(bias_BNQE) > 1:
        bias_BNQE = bias_BNQE.expand(batch, -1, -1, -1).flatten(0, 1)[:, None]
    # The query heads of a key head are neighbouring rows, so each row of the bias stands beside its copies.
    bias = bias_BNQE.repeat_interleave(shared, dim=2) if shared > 1 else bias_BNQE
    attended = F.scaled_dot_product_attention(
        rows,
        key_BNGEC.flatten(0, 1),
        value_BNGEC.flatten(0, 1),
        attn_mask=bias,
        **options,
    )
    return attended.transpose(1, 2).reshape(batch, blocks, size, shared, groups, width).transpose(3, 4).flatten(3, 4)


def block_local_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | LocalMask | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers: `(B, S, H, C)`, and no attention map."""
    # A model set to `sdpa` comes here with a rule too (see `Attention`); without a rule this is plain `sdpa`.
    if isinstance(attention_mask, LocalMask):
        return attend_in_blocks(query, key, value, attention_mask, dropout, scaling), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)


@takes_cache
def local_mask(
    config: ChorusTextConfig,
    inputs_embeds: Tensor,
    attention_mask: Tensor | None,
    past_key_values: Cache | None,
    position_ids: Tensor | None,
) -> LocalMask | None:
    """The rule of the sliding layers; None where there is none (a mask made by the caller, packed sequences, a static
    cache with room behind the last token, a graph being compiled) or where it would not pay."""
    count, window, num_global = inputs_embeds.shape[1], config.sliding_window, config.num_global_tokens
    assert window is not None  # a configuration with sliding layers has one
    # Asked for by name, blocks serve every prefill; under `sdpa` only where they are faster.
    shortest = {BLOCK_LOCAL: 2, "sdpa": WINDOWS_THAT_PAY * window + 1}.get(config._attn_implementation)
    if shortest is None or count < shortest or torch.compiler.is_compiling():
        return None
    seen, held, first = 0, count, 0
    if past_key_values is not None:
        layer = next(i for i, kind in enumerate(config.layer_types) if kind in WINDOW_TYPES)
        seen = int(past_key_values.get_query_offset(layer))
        held, first = past_key_values.get_mask_sizes(count, layer)
    # Nothing keeps packed sequences apart in a bidirectional model, whose global tokens share position 0 besides.
    elif config.is_causal and is_packed(attention_mask, position_ids):
        return None
    # A static cache holds room behind the last token, which a rule would count as keys.
    expected = (len(inputs_embeds), seen + count)
    if first + held != expected[1] or (attention_mask is not None and attention_mask.shape != expected):
        return None
    real_BK = None if attention_mask is None else attention_mask[:, first:].bool()
    # Without padding the inner blocks share one bias, and nothing has to be looked up.
    if real_BK is None or bool(real_BK.all()):
        return LocalMask(window, config.is_causal, num_global)
    if config.is_causal:
        # Learned keys are not in the caller's mask. In a bidirectional model the mask has them already.
        real_BK = F.pad(real_BK, (num_global, 0), value=True)
    return LocalMask(window, config.is_causal, num_global, real_BK)


ALL_ATTENTION_FUNCTIONS.register(BLOCK_LOCAL, block_local_attention_forward)
# transformers makes masks by the implementation's name. Where there is no rule, the mask is that of `sdpa`.
ALL_MASK_ATTENTION_FUNCTIONS.register(BLOCK_LOCAL, sdpa_mask)
SERVICES["local_mask"] = local_mask
