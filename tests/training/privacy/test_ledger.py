"""What is spent is counted once, kept on disk, and never forgotten."""

import json
from pathlib import Path

import pytest

from chorus_moe.training.privacy.accounting import epsilon_of
from chorus_moe.training.privacy.arguments import PrivacyArguments
from chorus_moe.training.privacy.ledger import FILE, Earlier, PrivacyLedger, read_ledger, spent_before


def make_ledger(**settings: object) -> PrivacyLedger:
    given = {"mechanism": "laplace", "epsilon_per_update": 0.5} | settings
    return PrivacyLedger(PrivacyArguments(use_privacy=True, **given), num_rows=100, rate=0.1)  # type: ignore[arg-type]


def test_updates_are_counted_and_survive_on_disk(tmp_path: Path) -> None:
    ledger = make_ledger()
    assert ledger.delta == 1e-3 and ledger.epsilon == 0
    for noise in (2.0, 2.0, 3.0):
        ledger.take(noise)
    assert ledger.history == [(2.0, 0.1, 2), (3.0, 0.1, 1)]
    assert ledger.epsilon == epsilon_of(ledger.history, 1e-3, "laplace")
    ledger.write(tmp_path)
    state = read_ledger(tmp_path)
    assert state is not None and state["epsilon"] == ledger.epsilon
    again = make_ledger()
    again.continue_from([state])
    assert again.epsilon == ledger.epsilon


def test_the_state_with_most_updates_wins() -> None:
    checkpoint, file = make_ledger(), make_ledger()
    for _ in range(4):
        checkpoint.take(2.0)
    for _ in range(7):
        file.take(2.0)
    for states in ([checkpoint.state(), file.state()], [file.state(), checkpoint.state()]):
        resumed = make_ledger()
        resumed.continue_from(states)
        assert resumed.num_updates == 7
    other = make_ledger(mechanism="gaussian", epsilon_per_update=None, noise_multiplier=1.0)
    with pytest.raises(ValueError, match="mechanism='gaussian', but the run so far had 'laplace'"):
        other.continue_from([checkpoint.state()])


def test_noise_is_given_or_follows_from_what_is_left() -> None:
    assert make_ledger().noise_of(10) == 2.0
    assert make_ledger(epsilon_per_update=None, noise_multiplier=3.0).noise_of(10) == 3.0
    ledger = make_ledger(epsilon_per_update=None, epsilon=1.0)
    first = ledger.noise_of(10)
    for _ in range(10):
        ledger.take(first)
    assert 0.98 < ledger.epsilon <= 1.0
    poorer = make_ledger(epsilon_per_update=None, epsilon=0.5)
    poorer.continue_from([ledger.state()])
    with pytest.raises(ValueError, match="the updates so far have spent"):
        poorer.noise_of(1)


def test_a_delta_that_may_give_a_row_away_is_refused() -> None:
    with pytest.raises(ValueError, match=r"privacy.delta=0.01 must be below 1 / 100 rows"):
        make_ledger(delta=0.01)


def test_what_the_starting_model_spent_is_found_also_below_it(tmp_path: Path) -> None:
    first = make_ledger()
    first.take(2.0)
    first.write(tmp_path)
    assert spent_before(str(tmp_path)) == Earlier(first.epsilon, first.delta)
    assert spent_before(str(tmp_path / "merged")) == spent_before(str(tmp_path / "checkpoint-3"))
    assert spent_before(str(tmp_path / "merged")) == Earlier(first.epsilon, first.delta)
    assert spent_before(str(tmp_path / "other")) is None
    assert spent_before("owner/name") is None and spent_before(None) is None and spent_before("") is None
    second = PrivacyLedger(first.arguments, 100, 0.1, spent_before(str(tmp_path)))
    second.take(2.0)
    second.write(tmp_path / "second")
    # All runs before count, not the last one alone.
    assert spent_before(str(tmp_path / "second")) == Earlier(2 * first.epsilon, 2 * first.delta)
    assert json.loads((tmp_path / "second" / FILE).read_text())["earlier"] == [first.epsilon, first.delta]
