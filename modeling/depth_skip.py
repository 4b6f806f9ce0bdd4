"""Layer skipping: a skip gate lets a token skip a layer's feed-forward, or the layer. The cache is always complete.

Shape suffixes: B batch, S sequence, T tokens (B * S), R rows whose skip gate is open, D hidden size.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .layers import TokenGate
from .moe_plan import ForwardPlan


def threshold_logit(skip_threshold: float | None) -> float:
    """The logit above which a skip gate is open: 0, or that of a probability.

    Raises:
        ValueError: a threshold outside 0..1.
    """
    if skip_threshold is None:
        return 0.0
    if not 0 <= skip_threshold <= 1:
        raise ValueError(f"skip_threshold={skip_threshold} is outside 0..1")
    if skip_threshold in (0, 1):
        return math.inf if skip_threshold else -math.inf
    return math.log(skip_threshold / (1 - skip_threshold))


def straight_through(logits: Tensor, open_above: float = 0.0) -> Tensor:
    """1 where the skip gate is open and 0 elsewhere, exactly, with the gradient of the sigmoid (arXiv 1308.3432)."""
    probability = logits.sigmoid()
    return (logits > open_above).to(logits.dtype) + (probability - probability.detach())


class SkipGate(TokenGate):
    """Logits `w x + b` `(B, S)` in float32. It starts open for every token, as if it were not there."""

    # Each token by itself. A top-k over the sequence (Mixture-of-Depths, arXiv 2404.02258) lets later tokens and batch
    # mates decide, and a cached step would differ. In float32, since a rounding near the threshold flips a decision.
    # Open, yet not saturated: the sigmoid still has a gradient, and a model with new skip gates starts as without.
    start_bias = 1.0


def feed_open_tokens(feed_forward: nn.Module, hidden_states: Tensor, plan: ForwardPlan, logits_BS: Tensor) -> Tensor:
    """Output `(B, S, D)` of a feed-forward, zero for tokens whose skip gate is closed."""
    if feed_forward.training or torch.compiler.is_compiling():
        # All rows go in, so that the skip gate learns what skipping would have cost; a graph has no other choice.
        decision_BS1 = straight_through(logits_BS, plan.open_above).unsqueeze(-1)
        return feed_forward(hidden_states, plan)[0] * decision_BS1.to(hidden_states.dtype)
    rows = (logits_BS.reshape(-1) > plan.open_above).nonzero().squeeze(1)
    if len(rows) == logits_BS.numel():
        return feed_forward(hidden_states, plan)[0]
    hidden_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
    # Nothing is computed for the other rows. Banks see those that are left as a batch of their own.
    fed_RD = feed_forward(hidden_TD.index_select(0, rows).unsqueeze(0), plan.at(rows))[0].squeeze(0)
    return torch.zeros_like(hidden_TD).index_copy(0, rows, fed_RD).view_as(hidden_states)


def open_share(layers: Sequence[Tensor], real_BS: Tensor | None) -> Tensor:
    """Mean over real tokens and layers of the open skip gates, straight through.

    Args:
        layers: logits `(B, S)` of each layer with a skip gate.
        real_BS: 1 for real tokens; None when there is no padding.
    """
    open_LBS = torch.stack([straight_through(logits.to(layers[0].device)) for logits in layers])
    if real_BS is None:
        return open_LBS.mean()
    real_BS = real_BS.to(open_LBS)
    return (open_LBS * real_BS).sum() / (len(layers) * real_BS.sum()).clamp(min=1)
