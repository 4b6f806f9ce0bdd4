"""How much a row's presence shows in the result: epsilon of a run, and the noise for an epsilon.

Two runs are neighbours if one has a row more. In an update each row takes part with the sampling rate, apart from all
others (Poisson sampling), and noise of `noise_multiplier * max_grad_norm` covers the sum of the clipped gradients.

- `gaussian`: Opacus' accountants, `prv` (arXiv 2106.02848) or `rdp` (arXiv 1908.10530);
- `laplace`: one update spends `1 / noise_multiplier` of a row that is in it, and with sampling
  `log(1 + rate * (exp(1 / noise_multiplier) - 1))` of any row. The epsilons of updates add up; for many small ones
  the bound of zero-concentrated privacy (arXiv 1605.02065) is smaller, and the smaller one counts.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from scipy.optimize import brentq


class BudgetSpent(ValueError):
    """Nothing is left of an epsilon for further updates."""


# Noise multiplier, sampling rate, and in how many updates.
Updates = tuple[float, float, int]
# Beyond this nothing is left of any gradient.
MOST_NOISE = 1e5
# An epsilon that promises nothing. Beyond it a bound of a few orders will do: the tables of `prv` grow with epsilon,
# until they fill the memory.
NO_PROMISE, FEW_ORDERS = 150.0, (1.1, 1.5, 2, 3, 4, 8, 16, 32, 64)
# The noise is found to this share, and so a finished run leaves a little, which pays for no update.
PRECISION, ALL_SPENT = 1e-3, 0.99


def epsilon_of(history: Sequence[Updates], delta: float, mechanism: str = "gaussian", accountant: str = "prv") -> float:
    """The epsilon that some updates have spent, an upper bound; 0 for none."""
    return _epsilon_of(_merged(history), delta, mechanism, accountant)


def _merged(history: Sequence[Updates]) -> tuple[Updates, ...]:
    """Updates in a row of one noise and rate as one entry: an accountant takes its time for each."""
    found: list[Updates] = []
    for noise, rate, steps in history:
        if found and found[-1][:2] == (noise, rate):
            steps += found.pop()[2]
        found.append((noise, rate, steps))
    return tuple(found)


# Rounds of a federation ask for the same again.
@lru_cache(maxsize=1024)
def _epsilon_of(history: tuple[Updates, ...], delta: float, mechanism: str, accountant: str) -> float:
    if not history:
        return 0.0
    if mechanism == "laplace":
        return laplace_epsilon(history, delta)
    from opacus.accountants import create_accountant

    quick = create_accountant("rdp")
    quick.history = list(history)
    bound = float(quick.get_epsilon(delta=delta, alphas=FEW_ORDERS))
    if bound > NO_PROMISE:
        return bound
    found = create_accountant(accountant)
    found.history = list(history)
    return float(found.get_epsilon(delta=delta))


def laplace_epsilon(history: Sequence[Updates], delta: float) -> float:
    """As `epsilon_of`, of the Laplace mechanism."""
    pure = concentrated = 0.0
    for noise, rate, steps in history:
        # log(1 - rate + rate * exp(1 / noise)), also where the exponential is beyond all numbers.
        outside = math.log1p(-rate) if rate < 1 else -math.inf
        each = float(np.logaddexp(outside, math.log(rate) + 1 / noise))
        pure += steps * each
        concentrated += steps * each**2 / 2
    return min(pure, concentrated + 2 * math.sqrt(concentrated * math.log(1 / delta)))


def noise_for(
    epsilon: float,
    delta: float,
    rate: float,
    steps: int,
    mechanism: str = "gaussian",
    accountant: str = "prv",
    spent: Sequence[Updates] = (),
) -> float:
    """The least noise multiplier with which `steps` more updates keep within epsilon; the most there is for none.

    Args:
        spent: the updates before.

    Raises:
        BudgetSpent: the budget is spent already.
        ValueError: no noise is enough.
    """
    if steps < 1:
        # Of a run that is finished: should it take an update all the same, that would be noise alone.
        return MOST_NOISE
    before = epsilon_of(spent, delta, mechanism, accountant)
    if before > ALL_SPENT * epsilon:
        raise BudgetSpent(
            f"privacy.epsilon={epsilon:g} is spent: the updates so far have spent {before:.4g} at delta={delta:g}, "
            f"and {steps} more are asked for"
        )

    def total(noise: float) -> float:
        return epsilon_of([*spent, (noise, rate, steps)], delta, mechanism, accountant)

    if spent:
        # In the middle of a run that goes as it was planned, the noise so far still fits.
        noise = spent[-1][0]
        if total(noise) <= epsilon < total(noise * (1 - 2 * PRECISION)):
            return noise
    low = high = 1.0
    while total(high) > epsilon:
        low, high = high, 2 * high
        if high > MOST_NOISE:
            raise ValueError(f"privacy.epsilon={epsilon:g} at delta={delta:g}: no noise is enough for {steps} updates")
    while low == high or total(low) <= epsilon:
        low, high = low / 2, low
    # An accountant may take a second or more, and this asks it less often than halving would.
    noise = math.exp(brentq(lambda x: total(math.exp(x)) - epsilon, math.log(low), math.log(high), xtol=PRECISION / 2))
    while total(noise) > epsilon:
        noise *= 1 + PRECISION
    return noise
