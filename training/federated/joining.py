"""How a server joins what clients have learned: weighted means, products of LoRA matrices, Adam, clipping and noise.

Unusual here:
- a client's part in a tensor is its examples, in an expert the tokens that chose it, and nothing where it had none.
  Where a private client takes part, who counts no tokens, an expert's part is examples, too;
- the two matrices of a LoRA are joined as one: the new product is the mean of the clients' products. Their factors are
  stacked, which is exact, and cut to the rank again by a singular value decomposition. What the cut leaves out is kept
  on the server, also as factors, and added in the next round, so nothing is lost over rounds;
- no norm and no count of one client decides: both are held against the median of the round.

Shape suffixes: N clients, E experts, R rank, K rank of stacked factors, Y outputs, X inputs.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from chorus_moe.training.federated.arguments import FEDADAM, FederatedArguments
from chorus_moe.training.federated.layout import Layout, Tensors
from chorus_moe.training.federated.updates import Update

Weights = dict[str, Tensor]
# (B (E, Y, R), A (E, R, X)): the product `B @ A` is what a LoRA adds, up to its scale.
Factors = tuple[Tensor, Tensor]
# Of Adam on the server, as in Reddi et al. 2021, arXiv 2003.00295.
BETAS, TAU = (0.9, 0.99), 1e-3


@dataclass
class Joined:
    """What the server holds.

    Attributes:
        weights: of all that is trained.
        rest_a, rest_b: pair -> factors `(E, K, X)` and `(E, Y, K)` of what the rank leaves out.
        first, second: the moments of Adam.
    """

    weights: Weights
    rest_a: Weights = field(default_factory=dict)
    rest_b: Weights = field(default_factory=dict)
    first: Weights = field(default_factory=dict)
    second: Weights = field(default_factory=dict)


def lower_median(values: Sequence[float]) -> float:
    """Of two in the middle the lower: with two clients, the larger one does not decide."""
    return sorted(values)[(len(values) - 1) // 2]


def shares(updates: Sequence[Update], name: str, tensors: Tensors, count_ratio: float) -> Tensor:
    """`(N, E)` in float64: the part of each client in each expert of a tensor; columns add up to 1, or are all 0."""
    counts_NE = torch.zeros(len(updates), tensors.experts, dtype=torch.float64)
    # Rows and tokens cannot be weighed against each other.
    by_tokens = not any(update.is_private for update in updates)
    for row, update in enumerate(updates):
        if name not in update.weights:
            continue
        counts_NE[row] = update.examples
        if update.is_private:
            continue
        if tensors.place is not None:
            chosen_E = update.tokens.get(tensors.place)
            if chosen_E is None or not chosen_E.any():
                counts_NE[row] = 0
            elif not by_tokens:
                continue
            elif tensors.experts > 1:
                counts_NE[row] = chosen_E
            elif tensors.expert is not None:
                counts_NE[row] = chosen_E[tensors.expert]
        elif tensors.modality is not None and not update.seen.get(tensors.modality):
            counts_NE[row] = 0
    for count_N in counts_NE.unbind(1):
        positive = [value for value in count_N.tolist() if value > 0]
        if positive:
            count_N.clamp_(max=count_ratio * lower_median(positive))
    total_E = counts_NE.sum(dim=0)
    return counts_NE / total_E.where(total_E > 0, 1.0)


def factors(weights: Mapping[str, Tensor], pair: str, layout: Layout) -> Factors:
    """The two sides of a LoRA in float64, a matrix for each expert."""
    (name_a, name_b) = sides(pair)
    a, b, experts = weights[name_a].double(), weights[name_b].double(), layout[name_a].experts
    # Experts slowest in A, fastest in B: see `adapter_layout.py`.
    return b.unflatten(1, (-1, experts)).permute(2, 0, 1), a.unflatten(0, (experts, -1))


def unfactored(found: Factors) -> tuple[Tensor, Tensor]:
    """A and B as PEFT has them."""
    b_EYR, a_ERX = found
    return a_ERX.flatten(0, 1), b_EYR.permute(1, 2, 0).flatten(1)


def sides(pair: str) -> tuple[str, str]:
    path, _, adapter = pair.rpartition(".")
    return f"{path}.lora_A.{adapter}.weight", f"{path}.lora_B.{adapter}.weight"


def pairs_of(layout: Layout) -> list[str]:
    """LoRA of which both sides are trained. Where one is, it is a tensor like others: the product is linear in it."""
    found = {tensors.pair for tensors in layout.values() if tensors.pair is not None}
    return sorted(pair for pair in found if all(name in layout for name in sides(pair)))


def change_norm(old: Weights, update: Update, layout: Layout) -> float:
    """How far a client went, over all tensors; of a LoRA, how far the product went."""
    pairs, total = pairs_of(layout), 0.0
    for pair in pairs:
        if sides(pair)[0] in update.weights:
            (b, a), (old_b, old_a) = factors(update.weights, pair, layout), factors(old, pair, layout)
            cross = dot(b, a, old_b, old_a)
            total += max(0.0, dot(b, a, b, a) - 2 * cross + dot(old_b, old_a, old_b, old_a))
    paired = {name for pair in pairs for name in sides(pair)}
    for name, value in update.weights.items():
        if name not in paired:
            total += float((value.double() - old[name].double()).square().sum())
    return math.sqrt(total)


def dot(b: Tensor, a: Tensor, other_b: Tensor, other_a: Tensor) -> float:
    """The sum of the products of the entries of `b @ a` and `other_b @ other_a`, without either."""
    return float(((b.mT @ other_b) * (a @ other_a.mT)).sum())


def scales(norms: Sequence[float], given: FederatedArguments) -> list[float]:
    """What each client's change is multiplied by, 1 at most."""
    # Who has not changed anything does not hold the others back.
    moved, bound = [norm for norm in norms if norm > 0], given.max_update_norm
    if bound is None:
        bound = given.update_norm_ratio * lower_median(moved) if moved else math.inf
    return [min(1.0, bound / norm) if norm > 0 else 1.0 for norm in norms]


def join(
    held: Joined,
    updates: Sequence[Update],
    layout: Layout,
    given: FederatedArguments,
    asked: int,
    generator: torch.Generator | None = None,
) -> tuple[Joined, list[float], list[float]]:
    """One round.

    Args:
        asked: clients that were asked. With noise, each has one part in so many, whatever it sent and counted.
        generator: of the noise.

    Returns:
        What the server holds now; the norm of each client's change, and what it was multiplied by.
    """
    old, is_private = held.weights, given.client_noise > 0
    norms = [change_norm(old, update, layout) for update in updates]
    scale_N = torch.tensor(scales(norms, given), dtype=torch.float64)
    new = Joined(dict(old), dict(held.rest_a), dict(held.rest_b), dict(held.first), dict(held.second))
    pairs = pairs_of(layout)
    if is_private and pairs:
        raise ValueError(
            "federated.client_noise on both sides of a LoRA has no bound: set federated.train_lora_a false"
        )
    parts = {name: shares(updates, name, tensors, given.count_ratio) for name, tensors in layout.items()}
    if is_private:
        parts = {name: _equal(updates, name, tensors, asked) for name, tensors in layout.items()}
    for pair in pairs:
        _join_pair(new, held, updates, pair, parts[sides(pair)[0]] * scale_N[:, None], layout, given)
    paired = {name for pair in pairs for name in sides(pair)}
    for name in sorted(layout.keys() - paired):
        tensors, part_NE = layout[name], parts[name] * scale_N[:, None]
        change = torch.zeros_like(old[name], dtype=torch.float64)
        for update, part_E in zip(updates, part_NE, strict=True):
            if name in update.weights:
                change += tensors.spread(part_E) * (update.weights[name].double() - old[name].double())
        step(new, held, name, change, tensors, part_NE.sum(dim=0) > 0, given, asked, generator)
    return new, norms, scale_N.tolist()


def step(
    new: Joined,
    held: Joined,
    name: str,
    change: Tensor,
    tensors: Tensors,
    touched_E: Tensor,
    given: FederatedArguments,
    asked: int,
    generator: torch.Generator | None,
) -> None:
    """Put a mean change into a tensor: with noise, or by Adam, or as it is."""
    old = held.weights[name]
    if given.client_noise:
        assert given.max_update_norm is not None  # `check_federated` has seen to it
        spread = given.client_noise * given.max_update_norm / asked
        change = change + spread * torch.randn(change.shape, dtype=torch.float64, generator=generator)
    if given.aggregation == FEDADAM:
        touched = tensors.spread(touched_E.double())
        change = touched * adamstep(new, name, change, given.server_learning_rate, touched)
    new.weights[name] = (old.double() + change).to(old.dtype)


def _equal(updates: Sequence[Update], name: str, tensors: Tensors, asked: int) -> Tensor:
    """One part for each client that was asked: what it counts would tell something about it."""
    has_N = torch.tensor([[name in update.weights] for update in updates], dtype=torch.float64)
    return has_N.expand(-1, tensors.experts) / asked


def _join_pair(
    new: Joined,
    held: Joined,
    updates: Sequence[Update],
    pair: str,
    part_NE: Tensor,
    layout: Layout,
    given: FederatedArguments,
) -> None:
    name_a, name_b = sides(pair)
    old_b, old_a = factors(held.weights, pair, layout)
    # What nobody has trained stays bit for bit as it is.
    touched_E = part_NE.sum(dim=0) > 0
    if not touched_E.any():
        return
    parts: list[tuple[Tensor, Factors]] = [(1 - part_NE.sum(dim=0), (old_b, old_a))]
    for update, part_E in zip(updates, part_NE, strict=True):
        if name_a in update.weights:
            parts.append((part_E, factors(update.weights, pair, layout)))
    if given.aggregation == FEDADAM:
        # The gradient of half the squared distance between the product and the mean of the clients' products.
        parts[0] = (-part_NE.sum(dim=0), (old_b, old_a))
        gradient_b = sum(part_E[:, None, None] * (b @ (a @ old_a.mT)) for part_E, (b, a) in parts)
        gradient_a = sum(part_E[:, None, None] * ((old_b.mT @ b) @ a) for part_E, (b, a) in parts)
        changes = unfactored((torch.as_tensor(gradient_b), torch.as_tensor(gradient_a)))
        for name, change in zip((name_a, name_b), changes, strict=True):
            mask = layout[name].spread(touched_E.double())
            step = mask * adamstep(new, name, change, given.server_learning_rate, mask)
            new.weights[name] = (held.weights[name].double() + step).to(held.weights[name].dtype)
        return
    if pair in held.rest_a:
        parts.append((torch.ones_like(part_NE[0]), (held.rest_b[pair].double(), held.rest_a[pair].double())))
    # Side by side, the factors of a sum of products: nothing is approximated here.
    b_EYK = torch.cat([part_E[:, None, None] * b for part_E, (b, _) in parts], dim=2)
    a_EKX = torch.cat([a for _, (_, a) in parts], dim=1)
    (b, a), (rest_b, rest_a) = refactor(b_EYK, a_EKX, old_a.shape[1], like=old_a)
    keep = touched_E[:, None, None]
    found_a, found_b = unfactored((b.where(keep, old_b), a.where(keep, old_a)))
    new.weights[name_a] = found_a.to(held.weights[name_a].dtype)
    new.weights[name_b] = found_b.to(held.weights[name_b].dtype)
    if pair in held.rest_a:
        width = max(rest_a.shape[1], held.rest_a[pair].shape[1])
        rest_b = widen(rest_b, 2, width).where(keep, widen(held.rest_b[pair].double(), 2, width))
        rest_a = widen(rest_a, 1, width).where(keep, widen(held.rest_a[pair].double(), 1, width))
    else:
        rest_b = rest_b * keep
    new.rest_b[pair], new.rest_a[pair] = rest_b.float(), rest_a.float()


def widen(tensor: Tensor, dim: int, size: int) -> Tensor:
    """With zeros behind, up to a size."""
    shape = list(tensor.shape)
    shape[dim] = size - shape[dim]
    return torch.cat([tensor, tensor.new_zeros(shape)], dim=dim)


def rest_share(held: Joined, layout: Layout) -> float:
    """How much of the products the rank leaves out: the norm of the rest over that of the whole, over all LoRA."""
    rest = whole = 0.0
    for pair, rest_a in held.rest_a.items():
        (b, a), (r_b, r_a) = factors(held.weights, pair, layout), (held.rest_b[pair].double(), rest_a.double())
        rest += dot(r_b, r_a, r_b, r_a)
        whole += dot(r_b, r_a, r_b, r_a) + 2 * dot(b, a, r_b, r_a) + dot(b, a, b, a)
    return math.sqrt(rest / whole) if whole > 0 else 0.0


def refactor(b_EYK: Tensor, a_EKX: Tensor, rank: int, like: Tensor) -> tuple[Factors, Factors]:
    """The product `b @ a` as the nearest one of a rank, and the rest, both as factors.

    Rows of the new A are at right angles and as long as those of `like` are on average, as a LoRA begins; all singular
    values go to B. So a direction that the product does not use yet can still be learned: its column of B is zero, its
    row of A is not.
    """
    q_b, r_b = torch.linalg.qr(b_EYK)
    q_a, r_a = torch.linalg.qr(a_EKX.mT)
    left, singular, right = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    # A column for each singular value, largest first.
    columns, rows = q_b @ left * singular[:, None, :], right @ q_a.mT
    length = like.norm(dim=2).mean(dim=1).clamp_min(1e-12)[:, None, None]
    kept = columns[:, :, :rank] / length, rows[:, :rank] * length
    # Zeros are not worth keeping: the rank of the rest grows until it is that of the matrix.
    used = int((singular > 1e-12 * singular[:, :1].clamp_min(1e-30)).any(dim=0).sum())
    return kept, (columns[:, :, rank : max(rank, used)], rows[:, rank : max(rank, used)])


def adamstep(new: Joined, name: str, change: Tensor, rate: float, touched: Tensor) -> Tensor:
    """What Adam makes of a mean change, and its moments moved on where a client took part."""
    for moments, beta, value in ((new.first, BETAS[0], change), (new.second, BETAS[1], change.square())):
        before = moments[name].double() if name in moments else torch.zeros_like(value)
        moments[name] = torch.where(touched > 0, beta * before + (1 - beta) * value, before).float()
    return rate * new.first[name].double() / (new.second[name].double().sqrt() + TAU)
