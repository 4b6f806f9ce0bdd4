"""The section `privacy` of a recipe."""

import math
from dataclasses import dataclass, field

MECHANISMS = ("gaussian", "laplace")
ACCOUNTANTS = ("prv", "rdp")


@dataclass
class PrivacyArguments:
    """Differential privacy of each training row, see `privacy/`. A `privacy:` section in a recipe switches it on; the
    norm to which each row's gradient is clipped is `max_grad_norm` of the training section, which may stand here."""

    use_privacy: bool = field(default=False, metadata={"help": "train with differential privacy of each row"})
    epsilon: float | None = field(
        default=None, metadata={"help": "privacy budget of the whole run, from which the noise is found"}
    )
    delta: float | None = field(
        default=None, metadata={"help": "chance that the promise of epsilon does not hold; None: 1 / (10 * rows)"}
    )
    noise_multiplier: float | None = field(
        default=None,
        metadata={"help": "instead of epsilon: deviation (laplace: scale) of the noise over max_grad_norm"},
    )
    epsilon_per_update: float | None = field(
        default=None, metadata={"help": "instead of epsilon, laplace: what one update spends of a row that is in it"}
    )
    mechanism: str = field(
        default="gaussian",
        metadata={"help": "gaussian (gradients clipped in L2) or laplace (in L1; far more noise for many parameters)"},
    )
    accountant: str = field(default="prv", metadata={"help": "gaussian: prv (tight) or rdp, of Opacus"})
    log_unprotected: bool = field(
        default=False,
        metadata={"help": "also log what is measured on training rows, such as the loss, which no epsilon covers"},
    )


def check_arguments(arguments: PrivacyArguments) -> None:
    """Refuse settings that say nothing, or two things.

    Raises:
        ValueError: naming the setting.
    """
    for name, known in (("mechanism", MECHANISMS), ("accountant", ACCOUNTANTS)):
        if getattr(arguments, name) not in known:
            raise ValueError(f"privacy.{name}={getattr(arguments, name)!r}; choose from {', '.join(known)}")
    strengths = {name: getattr(arguments, name) for name in ("epsilon", "noise_multiplier", "epsilon_per_update")}
    given = {name: value for name, value in strengths.items() if value is not None}
    if len(given) != 1:
        raise ValueError(f"privacy: give exactly one of {', '.join(strengths)}; found {given or 'none'}")
    for name, value in given.items():
        if not 0 < value < math.inf:
            raise ValueError(f"privacy.{name} must be positive and finite, found {value}")
    if arguments.epsilon_per_update is not None and arguments.mechanism != "laplace":
        raise ValueError(
            "privacy.epsilon_per_update is of mechanism: laplace. One update of the gaussian mechanism has an epsilon "
            "for each delta: give noise_multiplier"
        )
    if arguments.delta is not None and not 0 < arguments.delta < 1:
        raise ValueError(f"privacy.delta must lie between 0 and 1, found {arguments.delta}")
