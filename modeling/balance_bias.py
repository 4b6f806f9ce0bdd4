"""Balance without a loss: a correction bias that moves by a fixed step (arXiv 2408.15664; DeepSeek-V3, 2412.19437).

Unusual here:
- nothing moves by itself: whoever owns the optimizer step counts choices over micro-batches and ranks, then calls
  `update_balance_bias` once; so evaluation and accumulation cannot move it;
- counts are integers, so that any order of summation gives the same step;
- the bias is recentred to mean zero: a constant in it changes no choice, and would grow without bound.

Shape suffixes: E experts.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from .losses import RoutingOfLayer, expert_counts
from .routers import Router


def balance_counts(
    router_logits: Iterable[RoutingOfLayer], sparse_layers: Sequence[int]
) -> dict[int, dict[str, Tensor]]:
    """Layer -> bank -> `(E,)` int64: how often real tokens chose each expert in one forward.

    Args:
        router_logits: the output of that name: one entry for each sparse layer, once for every run of the decoder (the
            contrastive head runs it once a modality).
        sparse_layers: `config.text_config.sparse_layers`.

    Raises:
        ValueError: no entry, or not whole runs.
    """
    layers = list(router_logits)
    if not layers or len(layers) % len(sparse_layers):
        raise ValueError(f"found the routing of {len(layers)} layers for {len(sparse_layers)} sparse layers")
    counts: dict[int, dict[str, Tensor]] = {index: {} for index in sparse_layers}
    for place, layer in enumerate(layers):
        found = counts[sparse_layers[place % len(sparse_layers)]]
        for name, routing in layer.items():
            count_E = expert_counts(routing)
            found[name] = found[name] + count_E if name in found else count_E
    return counts


def biased_routers(model: nn.Module) -> dict[int, dict[str, Router]]:
    """Layer -> bank -> router, for the routers that have a correction bias; the keys are those of `balance_counts`.

    An adapter trains a copy of a router, and several adapters have one each: the one that is trained is found.
    """
    found: dict[int, dict[str, Router]] = {}
    for name, module in model.named_modules():
        if isinstance(module, Router) and module.e_score_correction_bias is not None:
            layer = int(name.split(".mlp.banks.")[0].rsplit(".", 1)[1])
            routers = found.setdefault(layer, {})
            if module.bank.name not in routers or any(parameter.requires_grad for parameter in module.parameters()):
                routers[module.bank.name] = module
    return found


@torch.no_grad()
def update_balance_bias(router: Router, count_E: Tensor) -> None:
    """Move the bias of every expert by one step, up where fewer than the mean chose it, down where more did.

    A frozen router (none of its parameters is trained) and a bank that no token used keep theirs.

    Args:
        count_E: int64, choices since the last step, summed over micro-batches and ranks by the caller.

    Raises:
        ValueError: the router has no bias, or another number of experts.
    """
    bank, bias_E = router.bank, router.e_score_correction_bias
    if bias_E is None:
        raise ValueError(f"expert bank {bank.name!r} has balance={bank.balance!r}, so its router has no bias to update")
    if count_E.shape != bias_E.shape:
        raise ValueError(f"expert bank {bank.name!r}: {tuple(count_E.shape)} counts for {bank.num_experts} experts")
    if not any(parameter.requires_grad for parameter in router.parameters()):
        return
    count_E = count_E.to(bias_E.device)
    total = count_E.sum()
    moved_E = bias_E + bank.bias_update_rate * (total - bank.num_experts * count_E).sign()
    bias_E.copy_(torch.where(total > 0, moved_E - moved_E.mean(), bias_E))
