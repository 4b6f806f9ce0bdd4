"""Experts that are merged: copies exactly, others by use."""

import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from chorus_moe import ChorusForConditionalGeneration
from chorus_moe.modeling.moe_banks import ExpertBank
from chorus_moe.surgery import merge_experts, prune_experts
from chorus_moe.surgery.experts_merge import aligned_cosines, best_permutation, cluster, expert_neurons
from tests.conftest import tiny_batch, tiny_config


def make(**common: Any) -> ChorusForConditionalGeneration:
    banks = {"common": {"num_experts": 6, "num_experts_per_tok": 1, **common}}
    torch.manual_seed(0)
    return ChorusForConditionalGeneration(tiny_config(expert_banks=banks)).eval()


def bank_of(model: Any, layer: int = 1) -> ExpertBank:
    return model.model.language_model.layers[layer].mlp.banks["common"]


def copy_expert(bank: ExpertBank, source: int, target: int, seed: int) -> None:
    """Another expert becomes the same, with its neurons in another order."""
    order_I = torch.randperm(32, generator=torch.Generator().manual_seed(seed))
    gate, up = bank.experts.gate_up_proj.data[source].chunk(2)
    bank.experts.gate_up_proj.data[target] = torch.cat((gate[order_I], up[order_I]))
    bank.experts.down_proj.data[target] = bank.experts.down_proj.data[source][:, order_I]
    bank.router.weight.data[target] = bank.router.weight.data[source]


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**tiny_batch(model.config)).logits


@pytest.mark.parametrize("similarity", ["weights", "router"])
def test_permuted_copies_merge_exactly(similarity: str) -> None:
    model = make()
    for layer in (1, 2):
        copy_expert(bank_of(model, layer), 1, 4, seed=layer)
        copy_expert(bank_of(model, layer), 3, 5, seed=layer + 10)
        bank_of(model, layer).router.weight.data[4] *= 1 + 1e-3  # so that some tokens prefer the copy
    before, expert = logits_of(model), bank_of(model).experts.gate_up_proj[0].clone()
    report = merge_experts(model, "common", 4, similarity=similarity)
    assert report.notes == [f"common, layer {layer}: merged 1+4, 3+5" for layer in (1, 2)]
    assert torch.equal(bank_of(model).experts.gate_up_proj[0], expert)
    # Each token visits one expert, with weight 1: float32 sums in another order, at logits below 1.
    torch.testing.assert_close(logits_of(model), before, rtol=0, atol=1e-5)


def test_weights_and_router_rows_are_averaged_by_use_after_alignment() -> None:
    model, twin = make(), make()
    bank, old = bank_of(model), bank_of(twin)
    usage = {1: {"common": torch.tensor([3.0, 1.0, 0, 0, 0, 0])}}
    for module in (bank, old):
        module.router.weight.data[1] = module.router.weight.data[0] * 1.1  # the two that are most alike
    merge_experts(model, "common", {1: 5}, usage, similarity="router")
    neurons = expert_neurons(old)
    moved = neurons[1][best_permutation(neurons[1], neurons[0])]
    assert not torch.equal(moved, neurons[1])
    # Averages are float64, rounded once to float32.
    torch.testing.assert_close(expert_neurons(bank)[0], 0.75 * neurons[0] + 0.25 * moved, rtol=1e-6, atol=1e-8)
    rows = old.router.weight.data
    torch.testing.assert_close(bank.router.weight.data[0], 0.75 * rows[0] + 0.25 * rows[1], rtol=1e-6, atol=1e-8)
    assert torch.equal(bank.router.weight.data[1:], rows[2:])


def test_without_alignment_permuted_copies_would_not_merge() -> None:
    bank = bank_of(make())
    copy_expert(bank, 1, 4, seed=0)
    neurons = expert_neurons(bank)
    assert not torch.allclose((neurons[1] + neurons[4]) / 2, neurons[1])
    assert torch.equal(neurons[4][best_permutation(neurons[4], neurons[1])], neurons[1])


def swiglu(expert: Any, x: torch.Tensor) -> torch.Tensor:
    """An expert by its three matrices."""
    gate, up, down = expert
    return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T


def matrices(bank: ExpertBank, expert: int) -> tuple[torch.Tensor, ...]:
    gate, up = bank.experts.gate_up_proj.data[expert].double().chunk(2)
    return gate, up, bank.experts.down_proj.data[expert].double()


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_likeness_is_the_cosine_in_the_best_of_all_orders_whatever_the_norms(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    neurons_EIF = torch.randn(4, 4, 6, dtype=torch.float64, generator=generator)
    neurons_EIF[1] *= scale
    neurons_EIF[2] = neurons_EIF[0][[2, 0, 3, 1]] * scale
    neurons_EIF[3] = 0
    found = aligned_cosines(neurons_EIF)
    for a, b in itertools.combinations(range(3), 2):
        first, second = neurons_EIF[a], neurons_EIF[b]
        every = [(first * second[list(order)]).sum().item() for order in itertools.permutations(range(4))]
        cosine = max(every) / (first.square().sum() * second.square().sum()).sqrt().item()
        assert found[a, b].item() == found[b, a].item() == pytest.approx(cosine, rel=1e-12)
    assert found[0, 2].item() == pytest.approx(1.0)
    assert found[3, :3].tolist() == [0.0, 0.0, 0.0]  # and not NaN


@pytest.mark.parametrize("scale", [1e-4, 0.0])
@pytest.mark.parametrize("used", [None, [1.0, 1.0, 1.0, 1.0, 3.0, 1.0], [1.0, 0.0, 0.0, 1.0, 0.0, 0.0]])
def test_a_faint_or_empty_expert_merges_by_use_and_not_by_norm(scale: float, used: list[float] | None) -> None:
    model = make()
    bank = bank_of(model)
    # Experts 1 and 4 are alike in all but their size, of both the router knows the same.
    copy_expert(bank, 1, 4, seed=0)
    for weight in (bank.experts.gate_up_proj, bank.experts.down_proj):
        weight.data[4] *= scale
    big = matrices(bank, 1)
    usage = None if used is None else {1: {"common": torch.tensor(used)}}
    report = merge_experts(model, "common", {1: 5}, usage, similarity="router")
    assert report.notes == ["common, layer 1: merged 1+4"]
    # The same neurons, each the mean of itself and itself times the scale; nothing used counts as equal use.
    shares = (
        (0.5, 0.5) if used is None or used[1] == 0 else (used[1] / (used[1] + used[4]), used[4] / (used[1] + used[4]))
    )
    mean = [weight * (shares[0] + shares[1] * scale) for weight in big]
    x = torch.randn(5, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    # An expert of zeros has neurons in no order, so it is the computed function that is compared.
    torch.testing.assert_close(swiglu(matrices(bank, 1), x), swiglu(mean, x), rtol=1e-5, atol=1e-8)


def test_a_bank_of_zeros_merges_to_zeros() -> None:
    model = make()
    bank = bank_of(model)
    for weight in (bank.experts.gate_up_proj, bank.experts.down_proj, bank.router.weight):
        weight.data.zero_()
    merge_experts(model, "common", {1: 2})
    assert all(not weight.any() for weight in (bank.experts.gate_up_proj, bank.experts.down_proj, bank.router.weight))


def test_counts_from_before_experts_were_pruned_are_refused_by_name() -> None:
    model = make()
    counts = {layer: {"common": torch.arange(6.0)} for layer in (1, 2)}
    prune_experts(model, {"common": 4}, counts)
    with pytest.raises(
        ValueError, match=r"have shape \(6,\) for 4 experts; scores from before experts were pruned, mer"
    ):
        merge_experts(model, "common", 3, counts)


def test_without_scipy_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match="merge_experts needs scipy to align neurons: pip install scipy"):
        best_permutation(torch.eye(2), torch.eye(2))


def test_clusters_join_the_most_alike_in_the_mean() -> None:
    like = torch.eye(4)
    for a, b, value in ((0, 2, 0.9), (1, 3, 0.5), (0, 3, 0.8), (2, 3, 0.1)):
        like[a, b] = like[b, a] = value
    assert cluster(like, 3) == [[0, 2], [1], [3]]
    assert cluster(like, 2) == [[0, 2], [1, 3]]  # 0.5 against (0.8 + 0.1) / 2


def test_groups_are_merged_within() -> None:
    model = make(num_groups=2, router="sigmoid")
    copy_expert(bank_of(model), 0, 5, seed=0)
    report = merge_experts(model, "common", {1: 4})
    members = [int(e) for part in report.notes[0].split("merged ")[1].split(", ") for e in part.split("+")]
    assert len([e for e in members if e < 3]) == len([e for e in members if e >= 3]) == 2
    assert "0+5" not in report.notes[0]
    assert len(bank_of(model).router.e_score_correction_bias) == 4


def test_a_merged_model_is_saved_and_loaded_bit_for_bit(tmp_path: Path) -> None:
    model = make(router="attention")
    report = merge_experts(model, "common", {1: 2, 2: 4})
    assert report.experts == {"common": {1: (6, 2), 2: (6, 4)}}
    assert report.parameters_after == sum(parameter.numel() for parameter in model.parameters())
    model.save_pretrained(tmp_path)
    loaded = ChorusForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert torch.equal(logits_of(model), logits_of(loaded))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("comon", 3), "unknown bank 'comon'; did you mean 'common'"),
        (("common", 7), "layer 1: 6 experts cannot become 7"),
        (("common", 1), "num_experts=1 leaves"),
        (("common", {0: 3}), r"layer 0 does not hold bank 'common', which is in \[1, 2\]"),
        (("common", 3, {1: {"common": torch.ones(5)}}), r"layer 1 have shape \(5,\) for 6 experts"),
        (("common", 3, None, "outputs"), "unknown similarity 'outputs'"),
    ],
)
def test_what_cannot_be_done_is_refused_and_nothing_changes(arguments: Any, words: str) -> None:
    model, twin = make(), make()
    with pytest.raises(ValueError, match=words):
        merge_experts(model, *arguments)
    left, right = model.state_dict(), twin.state_dict()
    assert all(torch.equal(left[name], right[name]) for name in right)


def test_deep_experts_are_refused_by_their_depth() -> None:
    model = ChorusForConditionalGeneration(tiny_config(expert_banks={"common": {"expert_depth": 2}}))
    with pytest.raises(ValueError, match=r"bank 'common' have expert_depth=2.*prune_experts"):
        merge_experts(model, "common", 2)


def test_experts_whose_leading_part_works_alone_are_refused() -> None:
    model = ChorusForConditionalGeneration(tiny_config(expert_width_shares=[0.5, 1.0]))
    with pytest.raises(ValueError, match=r"expert_width_shares=\[0.5, 1.0\], and merging puts neurons into another"):
        merge_experts(model, "common", 2)
