"""Remove experts: those with the highest scores stay, unchanged and in their order.

Unusual here:
- an expert is removed with everything that belongs to it: its rows in the router (`Router.rows_of_experts`), its
  correction bias. The rest is neither rescaled nor moved;
- experts that no token chose can be removed without a change but rounding, where a choice depends on the chosen alone:
  a matrix library may sum a row in another order beside fewer others. Where it does not (see `dependence`), the report
  says so.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from chorus_moe.modeling.configuration_banks import ExpertBankConfig, LayerBankConfig
from chorus_moe.modeling.moe_banks import ExpertBank
from chorus_moe.modeling.moe_routers import ROUTER_CLASSES
from chorus_moe.surgery.experts_resize import (
    NewTensors,
    expert_tensors,
    layers_of_bank,
    replace_experts,
    router_tensors,
    with_counts,
)
from chorus_moe.surgery.parts import decoder_of
from chorus_moe.surgery.report import OperationReport, refuse_adapters

# layer -> bank -> (E,), the higher the more an expert is worth.
ExpertScores = Mapping[int, Mapping[str, Tensor]]
USED = "used"
OPERATION = "prune_experts"
Keep = int | float | str | Mapping[int, int | float | str]


def prune_experts(model: nn.Module, keep: Mapping[str, Keep], scores: ExpertScores) -> OperationReport:
    """Keep the experts with the highest scores of some banks, in each layer separately.

    Outputs are the same to rounding (about 1e-6 in float32) if no token chose a removed expert; the report names
    the settings of a bank that prevent this. `chorus_moe.training.routing.saliency` measures use and saliency.

    Args:
        keep: bank -> how many stay: a number, a fraction of the experts (a float), or "used" (all with a score
            above zero, and as many as a token visits at least); or layer -> one of these, for some layers.
        scores: layer -> bank -> `(E,)`. Ties go to the lower index. Of a bank with groups, as many stay in each.

    Raises:
        ValueError: adapters are active, an unknown bank or layer, scores that are missing or of another number, or
            a number that no bank can have. Nothing has been changed then.
    """
    refuse_adapters(model, OPERATION)
    if not keep:
        raise ValueError("prune_experts: no bank is named")
    kept: dict[str, dict[int, Tensor]] = {}
    for name, wanted in keep.items():
        layers = layers_of_bank(model, name, OPERATION)
        asked = wanted if isinstance(wanted, Mapping) else dict.fromkeys(layers, wanted)
        for layer in asked:
            if layer not in layers:
                raise ValueError(
                    f"prune_experts: layer {layer} does not hold bank {name!r}, which is in {list(layers)}"
                )
        found = {layer: read_scores(scores, layer, name, layers[layer], OPERATION) for layer in asked}
        bank_of = {layer: layers[layer].router.bank for layer in found}
        counts = {i: _count(asked[i], score_E, bank_of[i], f"bank {name!r}, layer {i}") for i, score_E in found.items()}
        with_counts(decoder_of(model).config, name, counts)  # refuses before anything is changed
        kept[name] = {layer: best_of_groups(found[layer], counts[layer], bank_of[layer].num_groups) for layer in found}
    # All banks are checked by now. Tensors are cut in a second loop, so that an error in the last bank leaves the first
    # untouched.
    new: dict[str, NewTensors] = {}
    notes: list[str] = []
    for name, rows in kept.items():
        layers = layers_of_bank(model, name, OPERATION)
        new[name] = {layer: rows_of(layers[layer], index_N) for layer, index_N in rows.items()}
        for layer, index_N in rows.items():
            score_E = read_scores(scores, layer, name, layers[layer], OPERATION)
            notes.append(_note(name, layer, score_E, index_N))
        reason = dependence(next(iter(layers.values())).router.bank)
        if reason and any(len(index_N) < layers[layer].num_experts for layer, index_N in rows.items()):
            notes.append(f"{name}: outputs change even where nothing chose what was taken away, since {reason}")
    return replace_experts(model, OPERATION, new, notes)


def rows_of(bank: ExpertBank, index_N: Tensor) -> dict[str, Tensor]:
    """The tensors of some experts of a bank."""
    tensors = {path: get_tensor(bank, path) for path in (*expert_tensors(bank), *router_tensors(bank))}
    return {path: tensor.detach()[index_N.to(tensor.device)] for path, tensor in tensors.items()}


def best_of_groups(score_E: Tensor, count: int, num_groups: int) -> Tensor:
    """Indices in rising order: the same number from each group of neighbours, its best; ties go to the lower index."""
    score_GM = score_E.view(num_groups, -1)
    # Stable, so that ties go to the lower index, as everywhere in routing.
    order_GM = score_GM.argsort(dim=1, descending=True, stable=True)[:, : count // num_groups]
    first_G1 = torch.arange(num_groups, device=score_E.device)[:, None] * score_GM.shape[1]
    # Rising order: experts that stay keep their order, so sums over experts keep theirs.
    return (order_GM + first_G1).flatten().sort().values


def dependence(bank: LayerBankConfig) -> str | None:
    """Why a token's choices or weights depend on experts that it does not choose; None where they do not."""
    if reason := ROUTER_CLASSES[bank.router].dependence(bank):
        return reason
    if bank.adaptive_experts and bank.mean_experts is None:
        return "adaptive_experts counts by the entropy of the scores of all"
    if bank.topk_groups not in (None, bank.num_groups):
        return f"topk_groups={bank.topk_groups} ranks groups by the two best scores in them"
    if isinstance(bank.expert_capacity, float):
        return f"expert_capacity={bank.expert_capacity} is a factor on the even share of all experts"
    return None


def read_scores(scores: ExpertScores, layer: int, name: str, bank: ExpertBank, operation: str) -> Tensor:
    """`(E,)` float64 on the CPU; raises ValueError where they are missing, of another number or not finite."""
    where = f"{operation}: scores of bank {name!r}, layer {layer}"
    if layer not in scores or name not in scores[layer]:
        raise ValueError(f"{where} are missing")
    score_E = scores[layer][name].detach()
    if score_E.shape != (bank.num_experts,):
        raise ValueError(
            f"{where} have shape {tuple(score_E.shape)} for {bank.num_experts} experts; scores from before experts "
            "were pruned, merged or added belong to other experts: measure them again"
        )
    if not score_E.isfinite().all():
        raise ValueError(f"{where} are not finite")
    return score_E.double().cpu()


def _count(wanted: Any, score_E: Tensor, bank: LayerBankConfig, where: str) -> int:
    """How many experts stay."""
    if wanted == USED:
        # Every group keeps as many as the group with the most used experts: groups must stay equally large.
        used_G = (score_E.view(bank.num_groups, -1) > 0).sum(dim=1)
        return max(int(used_G.max()) * bank.num_groups, least_experts(bank))
    if isinstance(wanted, float) and 0 < wanted <= 1:
        wanted = max(round(wanted * bank.num_experts / bank.num_groups), 1) * bank.num_groups
    # `True` is an `int` for Python and would keep one expert.
    if isinstance(wanted, bool) or not isinstance(wanted, int):
        raise ValueError(
            f"prune_experts: {where}: keep={wanted!r} is neither a whole number, nor a fraction above 0 and up to 1, "
            f"nor {USED!r}"
        )
    if wanted > bank.num_experts:
        raise ValueError(f"prune_experts: {where}: cannot keep {wanted} of {bank.num_experts} experts")
    return wanted


def least_experts(bank: ExpertBankConfig) -> int:
    """So many experts a bank needs: whole groups, in which a token fills its slots and the router has a choice."""
    open_groups = bank.topk_groups or bank.num_groups
    a_group = max(-(-bank.num_experts_per_tok // open_groups), -(-2 // bank.num_groups))
    return a_group * bank.num_groups


def _note(name: str, layer: int, score_E: Tensor, index_N: Tensor) -> str:
    if len(index_N) == len(score_E):
        return f"{name}, layer {layer}: nothing was taken away, all {len(score_E)} experts stay"
    total, lost = score_E.sum().item(), (score_E.sum() - score_E[index_N].sum()).item()
    share = f"{lost / total:.1%} of the scores" if total > 0 else "no score"
    return f"{name}, layer {layer}: what was taken away had {share}"


def get_tensor(bank: ExpertBank, path: str) -> Tensor:
    owner, _, name = path.rpartition(".")
    return getattr(bank.get_submodule(owner), name)
