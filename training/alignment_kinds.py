"""Kinds of `alignment` that are there for comparison: registered with the model by `import chorus_moe`.

Shape suffixes: H heads, Q query tokens, P tokens of the partner.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from chorus_moe.modeling.configuration_services import SERVICES
from chorus_moe.modeling.losses import both_maps, jensen_shannon

# The entropy, as a share of the largest, that `entropy_floor` allows; how many neighbours `pooled` puts together.
MOST_ENTROPY, SPAN = 0.5, 4


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


SERVICES["entropy_floor"] = sharp_map_distance
SERVICES["pooled"] = pooled_map_distance
