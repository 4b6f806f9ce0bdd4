"""Attention: the ordinary kind, and cross-modal attention on a shared query projection.

Shape suffixes: B batch, S sequence, T tokens (B * S), H heads, G key-value heads, C head size, D hidden size.
"""

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from .attention_globals import GlobalKeyValues, MemoryTokens
from .attention_masks import BLOCK_LOCAL, MaskRule
from .configuration_modalities import MODALITY_IDS
from .configuration_services import SERVICES
from .configuration_text import ChorusTextConfig
from .layers import RMSNorm
from .moe_plan import ForwardPlan


def rotary_tables(cos_BSC: Tensor, sin_BSC: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines `(B, 1, S, C)` for [`rotate`], from those of a rotary embedding; once per forward."""
    first, second = sin_BSC.chunk(2, dim=-1)
    return cos_BSC.unsqueeze(1), torch.cat((-first, second), dim=-1).unsqueeze(1)


def rotate(states_BHSC: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary positions (arXiv 2104.09864) as `x * cos + (x, halves exchanged) * signed sin`: three operations."""
    cos_B1SC, sin_B1SC = tables
    exchanged = states_BHSC.roll(states_BHSC.shape[-1] // 2, dims=-1)
    # Llama negates and concatenates halves of every query and key; here the table, made once per forward, has the sign.
    # In place on the fresh product: the gradient of a product reads its factors alone.
    return (states_BHSC * cos_B1SC).addcmul_(exchanged, sin_B1SC)


def project(layer: nn.Module, hidden_states: Tensor, plan: ForwardPlan) -> Tensor:
    """Through a layer for every token, or one by modality. Adapters on a linear layer know no plan."""
    return layer(hidden_states, plan) if isinstance(layer, ModalityProjection) else layer(hidden_states)


class ModalityProjection(nn.ModuleDict):
    """One projection per modality; each token goes through that of its own modality (arXiv 2411.04996)."""

    def __init__(self, in_features: int, out_features: int, bias: bool, modalities: Collection[str]):
        super().__init__({name: nn.Linear(in_features, out_features, bias=bias) for name in modalities})

    def forward(self, hidden_states: Tensor, plan: ForwardPlan) -> Tensor:
        if len(self) == 1:
            return self["text"](hidden_states)
        # Adapters may want whole sequences: one adapter a sample, or what stands before a certain token.
        if plan.is_static or any(hasattr(layer, "base_layer") for layer in self.values()):
            return self._project_all(hidden_states, plan)
        # In training the other projections run too, on no rows: all ranks must have gradients for the same parameters.
        if plan.rows["text"] is None and not torch.is_grad_enabled():
            return self["text"](hidden_states)
        hidden_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        rows = [
            torch.arange(len(hidden_TD), device=hidden_TD.device) if r is None else r
            for r in (plan.rows[name] for name in self)
        ]
        states = [layer(hidden_TD.index_select(0, r)) for layer, r in zip(self.values(), rows, strict=True)]
        # One gather by the inverse permutation brings the rows back into order, for all modalities at once.
        order = torch.cat(rows)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        return torch.cat(states).index_select(0, back).view(*hidden_states.shape[:-1], -1)

    def extra_repr(self) -> str:
        """PEFT shows it where `target_modules` names the whole."""
        return f"# an adapter goes on one of its layers, as in k_proj.{next(iter(self))}"

    def _project_all(self, hidden_states: Tensor, plan: ForwardPlan) -> Tensor:
        # A graph has no shapes that depend on data: every projection sees every token, and one result is kept.
        modality_BS1 = plan.modality_T.view(*hidden_states.shape[:-1], 1)
        output = self["text"](hidden_states)
        for name, layer in self.items():
            if name != "text":
                output = torch.where(modality_BS1 == MODALITY_IDS[name], layer(hidden_states), output)
        return output


class Attention(nn.Module):
    """Grouped-query attention with rotary positions (arXiv 2305.13245, 2104.09864)."""

    # Its queries are not returned, so a long prefill may compute them in chunks.
    keeps_no_queries = True

    def __init__(self, config: ChorusTextConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = config.is_causal
        kind = config.layer_types[layer_idx]
        self.sliding_window = None if kind == "full_attention" else config.sliding_window
        self.memory_tokens = MemoryTokens(config) if kind == "hybrid_sliding" else None
        self.global_tokens = None
        # Nothing in front of a causal sequence could read it, so global tokens are keys and values here; no projection
        # makes them. A layer with full attention needs none.
        if self.sliding_window is not None and config.is_causal and config.num_global_tokens:
            self.global_tokens = GlobalKeyValues(config.num_global_tokens, config.num_key_value_heads, config.head_dim)
        query_size = config.num_attention_heads * config.head_dim
        key_size = config.num_key_value_heads * config.head_dim
        self.q_proj = self._projection(query_size, is_query=True)
        self.k_proj = self._projection(key_size)
        self.v_proj = self._projection(key_size)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=config.attention_output_bias)
        # Qwen3 norms each head, OLMo 2 the whole projection before it is split into heads.
        by_head = config.qk_norm_scope == "head"
        self.query_norm_size = config.head_dim if by_head else query_size
        self.key_norm_size = config.head_dim if by_head else key_size
        norm = RMSNorm if config.use_qk_norm else nn.Identity
        self.q_norm = norm(self.query_norm_size, config.rms_norm_eps)
        self.k_norm = norm(self.key_norm_size, config.rms_norm_eps)
        # SmolLM3's name and convention: 1 in `no_rope_layers` is a layer WITH rotary positions.
        self.use_rope = config.no_rope_layers is None or bool(config.no_rope_layers[layer_idx])

    def _projection(self, out_features: int, is_query: bool = False) -> nn.Module:
        return nn.Linear(self.config.hidden_size, out_features, bias=self.config.attention_bias)

    def _rotated(self, states: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
        return rotate(states, position_embeddings) if self.use_rope else states

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | MaskRule | None,
        plan: ForwardPlan,
        past_key_values: Cache | None = None,
        keys_alone: bool = False,
        queries_BQ: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor | None, Tensor]]:
        """Returns the output `(B, S, D)`, the attention map if the backend yields one, and the rotated queries
        `(B, H, S, C)` and keys `(B, G, S, C)` of the new tokens; a long prefill has no queries to return.
        `position_embeddings` are [`rotary_tables`]. With `keys_alone` the cache is filled, and the states return. With
        `queries_BQ`, places of tokens, the output is of these alone, `(B, Q, D)`."""
        key = self.k_norm(project(self.k_proj, hidden_states, plan).unflatten(-1, (-1, self.key_norm_size)))
        new_value = value = self._by_head(project(self.v_proj, hidden_states, plan))
        plain_key = self._by_head(key)
        new_key = key = self._rotated(plain_key, position_embeddings)
        # Keys are cached rotated, as in transformers. The alignment loss compares new ones, which alone are returned.
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx, kwargs=kwargs)
        memory = None
        if self.memory_tokens is not None:
            written = (hidden_states, plain_key, new_value, plan.real_T, past_key_values, self.layer_idx)
            memory = partial(self.memory_tokens, *written)
        if keys_alone:
            if memory is not None:
                memory()
            return hidden_states, None, (None, new_key)
        # After the cache and not in it: a sliding cache would drop them first.
        if self.global_tokens is not None:
            key, value = self.global_tokens(key, value)
        states = (self, hidden_states, position_embeddings, plan, key, value, attention_mask, memory)
        # The package leaves out queries that nobody reads, and takes a long prefill chunk by chunk.
        if self.keeps_no_queries and "attend" in SERVICES:
            output, weights, query = SERVICES["attend"](*states, queries_BQ, **kwargs)
        else:
            output, weights, query = self.attend(*states[1:], **kwargs)
            output = output if queries_BQ is None else output.take_along_dim(queries_BQ[..., None], dim=1)
        return output, weights, (query, new_key)

    def _by_head(self, states: Tensor) -> Tensor:
        """`(B, S, ...)` as `(B, heads, S, C)`."""
        return states.reshape(*states.shape[:2], -1, self.head_dim).transpose(1, 2)

    def attend(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        plan: ForwardPlan,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | MaskRule | None,
        memory: Callable[..., Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """The output of some states over keys and values, the attention map if there is one, and rotated queries."""
        query = self.q_norm(project(self.q_proj, hidden_states, plan).unflatten(-1, (-1, self.query_norm_size)))
        plain_query = self._by_head(query)
        query = self._rotated(plain_query, position_embeddings)
        # A rule is no tensor: the block implementation alone reads it, whichever one the model was set to.
        name = BLOCK_LOCAL if isinstance(attention_mask, MaskRule) else self.config._attn_implementation
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            # Flash attention has no mask and reads the window here.
            sliding_window=self.sliding_window,
            **kwargs,
        )
        if memory is not None:
            output = output + memory(query_BHSC=plain_query)
        output = self.o_proj(output.reshape(*hidden_states.shape[:-1], -1).contiguous())
        return output, weights, query


class CrossModalAttention(Attention):
    """Attention whose keys and values are projected by modality and whose queries share one projection.

    Text queries meet image keys (and the reverse) through the same W_q, in one softmax over all that a token may see.
    """

    # The alignment loss reads its queries. Keys and values are projected when a token enters, so that cache, masks and
    # attention backends are the ordinary ones.
    keeps_no_queries = False

    def _projection(self, out_features: int, is_query: bool = False) -> nn.Module:
        # An untied query is the attention of Mixture-of-Transformers (arXiv 2411.04996).
        if is_query and self.config.share_cross_modal_query:
            return super()._projection(out_features)
        config = self.config
        return ModalityProjection(config.hidden_size, out_features, config.attention_bias, config.modalities)
