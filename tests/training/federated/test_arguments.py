"""Settings of a federation: which numbers may be, which settings go together, and what noise costs."""

import math
from typing import Any

import pytest

from chorus_moe.training.federated.arguments import FederatedArguments, check_federated, epsilon

# With masks: what they need.
MASKED: dict[str, Any] = {"secure_aggregation": True, "max_update_norm": 1.0}
ABOVE_HALF = math.nextafter(0.5, 1)


def test_epsilon_is_that_of_composed_gaussians() -> None:
    """Against the exact delta of a Gaussian mechanism (Balle and Wang 2018, arXiv 1805.06530, theorem 8)."""
    noise, rounds, delta = 8.0, 20, 1e-5
    found = epsilon(noise, rounds, delta)
    sigma = noise / math.sqrt(rounds)

    def normal(x: float) -> float:
        return 0.5 * math.erfc(-x / math.sqrt(2))

    half, rate = 1 / (2 * sigma), found * sigma
    exact = normal(half - rate) - math.exp(found) * normal(-half - rate)
    assert 0 < exact < delta
    assert epsilon(noise, 2 * rounds, delta) > found


def test_epsilon_by_hand() -> None:
    # rho = 8 / (2 * 2^2) = 1, so epsilon = 1 + 2 sqrt(ln(1 / delta)), and ln(1 / e^-4) = 4.
    assert epsilon(noise=2.0, rounds=8, delta=math.exp(-4)) == pytest.approx(5.0, rel=1e-12)


def test_defaults_are_a_plain_mean() -> None:
    check_federated(given := FederatedArguments())
    assert (given.aggregation, given.rounds, given.min_clients, given.max_failed_rounds) == ("fedavg", 10, 2, 3)
    assert (given.round_seconds, given.update_norm_ratio, given.count_ratio) == (600.0, 3.0, 10.0)
    assert (given.proximal_weight, given.server_learning_rate) == (0.01, 1e-2)
    assert (given.client_noise, given.client_delta, given.max_update_norm) == (0.0, 1e-5, None)
    assert (given.train_lora_a, given.secure_aggregation, given.bank_owners) == (True, False, None)
    assert (given.num_shares, given.reconstruction_threshold, given.max_examples) == (None, 0.67, 1000)


@pytest.mark.parametrize(
    "settings",
    [
        {"rounds": 1},
        {"min_clients": 1},
        {"max_failed_rounds": 0},
        {"proximal_weight": 0},
        {"count_ratio": 1},
        {"update_norm_ratio": 1},
        {"round_seconds": 1e-9},
        {"server_learning_rate": 1e-9},
        {"max_update_norm": 1e-9},
        {"client_delta": 1e-300},
        {"client_delta": math.nextafter(1, 0)},
        {"aggregation": "fedprox", "client_noise": 0.1, "max_update_norm": 1.0},
        {"aggregation": "fedadam", "max_update_norm": 1.0},
        # Of masks alone.
        {"num_shares": 2, "reconstruction_threshold": 0.1, "max_examples": 0, "min_clients": 1},
        MASKED | {"min_clients": 2},
        MASKED | {"num_shares": 3},
        MASKED | {"num_shares": 5, "min_clients": 5},
        MASKED | {"num_shares": 5, "min_clients": 4},
        MASKED | {"reconstruction_threshold": ABOVE_HALF},
        MASKED | {"reconstruction_threshold": 1},
        MASKED | {"max_examples": 1},
        MASKED | {"client_noise": 1.0},
    ],
    ids=str,
)
def test_settings_at_their_bounds_are_taken(settings: dict[str, Any]) -> None:
    check_federated(FederatedArguments(**settings))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"aggregation": "fedmean"}, "federated.aggregation='fedmean'; choose from fedavg, fedprox, fedadam"),
        *(
            ({name: value}, f"federated.{name}: expected {least} or more, found {value}")
            for name, least, value in [
                ("rounds", 1, 0),
                ("min_clients", 1, 0),
                ("max_failed_rounds", 0, -1),
                ("proximal_weight", 0, -0.1),
                ("client_noise", 0, -0.1),
                ("count_ratio", 1, 0.9),
                ("update_norm_ratio", 1, 0.9),
                ("proximal_weight", 0, math.inf),
                ("count_ratio", 1, math.nan),
            ]
        ),
        *(
            ({name: value}, f"federated.{name}: expected a positive number, found {value}")
            for name in ("round_seconds", "server_learning_rate", "max_update_norm")
            for value in (0, -1.0, math.inf, math.nan)
        ),
        *(
            ({"client_delta": value}, f"federated.client_delta: expected a number between 0 and 1, found {value}")
            for value in (0, 1, math.nan)
        ),
        ({"client_noise": 1.0}, "federated.client_noise needs federated.max_update_norm"),
        ({"client_noise": 1.0, "max_update_norm": 1.0, "aggregation": "fedadam"}, "found fedadam"),
        (MASKED | {"max_update_norm": None}, "needs federated.max_update_norm: clients clip by it themselves"),
        (MASKED | {"update_norm_ratio": 2.0}, "federated.update_norm_ratio compares single clients"),
        (MASKED | {"update_norm_ratio": 2.0}, "federated.max_update_norm is what clients keep to"),
        (MASKED | {"count_ratio": 2.0}, "federated.count_ratio compares single clients"),
        (MASKED | {"count_ratio": 2.0}, "federated.max_examples is what clients keep to"),
        (MASKED | {"bank_owners": "{}"}, "federated.bank_owners: with federated.secure_aggregation"),
        (MASKED | {"min_clients": 1}, "the sum of 1 client hides nothing; set federated.min_clients to 2 or more"),
        (MASKED | {"num_shares": 4}, "expected an odd number of 3 or more, which is federated.min_clients, found 4"),
        (MASKED | {"num_shares": 1}, "expected an odd number of 3 or more, which is federated.min_clients, found 1"),
        (MASKED | {"num_shares": 2}, "expected an odd number of 3 or more, which is federated.min_clients, found 2"),
        (MASKED | {"num_shares": 3, "min_clients": 5}, "odd number of 5 or more, which is .*, found 3"),
        (MASKED | {"reconstruction_threshold": 0.5}, "expected more than 0.5 and 1 at most, found 0.5: half"),
        (MASKED | {"reconstruction_threshold": 1.01}, "expected more than 0.5 and 1 at most, found 1.01"),
        (MASKED | {"max_examples": 0}, "federated.max_examples: expected 1 or more, found 0"),
    ],
)
def test_settings_that_cannot_be_are_refused_with_both_numbers(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_federated(FederatedArguments(**settings))
