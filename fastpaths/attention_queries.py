"""Attention of a layer whose queries nobody reads afterwards: of some tokens alone, and chunk by chunk.

- Where layers are skipped by token, queries of the tokens that skip are never made.
- A long causal prefill with windows takes its queries in chunks: only keys, values and output are as long as it is.

Shape suffixes: B batch, S sequence, Q chosen tokens, D hidden size.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from chorus_moe.fastpaths.attention_blocks import LocalMask
from chorus_moe.modeling.attention import Attention
from chorus_moe.modeling.attention_masks import BLOCK_LOCAL, MaskRule
from chorus_moe.modeling.configuration_services import SERVICES
from chorus_moe.modeling.layers import CHUNK, GPU_CHUNKS
from chorus_moe.modeling.moe_plan import ForwardPlan

Tables = tuple[Tensor, Tensor]


def attend(
    layer: Attention,
    hidden_states: Tensor,
    position_embeddings: Tables,
    plan: ForwardPlan,
    key: Tensor,
    value: Tensor,
    mask: Tensor | MaskRule | None,
    memory: Callable[..., Tensor] | None,
    queries_BQ: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What `layer.attend` returns, of the tokens at `queries_BQ` if they are given; the queries may be left out."""
    table = mask if isinstance(mask, Tensor) and mask.ndim == 4 else None
    in_place = memory is None and layer.config._attn_implementation in ("sdpa", BLOCK_LOCAL)
    if queries_BQ is not None and table is mask and in_place:
        hidden_BQD, tables, seen = chosen(layer, hidden_states, position_embeddings, table, queries_BQ, key)
        return layer.attend(hidden_BQD, tables, plan, key, value, seen, **kwargs)
    size = CHUNK if hidden_states.device.type == "cpu" else CHUNK * GPU_CHUNKS
    # With gradients all chunks would be kept anyway, and memory tokens add up over the whole sequence.
    is_long = hidden_states.shape[1] > size and memory is None and not torch.is_grad_enabled()
    states = (hidden_states, position_embeddings, plan, key, value)
    if isinstance(mask, LocalMask) and mask.is_causal and is_long:
        output, weights, query = attend_in_chunks(layer, *states, mask, size, **kwargs), None, None
    else:
        output, weights, query = layer.attend(*states, mask, memory, **kwargs)
    if queries_BQ is not None:
        output = output.take_along_dim(queries_BQ[..., None], dim=1)
    return output, weights, query


def chosen(
    layer: Attention, hidden_states: Tensor, tables: Tables, mask: Tensor | None, queries_BQ: Tensor, key: Tensor
) -> tuple[Tensor, Tables, Tensor | None]:
    """States, rotary tables and mask of some of the tokens of each sample."""
    length, num_keys = hidden_states.shape[1], key.shape[2]
    rows_B1Q1 = queries_BQ[:, None, :, None]
    if mask is not None:
        mask = mask.take_along_dim(rows_B1Q1, dim=2)
    elif layer.is_causal and length > 1:
        # What no mask means: each token sees itself and all before; the last keys are those of the tokens.
        mask = torch.arange(num_keys, device=key.device) <= rows_B1Q1 + (num_keys - length)
    cos, sin = (table.take_along_dim(rows_B1Q1, dim=2) for table in tables)
    return hidden_states.take_along_dim(queries_BQ[..., None], dim=1), (cos, sin), mask


def attend_in_chunks(
    layer: Attention,
    hidden_states: Tensor,
    tables: Tables,
    plan: ForwardPlan,
    key: Tensor,
    value: Tensor,
    mask: LocalMask,
    size: int,
    **kwargs: Any,
) -> Tensor:
    """The output `(B, S, D)` of a long causal prefill with windows."""
    # Fresh memory as long as the sequence costs more than the work done on it, since its pages are cleared at each
    # call. So only keys, values and output are that long.
    output = torch.empty_like(hidden_states)
    length, num_keys = hidden_states.shape[1], key.shape[2]
    for start in range(0, length, size):
        stop = min(start + size, length)
        # Causal: keys behind the chunk's last query are cut off, global ones in front stay.
        seen = num_keys - (length - stop)
        rule = mask if mask.real_BK is None else replace(mask, real_BK=mask.real_BK[:, :seen])
        part, (cos, sin) = hidden_states[:, start:stop], (table[:, :, start:stop] for table in tables)
        states = (part, (cos, sin), plan, key[:, :, :seen], value[:, :, :seen])
        output[:, start:stop] = layer.attend(*states, rule, **kwargs)[0]
    return output


SERVICES["attend"] = attend
