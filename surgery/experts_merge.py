"""Fewer experts by merging those that are most alike.

1. Experts are clustered by similarity, two clusters at a time, average linkage (HC-SMoE, arXiv 2410.08589).
2. In each cluster the neurons of the others are put in the order of the most used expert, by the permutation that makes
   their weights most alike (M-SMoE, arXiv 2310.01334, section 3.2): the order of its neurons changes no expert.
3. Weights are averaged by use (M-SMoE, section 3.3).

Not as there: M-SMoE clusters around the most used experts by router logits and HC-SMoE by outputs, both on data. Here
the aligned weights themselves decide, so that no data are needed. M-SMoE keeps all rows of the router and sends several
to one expert. Here a bank has one row per expert: the mean of the rows, by use.

Shape suffixes: E experts in the bank, D hidden size, I expert width (neurons), F = 3D weights of a neuron.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from chorus_moe.modeling.configuration_banks import check_name
from chorus_moe.modeling.modeling_base import ChorusPreTrainedModel
from chorus_moe.modeling.moe_banks import ExpertBank
from chorus_moe.surgery.experts_prune import ExpertScores, get_tensor, read_scores
from chorus_moe.surgery.experts_resize import (
    expert_tensors,
    layers_of_bank,
    replace_experts,
    router_tensors,
    with_counts,
)
from chorus_moe.surgery.parts import decoder_of
from chorus_moe.surgery.report import OperationReport, refuse_adapters

SIMILARITIES = ("weights", "router")
OPERATION = "merge_experts"


@torch.no_grad()
def merge_experts(
    model: ChorusPreTrainedModel,
    bank: str,
    num_experts: int | Mapping[int, int],
    usage: ExpertScores | None = None,
    similarity: str = "weights",
) -> OperationReport:
    """Merge the experts of a bank that are most alike until `num_experts` are left; the module's docstring says how.

    Outputs change; a short training afterwards wins back most of what is lost.

    Args:
        num_experts: how many are left in each layer of the bank, or layer -> how many.
        usage: layer -> bank -> `(E,)`, how often each expert was chosen; all alike if None.
        similarity: what makes two experts alike: their `weights` after alignment, or the rows of the `router`,
            which is quick where there are very many experts.

    Raises:
        ValueError: adapters are active, deep experts, shares of their width, an unknown bank or layer, counts that are
            missing or of another number, or a number that no bank can have. Nothing has been changed then.
        ImportError: scipy is not installed.
    """
    refuse_adapters(model, OPERATION)
    check_name(OPERATION, "similarity", similarity, SIMILARITIES)
    layers = layers_of_bank(model, bank, OPERATION)
    asked = num_experts if isinstance(num_experts, Mapping) else dict.fromkeys(layers, num_experts)
    uses = {}
    if deep := [module for module in layers.values() if len(module.deeper_experts)]:
        # One order of neurons and one similarity serve one feed-forward.
        raise ValueError(
            f"{OPERATION}: the experts of bank {bank!r} have expert_depth={1 + len(deep[0].deeper_experts)}; only "
            "experts of one feed-forward can be merged; prune_experts takes them"
        )
    if shares := model.config.get_text_config().expert_width_shares:
        raise ValueError(
            f"{OPERATION}: expert_width_shares={shares}, and merging puts neurons into another order, so that the "
            "leading ones would be others; prune_experts keeps them"
        )
    for layer, count in asked.items():
        if layer not in layers:
            raise ValueError(f"{OPERATION}: layer {layer} does not hold bank {bank!r}, which is in {list(layers)}")
        module = layers[layer]
        if count > module.num_experts:
            raise ValueError(
                f"{OPERATION}: bank {bank!r}, layer {layer}: {module.num_experts} experts cannot become {count}"
            )
        ones_E = torch.ones(module.num_experts, dtype=torch.float64)
        uses[layer] = ones_E if usage is None else read_scores(usage, layer, bank, module, OPERATION)
    with_counts(decoder_of(model).config, bank, asked)  # refuses before anything is changed
    new, notes = {}, []
    for layer, count in asked.items():
        module = layers[layer]
        neurons_EIF = expert_neurons(module)
        # The first router tensor has one row for each expert in every kind of router.
        rows_E = get_tensor(module, router_tensors(module)[0]).double().cpu()
        clusters = []
        # Groups stay equally large, since the configuration needs that, so each loses the same share of its experts.
        size = module.num_experts // module.router.bank.num_groups
        for first in range(0, module.num_experts, size):  # experts of different groups are never merged
            group = slice(first, first + size)
            like_MM = cosines(rows_E[group]) if similarity == "router" else aligned_cosines(neurons_EIF[group])
            clusters += [[first + e for e in c] for c in cluster(like_MM, count * size // module.num_experts)]
        new[layer] = merged_tensors(module, neurons_EIF, clusters, uses[layer])
        merged = ["+".join(map(str, members)) for members in clusters if len(members) > 1]
        notes.append(f"{bank}, layer {layer}: merged {', '.join(merged) or 'nothing'}")
    return replace_experts(model, OPERATION, {bank: new}, notes)


def expert_neurons(bank: ExpertBank) -> Tensor:
    """`(E, I, 3D)` float64 on the CPU: a neuron's row in the gate, in the up and its column in the down projection."""
    gate_up_EHD, down_EDI = (get_tensor(bank, path).detach().double().cpu() for path in expert_tensors(bank))
    return torch.cat((*gate_up_EHD.chunk(2, dim=1), down_EDI.transpose(1, 2)), dim=2)


def best_permutation(neurons_IF: Tensor, target_IF: Tensor) -> Tensor:
    """`(I,)`: which neuron takes each place of the target, so that the sum of products is largest (Hungarian method).

    Raises:
        ImportError: scipy is not installed.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ImportError("merge_experts needs scipy to align neurons: pip install scipy") from error
    # Rows of the assignment are places of the target, columns the neurons that take them.
    _, index_I = linear_sum_assignment((target_IF @ neurons_IF.T).numpy(), maximize=True)
    return torch.from_numpy(index_I)


def cosines(rows_ED: Tensor) -> Tensor:
    unit_ED = nn.functional.normalize(rows_ED, dim=1)
    return unit_ED @ unit_ED.T


def aligned_cosines(neurons_EIF: Tensor) -> Tensor:
    """`(E, E)`: cosine between the weights of two experts, the neurons of one in the best order for the other."""
    # A permutation does not change the norm, so it is computed once. An expert of zeros gets cosine 0 and not NaN.
    norm_E = neurons_EIF.flatten(1).norm(dim=1).clamp_min(1e-300)
    like_EE = torch.eye(len(neurons_EIF), dtype=torch.float64)
    for a, target_IF in enumerate(neurons_EIF):
        # The best alignment is symmetric: half of the pairs, at a Hungarian method each, is enough.
        for b in range(a):
            moved_IF = neurons_EIF[b][best_permutation(neurons_EIF[b], target_IF)]
            like_EE[a, b] = like_EE[b, a] = (moved_IF * target_IF).sum() / (norm_E[a] * norm_E[b])
    return like_EE


def cluster(like_EE: Tensor, count: int) -> list[list[int]]:
    """Join the two clusters that are most alike in the mean until `count` are left; in the order of their first."""
    clusters = [[expert] for expert in range(len(like_EE))]
    while len(clusters) > count:
        pairs = [(a, b) for b in range(len(clusters)) for a in range(b)]
        a, b = max(pairs, key=lambda pair: like_EE[clusters[pair[0]]][:, clusters[pair[1]]].mean().item())
        clusters[a] = sorted(clusters[a] + clusters.pop(b))
    return clusters


def merged_tensors(
    bank: ExpertBank, neurons_EIF: Tensor, clusters: list[list[int]], use_E: Tensor
) -> dict[str, Tensor]:
    """The tensors of the merged experts."""
    shares = [_shares(use_E[members]) for members in clusters]
    merged = []
    for members, share_M in zip(clusters, shares, strict=True):
        # The most used expert sets the order of the neurons: it is the one whose error costs most.
        target_IF = neurons_EIF[members[int(share_M.argmax())]]
        moved = [neurons_EIF[e][best_permutation(neurons_EIF[e], target_IF)] for e in members]
        merged.append(torch.einsum("m,mif->if", share_M, torch.stack(moved)))
    # Back from neurons to matrices: undoes `expert_neurons`.
    gate_EID, up_EID, down_EID = torch.stack(merged).chunk(3, dim=2)
    tensors = {
        "experts.gate_up_proj": torch.cat((gate_EID, up_EID), dim=1),
        "experts.down_proj": down_EID.transpose(1, 2),
    }
    # One row for each expert, so several old rows become their mean. M-SMoE keeps all rows instead.
    for path in router_tensors(bank):
        rows_E = get_tensor(bank, path).detach().double().cpu()
        means = [torch.tensordot(share_M, rows_E[m], dims=1) for m, share_M in zip(clusters, shares, strict=True)]
        tensors[path] = torch.stack(means)
    return tensors


def _shares(use_M: Tensor) -> Tensor:
    """Shares of the use; equal where nothing was used."""
    # Nothing used would be 0 / 0.
    return use_M / use_M.sum() if use_M.sum() > 0 else torch.full_like(use_M, 1 / len(use_M))
