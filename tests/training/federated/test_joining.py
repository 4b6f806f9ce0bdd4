"""The maths of a round, against sums written out over dense matrices."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from chorus_moe.training.federated.arguments import FederatedArguments
from chorus_moe.training.federated.joining import Joined, change_norm, factors, join, scales, shares
from chorus_moe.training.federated.layout import Layout, Tensors
from chorus_moe.training.federated.updates import Update

EXPERTS, RANK, OUT, IN = 3, 2, 7, 5
A, B = "layer.experts.lora_A.default.weight", "layer.experts.lora_B.default.weight"
PAIR, PLACE = "layer.experts.default", (1, "text")
LAYOUT: Layout = {
    A: Tensors((EXPERTS * RANK, IN), PLACE, EXPERTS, side="A", pair=PAIR),
    B: Tensors((OUT, RANK * EXPERTS), PLACE, EXPERTS, side="B", pair=PAIR),
}
# The medians do not interfere.
WIDE = FederatedArguments(update_norm_ratio=1e9, count_ratio=1e9)


def update(weights: dict[str, Tensor], tokens: list[int] | None = None, examples: int = 1, **seen: int) -> Update:
    counts = {} if tokens is None else {PLACE: torch.tensor(tokens)}
    return Update(1, "", examples, weights, counts, seen)


def random_lora(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(tensors.shape, generator=generator) for name, tensors in LAYOUT.items()}


def dense(weights: dict[str, Tensor]) -> Tensor:
    """`(E, out, in)`, read off PEFT's layout entry by entry."""
    a, b = weights[A].double(), weights[B].double()
    return torch.stack([b[:, expert::EXPERTS] @ a[expert * RANK : (expert + 1) * RANK] for expert in range(EXPERTS)])


def rest(held: Joined) -> Tensor:
    return held.rest_b[PAIR].double() @ held.rest_a[PAIR].double()


def test_the_product_is_the_mean_of_the_clients_products_by_the_tokens_of_each_expert() -> None:
    start, clients = Joined(random_lora(0)), [random_lora(seed) for seed in (1, 2, 3)]
    tokens = [[1, 5, 0], [2, 0, 0], [3, 5, 0]]
    new, _, _ = join(start, [update(*pair) for pair in zip(clients, tokens, strict=True)], LAYOUT, WIDE, asked=3)
    for expert in (0, 1):
        total = sum(counts[expert] for counts in tokens)
        mean = sum(counts[expert] / total * dense(found)[expert] for counts, found in zip(tokens, clients, strict=True))
        whole = dense(new.weights)[expert] + rest(new)[expert]
        # float32 factors of numbers of size 5: worst difference seen 4e-7.
        assert torch.allclose(whole, torch.as_tensor(mean), atol=3e-6)
        left, singular, right = torch.linalg.svd(torch.as_tensor(mean))
        nearest = left[:, :RANK] * singular[:RANK] @ right[:RANK]
        assert torch.allclose(dense(new.weights)[expert], nearest, atol=3e-6)


def test_an_expert_that_no_token_chose_stays_bit_for_bit() -> None:
    start = Joined(random_lora(0))
    new, _, _ = join(start, [update(random_lora(1), [1, 1, 0])], LAYOUT, WIDE, asked=1)
    assert torch.equal(new.weights[A][2 * RANK :], start.weights[A][2 * RANK :])
    assert torch.equal(new.weights[B][:, 2::EXPERTS], start.weights[B][:, 2::EXPERTS])
    assert not rest(new)[2].any()


def test_what_a_rank_leaves_out_comes_back_in_the_next_round() -> None:
    held = Joined(random_lora(0))
    first, _, _ = join(held, [update(random_lora(seed), [1, 1, 1]) for seed in (1, 2)], LAYOUT, WIDE, asked=2)
    # Nobody learns anything in the second round: clients send what they got.
    second, _, _ = join(first, [update(first.weights, [1, 1, 0])], LAYOUT, WIDE, asked=1)
    assert torch.allclose(dense(second.weights) + rest(second), dense(first.weights) + rest(first), atol=3e-6)
    assert torch.equal(second.weights[A][2 * RANK :], first.weights[A][2 * RANK :])


def test_a_direction_that_is_not_used_can_still_be_learned() -> None:
    clients = [dict(random_lora(0)) for _ in range(2)]
    for client in clients:
        client[B] = torch.zeros(OUT, RANK * EXPERTS)
    new, _, _ = join(Joined(clients[0]), [update(found, [1, 1, 1]) for found in clients], LAYOUT, WIDE, asked=2)
    assert not new.weights[B].any()
    assert (new.weights[A].norm(dim=1) > 0.1).all()


@pytest.mark.parametrize(
    ("tensors", "parts"),
    [
        (Tensors((2, 2)), [10 / 40, 30 / 40]),
        (Tensors((2, 2), PLACE), [0, 1]),
        (Tensors((2, 2), PLACE, expert=1), [0, 1]),
        (Tensors((2, 2), modality="audio"), [1, 0]),
    ],
)
def test_parts_follow_examples_tokens_and_modalities(tensors: Tensors, parts: list[float]) -> None:
    weights = {"w": torch.zeros(2, 2)}
    found = [update(weights, [0, 0, 0], 10, audio=4), update(weights, [0, 7, 0], 30, audio=0)]
    assert shares(found, "w", tensors, 1e9)[:, 0].tolist() == parts


@pytest.mark.parametrize(
    ("tensors", "parts"),
    [
        (Tensors((3, 2), PLACE, experts=3), [[10 / 40] * 3, [30 / 40] * 3, [0] * 3]),
        (Tensors((2, 2), PLACE, expert=2), [[10 / 40], [30 / 40], [0]]),
        (Tensors((2, 2), modality="audio"), [[10 / 40], [30 / 40], [0]]),
    ],
)
def test_beside_a_private_client_experts_weigh_by_examples(tensors: Tensors, parts: list[list[float]]) -> None:
    """It counts neither tokens nor modalities; who counts, and has none there, has no part all the same."""
    weights = {"w": torch.zeros(tensors.shape)}
    private = replace(update(weights, examples=10), spent=[1.0, 1e-5])
    found = [private, update(weights, [1, 5, 0], 30, audio=4), update(weights, [0, 0, 0], 20, audio=0)]
    assert shares(found, "w", tensors, 1e9).tolist() == parts


def test_a_client_that_did_not_send_a_tensor_has_no_part_in_it() -> None:
    found = [update({}, examples=100), update({"w": torch.ones(2)}, examples=1)]
    new, _, _ = join(Joined({"w": torch.zeros(2)}), found, {"w": Tensors((2,))}, WIDE, asked=2)
    assert new.weights["w"].tolist() == [1, 1]


def test_a_lie_about_counts_weighs_no_more_than_the_ratio() -> None:
    weights = {"w": torch.zeros(1)}
    found = [update(weights, examples=count) for count in (10, 20, 10**12)]
    assert shares(found, "w", Tensors((1,)), 10.0)[:, 0].tolist() == [10 / 230, 20 / 230, 200 / 230]


def test_norms_of_changes_are_those_of_the_products() -> None:
    old, new = random_lora(0), random_lora(1)
    expected = (dense(new) - dense(old)).norm()
    assert change_norm(old, update(new), LAYOUT) == pytest.approx(float(expected), rel=1e-9)


def test_a_huge_change_is_scaled_to_the_median() -> None:
    assert scales([1.0, 2.0, 1e9], FederatedArguments(update_norm_ratio=3.0)) == [1, 1, pytest.approx(6e-9)]
    assert scales([4.0, 0.5], FederatedArguments(max_update_norm=1.0)) == [0.25, 1]
    layout = {"w": Tensors((2,))}
    changes = [torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), torch.tensor([1e9, 0.0])]
    new, _, _ = join(Joined({"w": torch.zeros(2)}), [update({"w": w}) for w in changes], layout,
                     FederatedArguments(update_norm_ratio=3.0), asked=3)  # fmt: skip
    assert new.weights["w"].tolist() == pytest.approx([4 / 3, 1 / 3])


def test_a_scaled_product_is_between_old_and_new() -> None:
    start, changed = Joined(random_lora(0)), random_lora(1)
    norm = change_norm(start.weights, update(changed), LAYOUT)
    new, _, _ = join(start, [update(changed, [1, 1, 1])], LAYOUT, FederatedArguments(max_update_norm=norm / 4), asked=1)
    expected = dense(start.weights) + (dense(changed) - dense(start.weights)) / 4
    assert torch.allclose(dense(new.weights) + rest(new), expected, atol=3e-6)


def test_adam_follows_the_papers_update_over_two_rounds() -> None:
    layout, given = {"w": Tensors((1,))}, FederatedArguments(aggregation="fedadam", server_learning_rate=0.1)
    held, value, first, second = Joined({"w": torch.zeros(1)}), 0.0, 0.0, 0.0
    for _ in range(2):
        held, _, _ = join(held, [update({"w": held.weights["w"] + 0.5})], layout, given, asked=1)
        first, second = 0.9 * first + 0.1 * 0.5, 0.99 * second + 0.01 * 0.25
        value += 0.1 * first / (math.sqrt(second) + 1e-3)
        assert held.weights["w"].item() == pytest.approx(value, rel=1e-5)


def test_adam_on_a_lora_goes_towards_the_mean_product() -> None:
    given = FederatedArguments(aggregation="fedadam", server_learning_rate=0.02, update_norm_ratio=1e9)
    held, clients = Joined(random_lora(0)), [random_lora(seed) for seed in (1, 2)]
    mean = (dense(clients[0]) + dense(clients[1])) / 2
    before = (dense(held.weights) - mean).norm()
    for _ in range(5):
        held, _, _ = join(held, [update(found, [1, 1, 0]) for found in clients], LAYOUT, given, asked=2)
    assert (dense(held.weights)[:2] - mean[:2]).norm() < 0.9 * before
    assert torch.equal(held.weights[A][2 * RANK :], random_lora(0)[A][2 * RANK :])


def test_noise_has_the_stated_deviation_and_parts_are_equal() -> None:
    layout, zero = {"w": Tensors((20_000,))}, torch.zeros(20_000)
    given = FederatedArguments(max_update_norm=2.0, client_noise=1.5)
    found = [update({"w": zero + 1e-3}, examples=1), update({"w": zero - 1e-3}, examples=999), update({}, examples=5)]
    new, _, _ = join(Joined({"w": zero}), found, layout, given, 4, torch.Generator().manual_seed(0))
    # 20,000 draws know a deviation to half a percent.
    assert new.weights["w"].std().item() == pytest.approx(1.5 * 2.0 / 4, rel=0.02)
    assert abs(new.weights["w"].mean().item()) < 0.02


def test_one_round_with_one_side_of_a_lora_is_exact() -> None:
    layout = {B: LAYOUT[B]}
    start, clients = random_lora(0), [{B: random_lora(seed)[B]} for seed in (1, 2)]
    new, _, _ = join(Joined({B: start[B]}), [update(found, [1, 3, 1]) for found in clients], layout, WIDE, asked=2)
    mean = sum(dense({A: start[A]} | found) for found in clients) / 2
    assert torch.allclose(dense({A: start[A]} | new.weights), torch.as_tensor(mean), atol=3e-6)
    assert not new.rest_a


def test_factors_are_those_of_each_expert() -> None:
    weights = random_lora(4)
    b, a = factors(weights, PAIR, LAYOUT)
    assert torch.equal(b @ a, dense(weights))
