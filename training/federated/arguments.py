"""What the server of a federation decides; a client learns from each question what it has to know of it."""

import math
from dataclasses import dataclass, field

FEDAVG, FEDPROX, FEDADAM = "fedavg", "fedprox", "fedadam"
AGGREGATIONS = (FEDAVG, FEDPROX, FEDADAM)


@dataclass
class FederatedArguments:
    """How rounds are run and joined, see `rounds.py` and `joining.py`. A client needs no such section; with
    `secure_aggregation` it sends nothing that is not masked, and no sum of fewer than `min_clients` is opened with its
    help."""

    aggregation: str = field(
        default=FEDAVG,
        metadata={"help": "fedavg; fedprox, which keeps clients near the last round; fedadam, Adam on the server"},
    )
    rounds: int = field(default=10, metadata={"help": "rounds in all, those before a restart included"})
    min_clients: int = field(default=2, metadata={"help": "a round begins with so many clients, and needs as many"})
    round_seconds: float = field(default=600.0, metadata={"help": "time for an answer; what comes later is left out"})
    max_failed_rounds: int = field(default=3, metadata={"help": "failed rounds in a row that the server survives"})
    proximal_weight: float = field(
        default=0.01, metadata={"help": "fedprox: weight of half the squared distance from the last round's weights"}
    )
    server_learning_rate: float = field(default=1e-2, metadata={"help": "fedadam: rate of the server's Adam"})
    max_update_norm: float | None = field(
        default=None, metadata={"help": "a client's change is scaled down to this norm; None: by update_norm_ratio"}
    )
    update_norm_ratio: float = field(
        default=3.0, metadata={"help": "a change is scaled down to this multiple of the round's median norm"}
    )
    count_ratio: float = field(
        default=10.0, metadata={"help": "a client counts at most this multiple of the round's median count"}
    )
    train_lora_a: bool = field(
        default=True, metadata={"help": "false trains and sends the second matrix of a LoRA alone, half the bytes"}
    )
    client_noise: float = field(
        default=0.0,
        metadata={"help": "standard deviation of the noise on the sum of the changes, as multiple of max_update_norm"},
    )
    client_delta: float = field(default=1e-5, metadata={"help": "delta of the clients' differential privacy"})
    bank_owners: str | None = field(
        default=None, metadata={"help": "bank -> the one client that may change it, a mapping in YAML or JSON text"}
    )
    secure_aggregation: bool = field(
        default=False,
        metadata={"help": "clients send masked changes, of which the server learns the sum alone (SecAgg+ of Flower)"},
    )
    num_shares: int | None = field(
        default=None, metadata={"help": "secure_aggregation: clients that hold a share of one's keys, odd; None: all"}
    )
    reconstruction_threshold: float = field(
        default=0.67, metadata={"help": "secure_aggregation: part of the shares that takes a lost client's masks off"}
    )
    max_examples: int = field(
        default=1000, metadata={"help": "secure_aggregation: a client counts as so many rows at most"}
    )


def check_federated(given: FederatedArguments) -> None:
    """Refuse settings that cannot be, before a client is waited for.

    Raises:
        ValueError: an unknown way to join, a number out of range, or noise without what bounds a client's part.
    """
    if given.aggregation not in AGGREGATIONS:
        raise ValueError(f"federated.aggregation={given.aggregation!r}; choose from {', '.join(AGGREGATIONS)}")
    least = {
        "rounds": 1,
        "min_clients": 1,
        "max_failed_rounds": 0,
        "proximal_weight": 0,
        "client_noise": 0,
        "count_ratio": 1,
        "update_norm_ratio": 1,
    }
    for name, bound in least.items():
        if not bound <= getattr(given, name) < math.inf:
            raise ValueError(f"federated.{name}: expected {bound} or more, found {getattr(given, name)}")
    for name in ("round_seconds", "server_learning_rate", "max_update_norm"):
        value = getattr(given, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"federated.{name}: expected a positive number, found {value}")
    if not 0 < given.client_delta < 1:
        raise ValueError(f"federated.client_delta: expected a number between 0 and 1, found {given.client_delta}")
    if given.secure_aggregation:
        _check_secure(given)
    if not given.client_noise:
        return
    if given.max_update_norm is None:
        raise ValueError("federated.client_noise needs federated.max_update_norm: it bounds what one client changes")
    if given.aggregation == FEDADAM:
        raise ValueError("federated.client_noise goes with fedavg and fedprox; found fedadam")


def _check_secure(given: FederatedArguments) -> None:
    """Under masks the server has the sum alone: refuse by name what it would need single clients for."""
    if given.max_update_norm is None:
        raise ValueError(
            "federated.secure_aggregation needs federated.max_update_norm: clients clip by it themselves, since the "
            "server sees no norm of one of them"
        )
    for name, instead in {"update_norm_ratio": "max_update_norm", "count_ratio": "max_examples"}.items():
        if getattr(given, name) != getattr(FederatedArguments(), name):
            raise ValueError(
                f"federated.{name} compares single clients, whom federated.secure_aggregation hides: leave it out, "
                f"federated.{instead} is what clients keep to"
            )
    if given.bank_owners is not None:
        raise ValueError(
            "federated.bank_owners: with federated.secure_aggregation the server cannot see who changed a bank; let "
            "each owner train its bank alone and `gather` the files"
        )
    if given.min_clients < 2:
        raise ValueError(f"federated.secure_aggregation: the sum of {given.min_clients} client hides nothing; "
                         "set federated.min_clients to 2 or more")  # fmt: skip
    if given.num_shares is not None and (given.num_shares < max(3, given.min_clients) or given.num_shares % 2 == 0):
        raise ValueError(
            f"federated.num_shares: expected an odd number of {max(3, given.min_clients)} or more, which is "
            f"federated.min_clients, found {given.num_shares}"
        )
    if not 0.5 < given.reconstruction_threshold <= 1:
        raise ValueError(
            "federated.reconstruction_threshold: expected more than 0.5 and 1 at most, found "
            f"{given.reconstruction_threshold}: half of the clients could be told another story than the other half"
        )
    if given.max_examples < 1:
        raise ValueError(f"federated.max_examples: expected 1 or more, found {given.max_examples}")


def epsilon(noise: float, rounds: int, delta: float) -> float:
    """Epsilon of client-level differential privacy after some rounds, each of which all clients may take part in.

    Bun and Steinke 2016, arXiv 1605.02065: the Gaussian mechanism with noise multiplier s is `1 / 2 s^2`-zCDP, which
    adds up over rounds, and rho-zCDP is (rho + 2 sqrt(rho ln(1 / delta)), delta)-DP. Clients are added or removed.
    """
    rho = rounds / (2 * noise**2)
    return rho + 2 * math.sqrt(rho * math.log(1 / delta))
