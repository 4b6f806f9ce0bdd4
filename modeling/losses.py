"""Losses of the router and of cross-modal attention: pure functions.

Shape suffixes: T tokens, E experts, K experts per token, B batch, H heads, Q query tokens, P tokens of the partner.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .configuration_banks import ExpertBankConfig
from .configuration_modalities import MODALITY_IDS
from .depth_skip import open_share
from .modeling_outputs import BankRouting, RoutingOfLayer
from .moe_routers import ROUTER_CLASSES, Router
from .moe_selection import count_choices


def counted_logits(routing: BankRouting) -> Tensor:
    """Logits of the rows that count."""
    return routing.router_logits if routing.token_mask is None else routing.router_logits[routing.token_mask]


def _load(routing: BankRouting, router: type[Router]) -> tuple[Tensor, Tensor]:
    """`f_E`, the share of the choices that fell on each expert, and `P_E`, its mean probability; at least one row."""
    logits_TE = counted_logits(routing)
    # The choices really made, sampled, rerouted or limited; padding, other modalities and unused slots are none.
    count_E = count_choices(routing)
    share_E = count_E.to(logits_TE.dtype) / count_E.sum().clamp(min=1)
    return share_E, router.probabilities(logits_TE).mean(dim=0)


def switch_loss(routing: BankRouting, router: type[Router] = Router) -> Tensor:
    """`E * sum_e f_e P_e` (Switch Transformer, arXiv 2101.03961, equations 4 to 6), 1 at perfect balance.

    `f_e` is the share of the choices that fell on expert e and `P_e` its mean probability. The largest value, E / K for
    choices and E for top 1, is reached when the router has collapsed. A bank without tokens gives 0.
    """
    logits_TE = counted_logits(routing)
    if len(logits_TE) == 0:
        # Zero, but in the graph: all ranks of a distributed run must have gradients for the same parameters.
        return logits_TE.sum()
    share_E, mean_E = _load(routing, router)
    return logits_TE.shape[-1] * (share_E * mean_E).sum()


def variance_loss(routing: BankRouting, router: type[Router] = Router) -> Tensor:
    """Sum over experts of the squared deviation of the load from its mean 1 / E, straight through.

    0 at perfect balance, `1 / K - 1 / E` when all tokens choose the same K experts. A bank without tokens gives 0.
    """
    logits_TE = counted_logits(routing)
    if len(logits_TE) == 0:
        return logits_TE.sum()
    share_E, mean_E = _load(routing, router)
    # Choices have no gradient: this has the value of the load f and the gradient of the mean probabilities P.
    load_E = share_E + mean_E - mean_E.detach()
    return (load_E - 1 / logits_TE.shape[-1]).square().sum()


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
    logits_TE = counted_logits(routing)
    if len(logits_TE) == 0:
        return logits_TE.sum()
    return logits_TE.logsumexp(dim=-1).square().mean()


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
    """Average of a loss of a bank's name and routing over all that had tokens.

    Banks without tokens are left out of the mean but stay in the graph, so that every rank of a distributed run sends
    gradients for the same parameters.
    """
    values, counts = [], []
    for layer in layers:
        for name, routing in layer.items():
            values.append(loss(name, routing))
            has_tokens = len(routing.router_logits) if routing.token_mask is None else routing.token_mask.any()
            counts.append(float(bool(has_tokens)))
    if not values:
        return None
    device = values[0].device
    return torch.stack([value.to(device) for value in values]).sum() / max(sum(counts), 1.0)


def _jensen_shannon(p: Tensor, q: Tensor, mask: Tensor) -> Tensor:
    """Jensen-Shannon divergence over the last dimension, in nats (0 to log 2), where `mask` is True."""
    middle = 0.5 * (p + q)

    def divergence(x: Tensor) -> Tensor:
        # `x log x` is 0 at 0, where the logarithm alone is not finite.
        ratio = x.clamp_min(1e-12).log() - middle.clamp_min(1e-12).log()
        return (x * ratio).masked_fill(~mask, 0.0).sum(dim=-1)

    return 0.5 * (divergence(p) + divergence(q))


def alignment_loss(
    query: Tensor, key: Tensor, modality_BS: Tensor, real_BS: Tensor | None, scaling: float, is_causal: bool = True
) -> Tensor:
    """Distance between the two directions of cross-modal attention, averaged over text tokens, images and clips.

    For every sample and each other modality: the text-to-image map (text queries on image keys) and the transposed
    image-to-text map (image queries on text keys), each normalised over the image's tokens, are compared by their
    Jensen-Shannon divergence. In a causal model only pairs are compared in which the text can see the image; the
    reverse map is computed on the same pairs.

    Args:
        query: rotated queries `(B, H, S, C)` of a cross-modal layer.
        key: rotated keys `(B, G, S, C)`.
        modality_BS: `mm_token_type_ids`.
        real_BS: True for real tokens, None when there is no padding.
        scaling: factor on the scores.

    Returns:
        A scalar between 0 and log 2; 0 where no sample has both modalities.
    """
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    total, rows = query.new_zeros((), dtype=torch.float32), 0
    for sample, modality_S in enumerate(modality_BS):
        real_S = torch.ones_like(modality_S, dtype=torch.bool) if real_BS is None else real_BS[sample].bool()
        text = (real_S & (modality_S == MODALITY_IDS["text"])).nonzero().squeeze(1)
        for name, value in MODALITY_IDS.items():
            other = (real_S & (modality_S == value)).nonzero().squeeze(1)
            if name == "text" or len(other) == 0:
                continue
            # In a causal model text sees only what stands before it; the reverse map, which no layer computes there, is
            # made for the same pairs.
            mask_QP = (other[None, :] < text[:, None]) if is_causal else text.new_ones(len(text), len(other)).bool()
            seen = mask_QP.any(dim=-1)
            if not seen.any():
                continue
            text_seen, mask_QP = text[seen], mask_QP[seen]
            there_HQP = (query[sample][:, text_seen] @ key[sample][:, other].transpose(1, 2)).float() * scaling
            back_HPQ = (query[sample][:, other] @ key[sample][:, text_seen].transpose(1, 2)).float() * scaling
            # Not minus infinity: a column that sees nothing would be NaN, also in the gradient.
            low = torch.finfo(torch.float32).min
            p_HQP = there_HQP.masked_fill(~mask_QP, low).softmax(dim=-1)
            back_HPQ = back_HPQ.masked_fill(~mask_QP.T, low).softmax(dim=-1)
            # The image's attention to one text token, as a distribution over the image: comparable with the text's own.
            q_HQP = back_HPQ.transpose(1, 2).masked_fill(~mask_QP, 0.0)
            q_HQP = q_HQP / q_HQP.sum(dim=-1, keepdim=True).clamp_min(1e-12)
            divergence_HQ = _jensen_shannon(p_HQP, q_HQP, mask_QP)
            total, rows = total + divergence_HQ.sum(), rows + divergence_HQ.numel()
    return total / max(rows, 1)


def skip_budget_loss(layers: Sequence[Tensor], real_BS: Tensor | None, budget: float) -> Tensor:
    """Squared distance of the share of open skip gates, see `open_share`, from `1 - budget`."""
    return (open_share(layers, real_BS) - (1 - budget)).square()


def expert_budget_loss(layers: Iterable[RoutingOfLayer], banks: Mapping[str, ExpertBankConfig]) -> Tensor | None:
    """Squared distance of the share of the slots that tokens use, in the mean over the layers of a bank, from
    `mean_experts / K`; averaged over the banks with a learned complexity, None without any."""
    wanted: dict[str, list[Tensor]] = {}
    for layer in layers:
        for name, routing in layer.items():
            if (asked_T := routing.wanted_experts) is not None:
                asked_T = asked_T if routing.token_mask is None else asked_T[routing.token_mask]
                wanted.setdefault(name, []).append(asked_T)
    losses: list[Tensor] = []
    for name, parts in wanted.items():
        asked_T = torch.cat([part.to(parts[0].device) for part in parts])
        # What is counted are whole visits, which have no gradient: that of the number asked for goes straight through.
        visits_T = asked_T + (asked_T.ceil() - asked_T).detach()
        excess = (visits_T - (banks[name].mean_experts or 0.0)).sum() / max(len(visits_T), 1)
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
