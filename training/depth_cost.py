"""What a forward spends on each sample: layers, visits to experts, floating-point operations.

`forward(..., output_compute=True)` asks for it: `import chorus_moe` registers what counts.

Counted are the matrix products of the decoder's layers on real tokens, two operations for each product with its sum:
projections, attention over the keys that a token sees, gates, and the feed-forwards that it did not skip, with the
experts that it visited. Not counted: padding (also where it is computed), elementwise operations, embeddings, encoders,
connectors and output heads.

Shape suffixes: B batch, R samples still there, S new tokens, K keys, T tokens (R * S).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import find_packed_sequence_indices

from chorus_moe.modeling.configuration_banks import LayerBankConfig
from chorus_moe.modeling.configuration_services import SERVICES
from chorus_moe.modeling.configuration_text import ChorusTextConfig
from chorus_moe.modeling.depth_skip import threshold_logit
from chorus_moe.modeling.modeling_outputs import BankRouting, ChorusModelOutput, Computation
from chorus_moe.modeling.modeling_text import ChorusTextModel
from chorus_moe.modeling.moe_routers import ROUTER_CLASSES


def visible_keys(text: ChorusTextConfig, kind: str, real_BK: Tensor, num_queries: int, num_in_front: int) -> Tensor:
    """`(B, S)`: how many real keys each of the last `num_queries` tokens sees in a layer of some type.

    Args:
        text: the decoder's configuration.
        num_in_front: how many of the first keys are global tokens, which see and are seen by all.
    """
    keys = torch.arange(real_BK.shape[1], device=real_BK.device)
    distance_SK = keys[-num_queries:, None] - keys
    sees_SK = distance_SK >= 0 if text.is_causal else torch.ones_like(distance_SK, dtype=torch.bool)
    if kind != "full_attention":
        assert text.sliding_window is not None
        # A causal window counts the token itself; the other kind has its size on either side, see `LocalMask`.
        near_SK = distance_SK.abs() < text.sliding_window + (not text.is_causal)
        sees_SK = sees_SK & near_SK | (keys < num_in_front) | (keys[-num_queries:, None] < num_in_front)
    seen_BS = (sees_SK & real_BK[:, None]).sum(dim=-1)
    # Learned keys of a causal layer are no tokens: they are in no mask.
    has_global_keys = kind != "full_attention" and text.is_causal
    return seen_BS + (text.num_global_tokens if has_global_keys else 0)


def projection_flops(text: ChorusTextConfig) -> int:
    """Of queries, keys, values and output, for one token of one layer."""
    # Queries and output are H heads wide, keys and values G.
    return 4 * text.hidden_size * text.head_dim * (text.num_attention_heads + text.num_key_value_heads)


def memory_flops(text: ChorusTextConfig) -> int:
    """Of a layer's memory tokens for one token: weights, what is written into each, and what is read of each."""
    weights = 2 * text.hidden_size * text.num_key_value_heads * text.num_memory_tokens
    # As in a step by step loop; blocks of a prefill compute more.
    pairs = 4 * text.head_dim * text.num_memory_tokens
    return weights + pairs * (text.num_key_value_heads + text.num_attention_heads)


def gated_flops(text: ChorusTextConfig, width: int) -> int:
    """Of a SwiGLU feed-forward for one token."""
    return 6 * text.hidden_size * width


def router_flops(hidden_size: int, bank: LayerBankConfig) -> int:
    """Of a bank's router, and of the bank's own gate if it has one, for one token."""
    gates = 2 * hidden_size * (bank.has_own_gate + (bank.mean_experts is not None))
    return gates + ROUTER_CLASSES[bank.router].flops(hidden_size, bank.num_experts)


def feed_forward_flops(text: ChorusTextConfig, layer: int) -> int:
    """What every token that is fed forward costs in a layer's feed-forward, wherever it is routed."""
    if text.mlp_layer_types[layer] != "sparse":
        return gated_flops(text, text.intermediate_size)
    num_columns = sum(not bank.has_own_gate for bank in text.banks_of_layer(layer))
    # A single column is open or not: the bank gate computes nothing.
    gate = 2 * text.hidden_size * num_columns if num_columns > 1 else 0
    return gate + gated_flops(text, text.shared_expert_intermediate_size)


def bank_rows(routing: BankRouting, real_T: Tensor, costs: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Real tokens that a bank took, as indices, how many experts each of them visited, and what a visit cost.

    Args:
        costs: of a visit by each of the widths that `routing.widths` counts; the last is that of the whole width.
    """
    # Sentinels are no visits.
    visits_T = (routing.selected_experts < routing.router_logits.shape[-1]).sum(dim=-1)
    rows = torch.arange(len(real_T), device=real_T.device) if routing.rows is None else routing.rows
    counts = real_T[rows] if routing.token_mask is None else real_T[rows] & routing.token_mask
    width_T = torch.full_like(visits_T, -1) if routing.widths is None else routing.widths + torch.zeros_like(visits_T)
    return rows[counts], visits_T[counts], torch.tensor(costs, device=rows.device)[width_T[counts]]


def computation(
    text: ChorusTextConfig,
    layers_B: Tensor,
    real_BK: Tensor,
    num_queries: int,
    routing: Sequence[dict[str, BankRouting]],
    num_in_front: int = 0,
    fed: Sequence[Tensor] = (),
) -> Computation:
    """Add up what a forward spent.

    Args:
        text: the decoder's configuration.
        layers_B: how many layers each sample ran through; a sample that left is in none of the later layers' rows.
        real_BK: True for real tokens, the last `num_queries` of which are new.
        routing: of the sparse layers that were run, in order.
        fed: `(R, S)` of each of the `skip_layers` that were run, in order: True for tokens that were fed forward.
    """
    real_BS = real_BK[:, -num_queries:]
    seen = {kind: visible_keys(text, kind, real_BK, num_queries, num_in_front) for kind in set(text.layer_types)}
    experts_B, flops_B = torch.zeros_like(layers_B), torch.zeros_like(layers_B)
    decisions, openings = iter(routing), iter(fed)
    for layer in range(int(layers_B.max())):
        # Samples that left have no rows in the routing of later layers.
        there = (layers_B > layer).nonzero().squeeze(1)
        fed_RS = real_RS = real_BS[there]
        of_token = projection_flops(text) + (memory_flops(text) if text.layer_types[layer] == "hybrid_sliding" else 0)
        heads = text.num_attention_heads * text.head_dim
        attending_RS, of_fed = real_RS, feed_forward_flops(text, layer)
        if layer in (text.skip_layers or ()):
            # The skip gate itself reads every token.
            fed_RS, of_token = real_RS & next(openings), of_token + 2 * text.hidden_size
            if text.skip_scope == "layer":
                # Of a token that skips there are keys and values alone; queries and output are the heads' part.
                attending_RS, of_queries = fed_RS, 4 * text.hidden_size * heads
                of_token, of_fed = of_token - of_queries, of_fed + of_queries
        flops_B[there] += real_RS.sum(dim=1) * of_token + fed_RS.sum(dim=1) * of_fed
        # Scores and weighted sums of values, all query heads.
        seen_RS = seen[text.layer_types[layer]][there]
        flops_B[there] += 4 * heads * (seen_RS * attending_RS).sum(dim=1)
        if text.mlp_layer_types[layer] != "sparse":
            continue
        decided, real_T = next(decisions), real_RS.flatten()
        for bank in text.banks_of_layer(layer):
            shares = text.expert_width_shares or [1.0]
            costs = [gated_flops(text, bank.expert_depth * round(share * bank.intermediate_size)) for share in shares]
            rows, visits, of_visit = bank_rows(decided[bank.name], real_T, costs)
            samples = there[rows // num_queries]
            experts_B.index_add_(0, samples, visits)
            of_row = router_flops(text.hidden_size, bank)
            flops_B.index_add_(0, samples, visits * of_visit + of_row)
    return Computation(layers_B, experts_B, flops_B)


def count_computation(
    forward: Callable[..., Any], model: ChorusTextModel, *args: Any, **kwargs: Any
) -> ChorusModelOutput | tuple[Any, ...]:
    """Outputs of a decoder's own `forward`, with recorded outputs, and `compute` in them.

    Raises:
        ValueError: a compiled model, inputs without names, or what `_real_keys` refuses.
    """
    if args or torch.compiler.is_compiling():
        raise ValueError("output_compute=True takes named inputs and is not for compiled models")
    tokens = kwargs.get("input_ids") if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
    if tokens is None:
        return forward(model, **kwargs)  # which says what is missing
    cache = kwargs.get("past_key_values")
    num_in_front, positions = model.config.num_tokens_in_front, kwargs.get("position_ids")
    # Global tokens all stand at position 0, which would look like packed sequences.
    if positions is not None:
        positions = positions[:, num_in_front:]
    real_BK = _real_keys(tokens, kwargs.get("attention_mask"), cache, positions)
    keep_routing, keep_gates = kwargs.get("output_routing"), kwargs.get("output_skip_logits")
    if keep_routing is None:
        keep_routing = model.config.output_router_logits
    as_dict = kwargs.pop("return_dict", getattr(model.config, "return_dict", True))
    # Experts and skipped tokens are counted from what was really decided, not from the configuration.
    needed = {"output_routing": True, "output_skip_logits": bool(model.config.skip_layers)}
    outputs = forward(model, **kwargs | needed | {"return_dict": True})
    exits, batch = kwargs.get("exits"), len(tokens)
    num_layers = kwargs.get("exit_layer") or len(model.layers)
    layers_B = torch.full((batch,), num_layers) if exits is None else exits.left_after.clone()
    # In training every token is fed forward, and the skip gate's decision multiplies what comes out.
    open_above = -math.inf if model.training else threshold_logit(kwargs.get("skip_threshold"))
    outputs.compute = computation(
        model.config,
        layers_B.to(tokens.device),
        real_BK,
        tokens.shape[1],
        outputs.routing or (),
        num_in_front,
        [logits.to(tokens.device) > open_above for logits in outputs.skip_logits or ()],
    )
    if not keep_routing:
        outputs.routing = None
    if not keep_gates:
        outputs.skip_logits = None
    return outputs if as_dict else outputs.to_tuple()


SERVICES["count_computation"] = count_computation


def _real_keys(tokens: Tensor, attention_mask: Any, cache: Any, position_ids: Tensor | None) -> Tensor:
    """`(B, past + S)`: True for real tokens.

    Raises:
        ValueError: a mask of another form, or packed sequences, of which it is not known who sees whom.
    """
    batch, count = tokens.shape[:2]
    expected = (batch, count + (int(cache.get_seq_length()) if cache is not None else 0))
    if attention_mask is None:
        if position_ids is not None and find_packed_sequence_indices(position_ids) is not None:
            raise ValueError("output_compute=True does not know which tokens of packed sequences see each other")
        return torch.ones(expected, dtype=torch.bool, device=tokens.device)
    if isinstance(attention_mask, dict) or tuple(attention_mask.shape) != expected:
        form = "masks by layer type" if isinstance(attention_mask, dict) else tuple(attention_mask.shape)
        raise ValueError(f"output_compute=True takes an attention_mask of shape {expected}, not {form}")
    return attention_mask.bool()
