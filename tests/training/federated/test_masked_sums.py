"""Vectors of masked sums, added up without masks: what the server makes of a sum is the mean of the clients."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from chorus_moe.training.federated.arguments import FederatedArguments
from chorus_moe.training.federated.joining import Joined, join
from chorus_moe.training.federated.layout import Layout, Tensors
from chorus_moe.training.federated.masked_sums import STEP, from_sum, grid, join_mean, rounding_norm, to_vector
from chorus_moe.training.federated.updates import Refused, Update

PLACE = (1, "image")
LAYOUT: Layout = {
    "attention": Tensors((4, 3)),
    "experts": Tensors((2, 5, 3), PLACE, experts=2),
    "tower": Tensors((6,), modality="audio"),
}
BOUND, MOST = 50.0, 100
GIVEN = FederatedArguments(secure_aggregation=True, max_update_norm=BOUND, max_examples=MOST)


def random_weights(seed: int, names: tuple[str, ...] = tuple(LAYOUT)) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(LAYOUT[name].shape, generator=generator) for name in names}


OLD = random_weights(0)


def update(seed: int, examples: int, chosen: list[int], audio: int = 1) -> Update:
    names = ("attention",) + ("experts",) * any(chosen) + ("tower",) * (audio > 0)
    return Update(1, "", examples, random_weights(seed, names), {PLACE: torch.tensor(chosen)}, {"audio": audio})


UPDATES = [update(1, 30, [5, 0]), update(2, 90, [1, 7], audio=0), update(3, 60, [0, 0])]


def summed(updates: list[Update], bound: float = BOUND) -> list[np.ndarray]:
    vectors = [to_vector(found, OLD, LAYOUT, bound, MOST) for found in updates]
    return [np.sum([vector[part] for vector in vectors], axis=0) for part in (0, 1)]


def test_the_mean_from_a_sum_is_that_of_single_clients_by_their_rows() -> None:
    mean = from_sum(summed(UPDATES), LAYOUT, BOUND, clients=3)
    new = join_mean(Joined(OLD), mean, LAYOUT, GIVEN, asked=3)
    # Without masks, too, a round with a private client weighs by rows in experts; but such a one reaches them all.
    second = UPDATES[1]
    by_rows = [replace(found, tokens={PLACE: (found.tokens[PLACE] > 0) * found.examples}) for found in UPDATES]
    wide = FederatedArguments(update_norm_ratio=1e9, count_ratio=1e9)
    plain, _, _ = join(Joined(OLD), by_rows, LAYOUT, wide, asked=3)
    for name in LAYOUT:
        # Weights of rows lie on a grid of 5e-7: 1.2e-6 was the worst difference seen.
        assert torch.allclose(new.weights[name], plain.weights[name], atol=1e-5), name
    # One client alone has had tokens in the second expert.
    assert torch.allclose(new.weights["experts"][1], second.weights["experts"][1], atol=1e-5)


def test_what_nobody_reached_stays_bit_for_bit() -> None:
    mean = from_sum(summed([update(1, 5, [0, 0], audio=0)]), LAYOUT, BOUND, clients=1)
    new = join_mean(Joined(OLD), mean, LAYOUT, GIVEN, asked=1)
    assert torch.equal(new.weights["experts"], OLD["experts"]) and torch.equal(new.weights["tower"], OLD["tower"])
    assert not torch.equal(new.weights["attention"], OLD["attention"])


def test_a_client_clips_its_own_change_so_that_rounding_stays_within_the_bound() -> None:
    (change_P, _) = to_vector(UPDATES[1], OLD, LAYOUT, 0.5, most=1)
    norm = float(np.linalg.norm(change_P))
    assert norm == pytest.approx(1 - rounding_norm(LAYOUT), rel=1e-6) and norm + rounding_norm(LAYOUT) <= 1 + 1e-12


def test_a_client_that_trained_itself_to_no_number_refuses_by_itself() -> None:
    broken = {**UPDATES[0].weights, "attention": UPDATES[0].weights["attention"] * float("nan")}
    with pytest.raises(Refused, match="training made attention values that are not finite"):
        to_vector(replace(UPDATES[0], weights=broken), OLD, LAYOUT, BOUND, MOST)


def test_weights_lie_on_the_grid_and_are_never_nothing() -> None:
    assert grid(1.0) == 1.0 and grid(1e-12) == STEP and grid(0.3) % STEP == 0


def test_noise_takes_equal_parts_of_all_that_were_asked() -> None:
    given = replace(GIVEN, client_noise=1e-9)
    vectors = [to_vector(found, OLD, LAYOUT, BOUND, most=1) for found in UPDATES]
    mean = from_sum([np.sum([v[part] for v in vectors], axis=0) for part in (0, 1)], LAYOUT, BOUND, clients=3)
    new = join_mean(Joined(OLD), mean, LAYOUT, given, asked=4)
    change = sum(found.weights["attention"].double() - OLD["attention"] for found in UPDATES) / 4
    assert torch.allclose(new.weights["attention"].double(), OLD["attention"] + change, atol=1e-6)


LIES = {
    "too long": (lambda total: [total[0] + 1.0, total[1]], "masked changes has norm"),
    "no number": (lambda total: [total[0] * np.nan, total[1]], "masked changes has norm"),
    "too heavy": (lambda total: [total[0], total[1] * 100], "weights in the sum reach"),
    "negative": (lambda total: [total[0], -total[1]], "weights in the sum reach"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_sum_that_honest_clients_cannot_have_is_refused(lie: str) -> None:
    change, said = LIES[lie]
    with pytest.raises(ValueError, match=said):
        from_sum(change(summed(UPDATES)), LAYOUT, BOUND, clients=3)
