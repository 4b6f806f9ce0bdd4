"""Epsilons agree with Opacus', with a second library's and with formulas; a budget is kept."""

import math

import pytest

from chorus_moe.training.privacy.accounting import MOST_NOISE, Updates, epsilon_of, laplace_epsilon, noise_for
from tests.training.privacy.conftest import REASON

DELTA = 1e-5
# Those of Opacus: the epsilon of an RDP accountant is the least over its orders.
ORDERS = [1 + x / 10.0 for x in range(1, 100)] + list(range(12, 64))
RUNS: list[list[Updates]] = [[(0.8, 0.032, 160)], [(1.0, 0.032, 80), (0.9, 0.02, 80)]]


@pytest.mark.parametrize("history", RUNS)
def test_the_accountants_are_those_of_opacus(history: list[Updates]) -> None:
    opacus = pytest.importorskip("opacus.accountants", reason=REASON)
    for name in ("prv", "rdp"):
        theirs = opacus.create_accountant(name)
        for noise, rate, steps in history:
            for _ in range(steps):
                theirs.step(noise_multiplier=noise, sample_rate=rate)
        assert epsilon_of(history, DELTA, accountant=name) == pytest.approx(theirs.get_epsilon(delta=DELTA), rel=1e-6)


@pytest.mark.parametrize("history", RUNS)
def test_a_second_library_finds_the_same_epsilon_to_one_percent(history: list[Updates]) -> None:
    pytest.importorskip("opacus", reason=REASON)
    dp = pytest.importorskip("dp_accounting", reason="dp-accounting is not installed: .ci/matrix privacy has it")
    for name, theirs in (("prv", dp.pld.PLDAccountant()), ("rdp", dp.rdp.RdpAccountant(ORDERS))):
        for noise, rate, steps in history:
            theirs.compose(dp.PoissonSampledDpEvent(rate, dp.GaussianDpEvent(noise)), steps)
        assert epsilon_of(history, DELTA, accountant=name) == pytest.approx(theirs.get_epsilon(DELTA), rel=0.01)


@pytest.mark.parametrize("noise", [1.0, 2.0, 5.0])
def test_an_update_with_laplace_noise_spends_what_a_second_library_says(noise: float) -> None:
    dp = pytest.importorskip("dp_accounting", reason="dp-accounting is not installed: .ci/matrix privacy has it")
    theirs = dp.pld.PLDAccountant()
    theirs.compose(dp.PoissonSampledDpEvent(0.1, dp.LaplaceDpEvent(noise)), 1)
    # A delta next to nothing: the epsilon of pure privacy.
    assert laplace_epsilon([(noise, 0.1, 1)], 1e-12) == pytest.approx(theirs.get_epsilon(1e-12), rel=0.01)
    theirs.compose(dp.PoissonSampledDpEvent(0.1, dp.LaplaceDpEvent(noise)), 99)
    # Of many updates ours is a bound, theirs the best one.
    assert laplace_epsilon([(noise, 0.1, 100)], DELTA) > theirs.get_epsilon(DELTA)


def test_epsilons_of_laplace_updates_add_up() -> None:
    assert laplace_epsilon([(2.0, 1.0, 1)], DELTA) == pytest.approx(0.5)
    assert laplace_epsilon([(2.0, 1.0, 4), (1.0, 1.0, 2)], DELTA) == pytest.approx(4.0)
    assert laplace_epsilon([(1.0, 0.1, 1)], DELTA) == pytest.approx(math.log(0.9 + 0.1 * math.e))
    # A thousand updates of 0.01: 10 as a sum, 0.05 + 2 sqrt(0.05 log(1e5)) = 1.567 as concentrated privacy.
    assert laplace_epsilon([(100.0, 1.0, 1000)], DELTA) == pytest.approx(1.567, abs=1e-3)
    # Nearly no noise: the exponential alone would be beyond all numbers.
    assert laplace_epsilon([(1e-4, 0.5, 1)], DELTA) == pytest.approx(1e4 - math.log(2))
    assert epsilon_of([], DELTA) == 0


@pytest.mark.parametrize("mechanism", ["gaussian", "laplace"])
@pytest.mark.parametrize("epsilon", [1.0, 8.0])
def test_the_noise_of_a_budget_keeps_it_and_wastes_nothing(mechanism: str, epsilon: float) -> None:
    if mechanism == "gaussian":
        pytest.importorskip("opacus", reason=REASON)
    accountant = "rdp" if epsilon == 8.0 else "prv"
    noise = noise_for(epsilon, DELTA, 0.032, 160, mechanism, accountant)
    assert 0.985 * epsilon < epsilon_of([(noise, 0.032, 160)], DELTA, mechanism, accountant) <= epsilon
    if mechanism == "gaussian" and epsilon == 8.0:
        from opacus.accountants.utils import get_noise_multiplier

        theirs = get_noise_multiplier(
            target_epsilon=epsilon, target_delta=DELTA, sample_rate=0.032, steps=160, accountant=accountant
        )
        assert noise == pytest.approx(theirs, rel=0.01)


def test_what_is_spent_leaves_less_for_the_rest() -> None:
    whole = noise_for(2.0, DELTA, 0.1, 10, "laplace")
    spent = [(whole / 1.5, 0.1, 5)]
    rest = noise_for(2.0, DELTA, 0.1, 5, "laplace", spent=spent)
    assert rest > whole
    assert epsilon_of([*spent, (rest, 0.1, 5)], DELTA, "laplace") <= 2.0
    with pytest.raises(ValueError, match=r"epsilon=0.1 is spent: the updates so far have spent .*, and 5 more"):
        noise_for(0.1, DELTA, 0.1, 5, "laplace", spent=spent)
    assert noise_for(0.1, DELTA, 0.1, 0, "laplace", spent=spent) == MOST_NOISE
    with pytest.raises(ValueError, match="no noise is enough for 1000000 updates"):
        noise_for(1e-6, DELTA, 1.0, 1_000_000, "laplace")


def test_next_to_no_noise_has_an_epsilon_that_promises_nothing() -> None:
    pytest.importorskip("opacus", reason=REASON)
    assert epsilon_of([(1e-9, 0.5, 10)], DELTA) > 1e9
    # Bounds come down without a jump upwards as the noise grows.
    found = [epsilon_of([(noise, 0.1, 50)], DELTA) for noise in (0.2, 0.25, 0.3, 0.4)]
    assert found == sorted(found, reverse=True)
