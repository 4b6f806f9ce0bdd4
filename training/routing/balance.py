"""The correction bias of routers with `balance="bias"`: counts of choices, and one step of every bias.

DeepSeek-V3 (arXiv 2412.19437, section 2.1.2). [`RoutingCallback`] does both for a Trainer.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from chorus_moe.modeling.modeling_outputs import RoutingOfLayer
from chorus_moe.modeling.moe_routers import Router
from chorus_moe.modeling.moe_selection import count_choices
from chorus_moe.surgery.parts import bank_tensor


def balance_counts(routing: Iterable[RoutingOfLayer], sparse_layers: Sequence[int]) -> dict[int, dict[str, Tensor]]:
    """Layer -> bank -> `(E,)` int64: how often real tokens chose each expert in one forward.

    Args:
        routing: the output of that name: one entry for each sparse layer, once for every run of the decoder (the
            contrastive head runs it once a modality).
        sparse_layers: `config.text_config.sparse_layers`.

    Raises:
        ValueError: no entry, or not whole runs.
    """
    layers = list(routing)
    if not layers or len(layers) % len(sparse_layers):
        raise ValueError(f"found the routing of {len(layers)} layers for {len(sparse_layers)} sparse layers")
    # Integers: any order of summation over micro-batches and ranks gives the same step.
    counts: dict[int, dict[str, Tensor]] = {index: {} for index in sparse_layers}
    for place, layer in enumerate(layers):
        found = counts[sparse_layers[place % len(sparse_layers)]]
        for name, of_bank in layer.items():
            count_E = count_choices(of_bank)
            found[name] = found[name] + count_E if name in found else count_E
    return counts


def biased_routers(model: nn.Module) -> dict[int, dict[str, Router]]:
    """Layer -> bank -> router, for the routers that have a correction bias; the keys are those of `balance_counts`.

    An adapter trains a copy of a router, and several adapters have one each: the one that is trained is found.
    """
    found: dict[int, dict[str, Router]] = {}
    for name, module in model.named_modules():
        place = bank_tensor(name)
        if place is not None and isinstance(module, Router) and module.e_score_correction_bias is not None:
            routers = found.setdefault(place.layer, {})
            if module.bank.name not in routers or any(parameter.requires_grad for parameter in module.parameters()):
                routers[module.bank.name] = module
    return found


@torch.no_grad()
def update_balance_bias(router: Router, count_E: Tensor) -> None:
    """Move the bias of every expert by one step, up where fewer than the mean chose it, down where more did (arXiv
    2408.15664).

    A frozen router (none of its parameters is trained) and a bank that no token used keep theirs.

    Args:
        count_E: int64, choices since the last step, summed over micro-batches and ranks by the caller.

    Raises:
        ValueError: the router has no bias, or another number of experts.
    """
    bank, bias_E = router.bank, router.e_score_correction_bias
    # Called by the owner of the optimizer step, never by a forward: evaluation and accumulation cannot move a bias.
    if bias_E is None:
        raise ValueError(f"expert bank {bank.name!r} has balance={bank.balance!r}, so its router has no bias to update")
    if count_E.shape != bias_E.shape:
        raise ValueError(f"expert bank {bank.name!r}: {tuple(count_E.shape)} counts for {bank.num_experts} experts")
    if not any(parameter.requires_grad for parameter in router.parameters()):
        return
    count_E = count_E.to(bias_E.device)
    total = count_E.sum()
    # Compared as whole numbers, `count < total / E`, so that no rounding decides.
    moved_E = bias_E + bank.bias_update_rate * (total - bank.num_experts * count_E).sign()
    # Recentred: a constant in it changes no choice, and would grow without bound.
    bias_E.copy_(torch.where(total > 0, moved_E - moved_E.mean(), bias_E))
