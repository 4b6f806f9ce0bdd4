"""Kinds of `alignment` that are there for comparison: registered with the model by `import chorus_moe`.

Shape suffixes: H heads, Q query tokens, P tokens of the partner.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from chorus_moe.modeling.configuration_services import SERVICES

# The entropy, as a share of the largest, that `entropy_floor` allows; how many neighbours `pooled` puts together.
MOST_ENTROPY, SPAN = 0.5, 4


def jensen_shannon(p: Tensor, q: Tensor, mask: Tensor) -> Tensor:
    """Jensen-Shannon divergence over the last dimension, in nats (0 to log 2), where `mask` is True."""
    middle = 0.5 * (p + q)

    def divergence(x: Tensor) -> Tensor:
        # `x log x` is 0 at 0, where the logarithm alone is not finite.
        ratio = x.clamp_min(1e-12).log() - middle.clamp_min(1e-12).log()
        return (x * ratio).masked_fill(~mask, 0.0).sum(dim=-1)

    return 0.5 * (divergence(p) + divergence(q))


def both_maps(there_HQP: Tensor, back_HPQ: Tensor, mask_QP: Tensor) -> tuple[Tensor, Tensor]:
    """The text's attention to the image, and the image's to each text token as a distribution over the image."""
    # Not minus infinity: a column that sees nothing would be NaN, also in the gradient.
    low = torch.finfo(torch.float32).min
    p_HQP = there_HQP.masked_fill(~mask_QP, low).softmax(dim=-1)
    back_HPQ = back_HPQ.masked_fill(~mask_QP.T, low).softmax(dim=-1)
    q_HQP = back_HPQ.transpose(1, 2).masked_fill(~mask_QP, 0.0)
    return p_HQP, q_HQP / q_HQP.sum(dim=-1, keepdim=True).clamp_min(1e-12)


def map_distance(there_HQP: Tensor, back_HPQ: Tensor, mask_QP: Tensor) -> Tensor:
    """The divergence of the maps."""
    return jensen_shannon(*both_maps(there_HQP, back_HPQ, mask_QP), mask_QP)


def sharp_map_distance(there_HQP: Tensor, back_HPQ: Tensor, mask_QP: Tensor) -> Tensor:
    """The divergence of the maps, plus what their entropies exceed `MOST_ENTROPY` of the largest."""
    maps = both_maps(there_HQP, back_HPQ, mask_QP)
    most = math.log(max(2, mask_QP.shape[-1]))
    entropies = [torch.special.entr(map_HQP).sum(dim=-1) / most for map_HQP in maps]
    flat = sum((entropy_HQ - MOST_ENTROPY).clamp(min=0) for entropy_HQ in entropies)
    return jensen_shannon(*maps, mask_QP) + flat


def pooled_map_distance(there_HQP: Tensor, back_HPQ: Tensor, mask_QP: Tensor) -> Tensor:
    """The divergence of maps that are averaged over `SPAN` neighbours of the text and of the image."""
    pooled = [F.avg_pool2d(map_HQP, SPAN, ceil_mode=True) for map_HQP in both_maps(there_HQP, back_HPQ, mask_QP)]
    p_HQP, q_HQP = (map_HQP / map_HQP.sum(dim=-1, keepdim=True).clamp_min(1e-12) for map_HQP in pooled)
    return jensen_shannon(p_HQP, q_HQP, torch.ones_like(p_HQP, dtype=torch.bool))


SERVICES["maps"] = map_distance
SERVICES["entropy_floor"] = sharp_map_distance
SERVICES["pooled"] = pooled_map_distance
