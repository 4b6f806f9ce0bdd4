"""Global tokens: what every window of a sliding-window model sees.

- Bidirectional (Longformer, arXiv 2004.05150; ETC, arXiv 2004.08483): learned tokens in front of the sequence, which
  read and are read by every position and pass through the layers like text.
- Causal (persistent memory, arXiv 1907.01470): nothing in front may read what follows, so each sliding layer has
  learned keys and values instead, put in front of those of the tokens.
- Memory (ABC, arXiv 2110.02488): each `hybrid_sliding` layer of a causal model has memory tokens, whose keys and values
  are weighted means over all tokens so far.

Shape suffixes: B batch, S sequence, M global or memory tokens, G key-value heads, R query heads of a key head, K keys,
C head size, D hidden size, T tokens, N blocks, L tokens of a block.
"""

from collections.abc import Callable
from functools import wraps
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache

from .configuration_text import ChorusTextConfig
from .layers import float32_product, without_autocast
from .modeling_outputs import BankRouting

# A token writes with a weight between exp(-10) and exp(10), so that sums of weights need no running maximum: a cache
# adds up what it is given, in pieces of any length.
WRITE_CAP = 10.0
# Tokens that meet each other in one product; from block to block there are sums.
MEMORY_BLOCK = 64


class GlobalTokens(nn.Module):
    """Learned tokens in front of a bidirectional sequence, `weight (M, D)`."""

    def __init__(self, count: int, hidden_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, hidden_size))

    def start_weights(self, std: float) -> None:
        for parameter in self.parameters():
            init.normal_(parameter, mean=0.0, std=std)

    def in_front_of(self, embeds_BSD: Tensor, inputs: dict[str, Any]) -> dict[str, Any]:
        """A decoder's inputs with the global tokens in front: real, at position 0, text, of unknown complexity.

        Args:
            embeds_BSD: embeddings of the sequence.
            inputs: name -> what else the decoder was given.

        Raises:
            ValueError: a cache, or a mask that is not `(B, S)`.
        """
        if inputs.get("past_key_values") is not None:
            raise ValueError("global tokens in front of a bidirectional sequence read all of it: there is no cache")
        mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
        if mask is not None and (isinstance(mask, dict) or mask.ndim != 2):
            raise ValueError("a model with global tokens takes an attention_mask (batch, sequence) and no other form")
        (batch, length), device, count = embeds_BSD.shape[:2], embeds_BSD.device, len(self.weight)
        if positions is None:
            positions = torch.arange(length, device=device).unsqueeze(0)
        modality_BS, scores = inputs.get("mm_token_type_ids"), inputs.get("complexity_scores")
        return inputs | {
            "input_ids": None,
            "inputs_embeds": torch.cat((self.weight.to(embeds_BSD.dtype).expand(batch, -1, -1), embeds_BSD), dim=1),
            "attention_mask": None if mask is None else F.pad(mask, (count, 0), value=1),
            # All at position 0: one after the other they would shift the positions that the sequence was trained with.
            "position_ids": F.pad(positions, (count, 0)),
            "mm_token_type_ids": None if modality_BS is None else F.pad(modality_BS, (count, 0)),
            # NaN: a caller cannot know their complexity, so the router's entropy decides.
            "complexity_scores": None if scores is None else F.pad(scores, (count, 0), value=torch.nan),
            "use_cache": False,
        }


class GlobalKeyValues(nn.Module):
    """Learned keys and values of a causal sliding layer, each `(G, M * C)`: a shard of the heads is a shard of rows."""

    def __init__(self, count: int, heads: int, head_dim: int):
        super().__init__()
        self.head_dim = head_dim
        self.key = nn.Parameter(torch.empty(heads, count * head_dim))
        self.value = nn.Parameter(torch.empty(heads, count * head_dim))

    def start_weights(self, std: float) -> None:
        for parameter in self.parameters():
            init.normal_(parameter, mean=0.0, std=std)

    def forward(self, key_BGKC: Tensor, value_BGKC: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values with the learned ones in front."""
        return self._in_front(self.key, key_BGKC), self._in_front(self.value, value_BGKC)

    def _in_front(self, learned: Tensor, states_BGKC: Tensor) -> Tensor:
        # In the dtype of the cache. Not rotated: a rotation at position 0 changes nothing.
        learned_GMC = learned.to(states_BGKC.dtype).unflatten(1, (-1, self.head_dim))
        return torch.cat((learned_GMC.expand(len(states_BGKC), -1, -1, -1), states_BGKC), dim=2)


class MemoryTokens(nn.Module):
    """Memory tokens of a causal layer with windows: M keys and values of each key head, at each position.

    Every token writes its key and value, not rotated, into all of them, with weights `exp(w x)`; a memory token is the
    mean of what was written up to there. What is read, by a softmax over the M of them, is added to the output of the
    windows, times a learned number of each head. Nothing is read of what follows, a step costs the same after any
    number of tokens, and padding writes nothing.
    """

    def __init__(self, config: ChorusTextConfig):
        super().__init__()
        self.groups, self.scaling = config.num_key_value_heads, config.head_dim**-0.5
        # Of each memory token of each key head a row, which says how much a token writes into it.
        self.write = nn.Parameter(torch.empty(self.groups * config.num_memory_tokens, config.hidden_size))
        self.gate = nn.Parameter(torch.empty(config.num_attention_heads))

    def start_weights(self, std: float) -> None:
        init.normal_(self.write, mean=0.0, std=std)
        init.ones_(self.gate)

    def forward(
        self,
        hidden_BSD: Tensor,
        key_BGSC: Tensor,
        value_BGSC: Tensor,
        real_T: Tensor | None,
        cache: Cache | None,
        layer_idx: int,
        query_BHSC: Tensor | None = None,
    ) -> Tensor | None:
        """What the queries read `(B, S, H, C)`; without queries the cache is brought up to date, and nothing read.

        Raises:
            ValueError: a cache without room for the sums.
        """
        with without_autocast(hidden_BSD):
            logits_BSE = float32_product(hidden_BSD, self.write)
            # Capped smoothly, as in Gemma 2 (arXiv 2408.00118).
            write_BSE = (WRITE_CAP * (logits_BSE / WRITE_CAP).tanh()).exp()
            if real_T is not None:
                write_BSE = write_BSE * real_T.view(*write_BSE.shape[:2], 1)
            length, width = value_BGSC.shape[2:]
            size = min(MEMORY_BLOCK, length)
            write_BGNLM = _in_blocks(write_BSE.unflatten(-1, (self.groups, -1)).transpose(1, 2), size)
            key_BGNLC, value_BGNLC = (_in_blocks(states.float(), size) for states in (key_BGSC, value_BGSC))
            # One tensor of keys, values and sums of weights: what a cache holds of everything before.
            pairs = torch.cat((key_BGNLC, value_BGNLC, torch.ones_like(key_BGNLC[..., :1])), dim=-1)
            written = write_BGNLM.transpose(-1, -2) @ pairs
            held = _held_sums(cache, layer_idx)
            first = torch.zeros_like(written[:, :, :1]) if held is None else held.unsqueeze(2)
            sums = torch.cat((first, written), dim=2).cumsum(dim=2)
            if cache is not None:
                cache.update_recurrent_state(sums[:, :, -1], layer_idx)
            if query_BHSC is None:
                return None
            before_key, before_value, before = (
                part.unsqueeze(2) for part in sums[:, :, :-1].split((width, width, 1), dim=-1)
            )
            query = _in_blocks(query_BHSC.float() * self.scaling, size).unflatten(1, (self.groups, -1))
            write, key, value = (states.unsqueeze(2) for states in (write_BGNLM, key_BGNLC, value_BGNLC))
            # Within a block token by token: its own sum holds what it wrote itself, and nothing that follows.
            total = before.transpose(-1, -2) + write.cumsum(dim=-2)
            total = total + (total == 0)  # where all before is padding
            near = (query @ key.transpose(-1, -2)).tril()
            reads = ((query @ before_key.transpose(-1, -2) + near @ write) / total).softmax(dim=-1) / total
            read = reads @ before_value + (reads @ write.transpose(-1, -2)).tril() @ value
            read_BSHC = read.flatten(1, 2).flatten(2, 3)[:, :, :length].transpose(1, 2)
            return (read_BSHC * self.gate.float()[:, None]).to(query_BHSC.dtype)


def _in_blocks(states_BGSC: Tensor, size: int) -> Tensor:
    """`(B, G, N, L, C)`, zeros behind the last token."""
    return F.pad(states_BGSC, (0, 0, 0, -states_BGSC.shape[2] % size)).unflatten(2, (-1, size))


def _held_sums(cache: Cache | None, layer_idx: int) -> Tensor | None:
    """`(B, G, M, 2C + 1)`, the sums over all tokens before."""
    if cache is None:
        return None
    layer = cache.layers[layer_idx]
    if not hasattr(layer, "recurrent_states"):
        raise ValueError(
            f"the cache has no room for memory tokens in layer {layer_idx}, a {type(layer).__name__}; make it with the "
            "configuration: DynamicCache(config=model.config)"
        )
    # A copy, since the cache writes in place and gradients may need what it was.
    return layer.recurrent_states[0].clone() if layer.is_recurrent_states_initialized[0] else None


def with_global_tokens(forward: Callable[..., Any]) -> Callable[..., Any]:
    """For a decoder's forward with recorded outputs: puts the global tokens of a bidirectional model in front of what
    goes in, and leaves them out of what comes out, which is about the sequence alone."""
    names = tuple(signature(forward).parameters)[1:]

    @wraps(forward)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.global_tokens is None:
            return forward(self, *args, **kwargs)
        kwargs |= dict(zip(names, args, strict=False))
        input_ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        if (input_ids is None) == (embeds is None):
            return forward(self, **kwargs)  # which says what is wrong
        # Outputs are cut by name, which a tuple has not.
        as_dict = kwargs.pop("return_dict", getattr(self.config, "return_dict", True))
        inputs = self.global_tokens.in_front_of(self.embed_tokens(input_ids) if embeds is None else embeds, kwargs)
        outputs = forward(self, **inputs, return_dict=True)
        _leave_out(outputs, len(self.global_tokens.weight))
        return outputs if as_dict else outputs.to_tuple()

    return wrapper


def _leave_out(outputs: Any, count: int) -> None:
    batch, length = outputs.last_hidden_state.shape[:2]
    outputs.last_hidden_state = outputs.last_hidden_state[:, count:]
    if outputs.hidden_states is not None:
        outputs.hidden_states = tuple(None if h is None else h[:, count:] for h in outputs.hidden_states)
    if outputs.attentions is not None:
        outputs.attentions = tuple(None if a is None else a[:, :, count:, count:] for a in outputs.attentions)
    # So losses, statistics and heads need not know that there were tokens in front.
    if outputs.skip_logits is not None:
        outputs.skip_logits = tuple(logits_BS[:, count:] for logits_BS in outputs.skip_logits)
    if outputs.cross_modal_states is not None:
        outputs.cross_modal_states = tuple((q[:, :, count:], k[:, :, count:]) for q, k in outputs.cross_modal_states)
    if outputs.routing is not None:
        outputs.routing = tuple(
            {name: _routing_of_sequence(routing, batch, length, count) for name, routing in layer.items()}
            for layer in outputs.routing
        )


def _routing_of_sequence(routing: BankRouting, batch: int, length: int, count: int) -> BankRouting:
    """The rows of a bank that are no global tokens, numbered as if there were none."""
    rows = routing.rows
    if rows is None:
        places_BS = torch.arange(batch * length, device=routing.router_logits.device).view(batch, length)
        keep_R = places_BS[:, count:].flatten()
    else:
        keep_R = (rows % length >= count).nonzero().squeeze(1)
        rows = rows[keep_R]
        # A token's own sample and every sample before it lost `count` tokens.
        rows = rows - count * (rows // length + 1)
    # Counts are scalars, and what is left has a row for each row of the bank.
    of_rows = {n: v for n, v in routing._asdict().items() if isinstance(v, Tensor) and v.ndim and n != "rows"}
    kept: dict[str, Any] = {name: value[keep_R] for name, value in of_rows.items()}
    return routing._replace(rows=rows, **kept)
