"""Losses of the router and of cross-modal attention: pure functions.

Shape suffixes: T tokens, E experts, K experts per token, B batch, H heads, Q query tokens, P tokens of the partner.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .configuration_banks import ExpertBankConfig
from .configuration_modalities import MODALITY_IDS
from .configuration_services import SERVICES, service
from .depth_skip import open_share
from .modeling_outputs import BankRouting, RoutingOfLayer
from .moe_routers import ROUTER_CLASSES, Router
from .moe_selection import count_choices


def bank_sums(routing: BankRouting, router: type[Router] = Router) -> Tensor:
    """`(2E + 3,)`, sums over the rows that count: choices and probabilities of each expert, visits that a learned
    complexity asks for, `logsumexp(logits)^2`, and the rows themselves."""
    if routing.sums is not None:
        return routing.sums
    # Sums of no rows are zeros in the graph: all ranks of a distributed run must have gradients for all parameters.
    logits_TE, asked_T = routing.router_logits, routing.wanted_experts
    logits_TE = logits_TE if routing.token_mask is None else logits_TE[routing.token_mask]
    if asked_T is None or routing.token_mask is not None:
        asked_T = logits_TE[:, 0] * 0 if asked_T is None else asked_T[routing.token_mask]
    # What is counted are whole visits, which have no gradient: that of the number asked for goes straight through.
    visits, z = (asked_T + (asked_T.ceil() - asked_T).detach()).sum(), logits_TE.logsumexp(dim=-1).square().sum()
    # The choices really made, sampled, rerouted or limited; padding, other modalities and unused slots are none.
    count_E, probs_E = count_choices(routing).to(logits_TE.dtype), router.probabilities(logits_TE).sum(dim=0)
    return torch.cat((count_E, probs_E, torch.stack((visits, z, z.new_tensor(len(logits_TE))))))


def over_batch(sums: Tensor) -> Tensor:
    """Sums over the rows of all ranks, where a run has entered how: losses are then those of the whole batch."""
    return SERVICES["sum_over_batch"](sums) if "sum_over_batch" in SERVICES else sums


def with_sums(layers: Sequence[RoutingOfLayer], banks: Mapping[str, ExpertBankConfig]) -> list[RoutingOfLayer]:
    """The routing with the sums of its banks, over all ranks in one exchange."""
    sums = [bank_sums(bank, ROUTER_CLASSES[banks[n].router]) for layer in layers for n, bank in layer.items()]
    if not sums:
        return list(layers)
    flat = over_batch(torch.cat([part.to(sums[0].device) for part in sums]))
    rest = (part.to(own.device) for part, own in zip(flat.split([len(s) for s in sums]), sums, strict=True))
    return [{name: bank._replace(sums=next(rest)) for name, bank in layer.items()} for layer in layers]


def _load(routing: BankRouting, router: type[Router]) -> tuple[Tensor, Tensor]:
    """`f_E`, the share of the choices that fell on each expert, and `P_E`, its mean probability; zeros without rows."""
    sums, num_experts = bank_sums(routing, router), routing.router_logits.shape[-1]
    count_E, probs_E = sums[:num_experts], sums[num_experts : 2 * num_experts]
    return count_E / count_E.sum().clamp(min=1), probs_E / sums[-1].clamp(min=1)


def switch_loss(routing: BankRouting, router: type[Router] = Router) -> Tensor:
    """`E * sum_e f_e P_e` (Switch Transformer, arXiv 2101.03961, equations 4 to 6), 1 at perfect balance.

    `f_e` is the share of the choices that fell on expert e and `P_e` its mean probability. The largest value, E / K for
    choices and E for top 1, is reached when the router has collapsed. A bank without tokens gives 0.
    """
    share_E, mean_E = _load(routing, router)
    return len(share_E) * (share_E * mean_E).sum()


def variance_loss(routing: BankRouting, router: type[Router] = Router) -> Tensor:
    """Sum over experts of the squared deviation of the load from its mean 1 / E, straight through.

    0 at perfect balance, `1 / K - 1 / E` when all tokens choose the same K experts. A bank without tokens gives 0.
    """
    share_E, mean_E = _load(routing, router)
    # Choices have no gradient: this has the value of the load f and the gradient of the mean probabilities P.
    load_E = share_E + mean_E - mean_E.detach()
    return (load_E - 1 / len(load_E)).square().sum() * (bank_sums(routing, router)[-1] > 0)


def cv2_loss(routing: BankRouting, router: type[Router] = Router) -> Tensor:
    """Squared coefficient of variation of the load: its variance over the square of its mean (arXiv 1701.06538,
    equation 7), straight through. The variance is that of all E experts (divided by E, not by E - 1).

    0 at perfect balance, `E / K - 1` when all tokens choose the same K experts: E times `variance`, so that the same
    coefficient serves banks of any size. A bank without tokens gives 0.
    """
    return routing.router_logits.shape[-1] * variance_loss(routing, router)


BALANCE_LOSSES: dict[str, Callable[[BankRouting, type[Router]], Tensor]] = {
    "switch": switch_loss,
    "cv2": cv2_loss,
    "variance": variance_loss,
}


def z_loss(routing: BankRouting) -> Tensor:
    """Mean of `logsumexp(logits)^2` (ST-MoE, arXiv 2202.08906, equation 5). A bank without tokens gives 0."""
    sums = bank_sums(routing)
    return sums[-2] / sums[-1].clamp(min=1)


def balance_loss(layers: Iterable[RoutingOfLayer], banks: Mapping[str, ExpertBankConfig]) -> Tensor | None:
    """Each bank's own balance loss, averaged over banks and layers that have one; None if none has."""
    # Per bank and layer, then averaged: taken over all at once, banks and layers that lean opposite ways would cancel.
    balanced = [{name: routing for name, routing in layer.items() if banks[name].has_balance_loss} for layer in layers]

    def loss(name: str, routing: BankRouting) -> Tensor:
        return BALANCE_LOSSES[banks[name].balance](routing, ROUTER_CLASSES[banks[name].router])

    return _mean(balanced, loss)


def mean_over_banks(layers: Iterable[RoutingOfLayer], loss: Callable[[BankRouting], Tensor]) -> Tensor | None:
    """Average of a loss over every bank of every layer that had tokens; None if there is no sparse layer."""
    return _mean(layers, lambda _, routing: loss(routing))


def _mean(layers: Iterable[RoutingOfLayer], loss: Callable[[str, BankRouting], Tensor]) -> Tensor | None:
    """Average of a loss of a bank's name and routing over all that had tokens; the others stay in the graph, so that
    every rank of a distributed run sends gradients for the same parameters."""
    pairs = [(name, routing) for layer in layers for name, routing in layer.items()]
    if not pairs:
        return None
    values = [loss(name, routing) for name, routing in pairs]
    counts = torch.stack([(bank_sums(routing)[-1] > 0).to(values[0].device) for _, routing in pairs])
    return torch.stack([value.to(values[0].device) for value in values]).sum() / counts.sum().clamp(min=1)


def _score_distance(there_HQP: Tensor, back_HPQ: Tensor, mask_QP: Tensor) -> Tensor:
    # What a row or a column has in common is no bond between a word and a region.
    scores = (there_HQP, back_HPQ.transpose(1, 2))
    there_HN, back_HN = (
        (s - s.mean(dim=1, keepdim=True) - s.mean(dim=2, keepdim=True) + s.mean((1, 2), True)).flatten(1)
        for s in scores
    )
    return 1 - F.cosine_similarity(there_HN, back_HN, dim=-1, eps=1e-6)


# Kind -> distance of the two directions; those that are there for comparison come from the package.
MAP_DISTANCES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"log_odds": _score_distance}


def alignment_loss(
    query: Tensor,
    key: Tensor,
    modality_BS: Tensor,
    real_BS: Tensor | None,
    scaling: float,
    is_causal: bool = True,
    kind: str = "log_odds",
) -> Tensor:
    """How badly text and the images or clips of its sample go together in cross-modal attention.

    Most kinds compare, for every sample and each other modality, the text-to-image scores (text queries on image keys)
    with the transposed image-to-text scores (image queries on text keys), which no causal layer computes:

    - `log_odds`: one minus the cosine of the two, each less the means of its rows and columns. Flat maps gain nothing;
    - `maps`: the Jensen-Shannon divergence of the two, each normalised over the image's tokens. It falls fastest where
      both become flat. In a causal model the pairs count in which the text can see the image. `entropy_floor` and
      `pooled` change it in two ways. These three are there for comparison; see `training.alignment_kinds`.

    `contrastive` takes the text-to-image scores alone: those of a text on its own image must be larger than on the
    images of the other samples, and an image's own text must look at it more than other texts do. It depends on the
    batch, and is 0 for a single sample. In a causal model it reads the text behind the last image alone.

    Args:
        query: rotated queries `(B, H, S, C)` of a cross-modal layer.
        key: rotated keys `(B, G, S, C)`.
        modality_BS: `mm_token_type_ids`.
        real_BS: True for real tokens, None when there is no padding.
        scaling: factor on the scores.

    Returns:
        A scalar, the mean over text tokens or samples, and heads: 0 without any pair. Divergences are at most log 2.
    """
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    if kind == "contrastive":
        return _contrast(query, key, modality_BS, real_BS, scaling, is_causal)
    distance = MAP_DISTANCES[kind] if kind in MAP_DISTANCES else service(kind, f"alignment={kind!r}")
    total, rows = query[:0].float().sum(), 0  # in the graph, also where nothing is compared
    for sample, modality_S in enumerate(modality_BS):
        real_S = torch.ones_like(modality_S, dtype=torch.bool) if real_BS is None else real_BS[sample].bool()
        text = (real_S & (modality_S == MODALITY_IDS["text"])).nonzero().squeeze(1)
        for name, value in MODALITY_IDS.items():
            other = (real_S & (modality_S == value)).nonzero().squeeze(1)
            if name == "text" or len(other) == 0:
                continue
            mask_QP = (other[None, :] < text[:, None]) if is_causal else text.new_ones(len(text), len(other)).bool()
            seen = mask_QP.any(dim=-1)
            if not seen.any():
                continue
            text_seen, mask_QP = text[seen], mask_QP[seen]
            there_HQP = (query[sample][:, text_seen] @ key[sample][:, other].transpose(1, 2)).float() * scaling
            back_HPQ = (query[sample][:, other] @ key[sample][:, text_seen].transpose(1, 2)).float() * scaling
            distances = distance(there_HQP, back_HPQ, mask_QP)
            total, rows = total + distances.sum(), rows + distances.numel()
    total, count = over_batch(torch.stack((total, total.new_tensor(rows))))
    return total / count.clamp(min=1)


def _contrast(
    query: Tensor, key: Tensor, modality_BS: Tensor, real_BS: Tensor | None, scaling: float, is_causal: bool
) -> Tensor:
    """`contrastive`, of keys that were repeated for each query head; mean over modalities."""
    real_BS = torch.ones_like(modality_BS, dtype=torch.bool) if real_BS is None else real_BS.bool()
    losses = [query[:0].float().sum()]  # in the graph, also where nothing is to be told apart
    for name, value in MODALITY_IDS.items():
        text_BS, other_BS = real_BS & (modality_BS == MODALITY_IDS["text"]), real_BS & (modality_BS == value)
        if is_causal:  # text that no image comes after sees all of them
            text_BS = text_BS & (other_BS.flip(1).cumsum(dim=1).flip(1) == 0)
        both = (text_BS.any(dim=1) & other_BS.any(dim=1)).nonzero().squeeze(1)
        if name == "text" or len(both) < 2:
            continue
        scores_BHB = pair_scores(query[both], key[both], text_BS[both], other_BS[both], scaling)
        losses.append(torch.stack([infonce_loss(scores_BB) for scores_BB in scores_BHB.transpose(0, 1)]).mean())
    return torch.stack(losses).sum() / max(1, len(losses) - 1)


def pair_scores(query: Tensor, key: Tensor, text_BS: Tensor, other_BS: Tensor, scaling: float) -> Tensor:
    """`(B, H, B)`: how much each text looks at the image of each sample: the mean over its tokens of the logarithm of
    the mean over the image's tokens of the exponential of the scores."""
    columns = []
    for sample, other_S in enumerate(other_BS):
        scores_BHSP = (query @ key[sample, :, other_S].transpose(1, 2)).float() * scaling
        looks_BHS = scores_BHSP.logsumexp(dim=-1) - math.log(int(other_S.sum()))
        columns.append((looks_BHS * text_BS[:, None]).sum(dim=-1) / text_BS.sum(dim=-1)[:, None])
    return torch.stack(columns, dim=-1)


def skip_budget_loss(layers: Sequence[Tensor], real_BS: Tensor | None, budget: float) -> Tensor:
    """Squared distance of the share of open skip gates, see `open_share`, from `1 - budget`."""
    share = open_share(layers, real_BS)
    count = share.new_tensor(layers[0].numel()) if real_BS is None else real_BS.sum().to(share)
    opened, count = over_batch(torch.stack((share * count, count)))
    return (opened / count.clamp(min=1) - (1 - budget)).square()


def expert_budget_loss(layers: Iterable[RoutingOfLayer], banks: Mapping[str, ExpertBankConfig]) -> Tensor | None:
    """Squared distance of the share of the slots that tokens use, in the mean over the layers of a bank, from
    `mean_experts / K`; averaged over the banks with a learned complexity, None without any."""
    wanted: dict[str, list[Tensor]] = {}
    for layer in layers:
        for name, routing in layer.items():
            if routing.wanted_experts is not None:
                wanted.setdefault(name, []).append(bank_sums(routing)[-3:])
    losses: list[Tensor] = []
    for name, parts in wanted.items():
        visits, _, rows = torch.stack([part.to(parts[0].device) for part in parts]).sum(dim=0)
        excess = visits / rows.clamp(min=1) - (banks[name].mean_experts or 0.0) * (rows > 0)
        losses.append((excess / banks[name].num_experts_per_tok).square())
    return torch.stack([loss.to(losses[0].device) for loss in losses]).mean() if losses else None


def share_of_batch(labels: Tensor | None, num_items_in_batch: Tensor | int | None) -> Tensor | float:
    """This micro-batch's share of the tokens that the step is normalised by.

    The Trainer divides the language loss by the tokens of the whole accumulated, distributed batch. A term that is a
    mean over the micro-batch must carry the same weight, or its coefficient grows with accumulation steps and ranks.
    """
    if num_items_in_batch is None or labels is None:
        return 1.0
    return (labels[..., 1:] != -100).sum() / torch.as_tensor(num_items_in_batch).clamp(min=1)


def infonce_loss(scores_BB: Tensor) -> Tensor:
    """CLIP (arXiv 2103.00020): row i and column i belong together, every other one of the batch is a negative."""
    target_B = torch.arange(len(scores_BB), device=scores_BB.device)
    return (F.cross_entropy(scores_BB.float(), target_B) + F.cross_entropy(scores_BB.T.float(), target_B)) / 2


def sigmoid_loss(scores_BB: Tensor) -> Tensor:
    """SigLIP (arXiv 2303.15343): of each pair alone, whether it belongs together; summed, and divided by the rows."""
    signs_BB = 2 * torch.eye(len(scores_BB), device=scores_BB.device) - 1
    return -F.logsigmoid(signs_BB * scores_BB.float()).sum() / len(scores_BB)


CONTRASTIVE_LOSSES: dict[str, Callable[[Tensor], Tensor]] = {"infonce": infonce_loss, "sigmoid": sigmoid_loss}


def rows_of_all_ranks(own_BD: Tensor, copies: int = 1) -> Tensor:
    """The rows of all ranks, which may have different numbers of them; those of one process as they are.

    All ranks compute one loss of them, and each the gradient of its own rows. It is multiplied by the ranks, by which
    the averaging of gradients divides: together they learn what one process learns of all rows.

    Args:
        copies: neighbouring ranks that hold the same rows, as under tensor parallelism.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == copies:
        return own_BD
    rank, ranks = dist.get_rank(), range(dist.get_rank() % copies, dist.get_world_size(), copies)
    sizes = [torch.zeros(1, dtype=torch.int64, device=own_BD.device) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, sizes[0] + len(own_BD))
    padded = F.pad(own_BD.detach(), (0, 0, 0, int(max(sizes)) - len(own_BD)))
    rows = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(rows, padded)
    own = own_BD + (len(ranks) - 1) * (own_BD - own_BD.detach())
    return torch.cat([own if other == rank else rows[other][: int(sizes[other])] for other in ranks])
