"""A client's change as the vector that goes into a masked sum, and what the server makes of the sum.

Unusual here:
- the client does what the server cannot do under masks: it looks for values that are no numbers, clips its change, and
  gives weights. All its numbers come to lie between -1 and 1, as Flower's quantisation wants them;
- weights stand in the sum beside the changes, one for each tensor or expert: a client that has not reached one adds
  nothing to it, as without masks. Their grid is that of the quantisation, so they are added without an error.

Shape suffixes: P numbers of all trained tensors, Q weights: an expert, or a tensor without experts, has one each.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from chorus_moe.training.federated.arguments import FederatedArguments
from chorus_moe.training.federated.joining import Joined, Weights, shares, step
from chorus_moe.training.federated.layout import Layout
from chorus_moe.training.federated.updates import Refused, Update

Vector = NDArray[np.float64]
# Integers that Flower quantises to; the sum of 1,024 of them fits into its 2^32. Rounding goes up or down by chance.
LEVELS, MOST_CLIENTS = 2**22, 1024
STEP = 2.0 / LEVELS


@dataclass(frozen=True)
class MaskedMean:
    """What the sum of masked vectors says.

    Attributes:
        changes: tensor -> the weighted mean of the clients' changes; 0 where nobody has a weight.
        weights: tensor -> `(E,)`, the sum of the clients' weights, each 1 at most.
        clients: how many are in the sum.
        norm: of the mean over all of them.
    """

    changes: Weights
    weights: Weights
    clients: int
    norm: float


def grid(weight: float) -> float:
    """The nearest weight above 0 that quantisation leaves as it is."""
    return max(1, round(weight / STEP)) * STEP


def rounding_norm(layout: Layout) -> float:
    """How far rounding takes a vector at most."""
    return STEP * math.sqrt(sum(math.prod(tensors.shape) for tensors in layout.values()))


def to_vector(update: Update, old: Mapping[str, Tensor], layout: Layout, bound: float, most: int) -> list[Vector]:
    """`(P,)` weighted changes over the bound, and `(Q,)` weights.

    Args:
        old: the weights that the round began with.
        bound: the norm to which the change is clipped. What rounding may add is kept free.
        most: rows from which on a client has weight 1.

    Raises:
        Refused: a value that is no finite number.
    """
    weight = grid(min(update.examples, most) / most)
    changes, parts = [], []
    for name, tensors in sorted(layout.items()):
        # Of one client alone: 1 where it has a part, 0 where it has none.
        part_E = shares([update], name, tensors, math.inf)[0]
        new = update.weights.get(name, old[name]).detach().cpu()
        if not new.isfinite().all():
            raise Refused(f"training made {name} values that are not finite numbers: this client leaves the round out")
        changes.append((tensors.spread(part_E) * (new.double() - old[name].double())).flatten())
        parts.append(part_E)
    change_P = torch.cat(changes)
    room = bound * (1 - rounding_norm(layout))
    norm = float(change_P.norm())
    change_P *= weight * min(1.0, room / norm if norm > 0 else 1.0) / bound
    return [change_P.numpy(), (weight * torch.cat(parts)).numpy()]


def from_sum(total: list[Vector], layout: Layout, bound: float, clients: int) -> MaskedMean:
    """The mean of the clients' changes, from the sum of their vectors.

    Raises:
        ValueError: a sum that clients who clipped, weighed and kept to the protocol cannot have.
    """
    sum_P, sum_Q = (torch.from_numpy(np.ascontiguousarray(part)) for part in total)
    # Sums of numbers on the grid; what floating point made of them goes.
    sum_Q = (sum_Q / STEP).round() * STEP
    heaviest = float(sum_Q.max())
    if not 0 < heaviest <= clients or float(sum_Q.min()) < 0:
        raise ValueError(f"weights in the sum reach from {sum_Q.min():.3g} to {heaviest:.3g}, of {clients} clients")
    longest = float(sum_P.norm())
    if not longest <= clients * (1 + rounding_norm(layout)):
        raise ValueError(
            f"the sum of {clients} masked changes has norm {longest * bound:.3g}, more than {clients} x {bound:g}"
        )
    changes, weights, place, column = Weights(), Weights(), 0, 0
    for name, tensors in sorted(layout.items()):
        size = math.prod(tensors.shape)
        total_E = weights[name] = sum_Q[column : column + tensors.experts]
        mean = sum_P[place : place + size].view(tensors.shape) * bound
        changes[name] = mean * tensors.spread((1 / total_E).where(total_E > 0, 0.0))
        place, column = place + size, column + tensors.experts
    norm = math.sqrt(sum(float(change.square().sum()) for change in changes.values()))
    return MaskedMean(changes, weights, clients, norm)


def join_mean(
    held: Joined,
    mean: MaskedMean,
    layout: Layout,
    given: FederatedArguments,
    asked: int,
    generator: torch.Generator | None = None,
) -> Joined:
    """One round of which the server knows the mean alone. With noise, as in `join`, each client that was asked has one
    part; the clients have clipped their changes, so one that kept to it is covered whatever others do."""
    new = Joined(dict(held.weights), dict(held.rest_a), dict(held.rest_b), dict(held.first), dict(held.second))
    for name, tensors in sorted(layout.items()):
        weight_E, change = mean.weights[name], mean.changes[name]
        if given.client_noise:
            change = change * tensors.spread(weight_E / asked)
        step(new, held, name, change, tensors, weight_E > 0, given, asked, generator)
    return new


def vector_shapes(layout: Layout) -> list[tuple[int, ...]]:
    """Of what `to_vector` makes."""
    sizes = sum(math.prod(tensors.shape) for tensors in layout.values())
    return [(sizes,), (sum(tensors.experts for tensors in layout.values()),)]
