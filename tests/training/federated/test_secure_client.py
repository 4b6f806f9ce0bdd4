"""What a client checks before it helps a server, setting by setting; whole rounds are in `test_secure_server.py`."""

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("flwr", reason="Flower is not installed: `.ci/matrix federated` runs this")
from cryptography.fernet import InvalidToken
from flwr.common.secure_aggregation.secaggplus_constants import Key, Stage

from chorus_moe.training.federated import secure_client as module
from chorus_moe.training.federated.arguments import FederatedArguments
from chorus_moe.training.federated.secure_client import Round, SecureLearner, _as_refusal
from chorus_moe.training.federated.updates import MaskedMessage, Refused

SETUP = {
    Key.SHARE_NUMBER: 5, Key.THRESHOLD: 3, Key.CLIPPING_RANGE: 1.0, Key.TARGET_RANGE: 2**22, Key.MOD_RANGE: 2**32,
    Key.MAX_WEIGHT: 1.0,
}  # fmt: skip


def round_of(min_clients: int = 2, node: int = 1, **setup: Any) -> Round:
    """One that has come as far as shares from 2, 3 and 4."""
    found = Round(MaskedMessage(7, node, b""), FederatedArguments(min_clients=min_clients))
    found.check(Stage.SETUP, SETUP | setup)  # type: ignore[arg-type]
    found.check(Stage.SHARE_KEYS, dict.fromkeys([Key.STAGE, "1", "2", "3", "4", "5"]))  # type: ignore[arg-type]
    found.check(Stage.COLLECT_MASKED_VECTORS, {Key.SOURCE_LIST: [2, 3, 4]})  # type: ignore[arg-type]
    return found


def unmask(found: Round, active: list[int], dead: list[int]) -> None:
    found.check(Stage.UNMASK, {Key.ACTIVE_NODE_ID_LIST: active, Key.DEAD_NODE_ID_LIST: dead})  # type: ignore[arg-type]


def test_an_honest_round_is_taken() -> None:
    found = round_of()
    assert (found.number, found.node, found.shares, found.threshold) == (7, 1, 5, 3)
    assert (found.peers, found.sources) == ({1, 2, 3, 4, 5}, {2, 3, 4})
    unmask(found, [1, 2, 3], [4])
    unmask(found, [1, 2, 3, 4], [])
    assert (found.context.node_id, found.context.run_id) == (1, 0)


@pytest.mark.parametrize(
    ("name", "value"),
    [(Key.CLIPPING_RANGE, 2.0), (Key.TARGET_RANGE, 2**21), (Key.MOD_RANGE, 2**31), (Key.MAX_WEIGHT, 2.0)],
)
def test_settings_are_those_that_vectors_are_made_for(name: str, value: float) -> None:
    with pytest.raises(Refused, match=f"{name} is {value!r} at the server and .* here"):
        round_of(**{name: value})


@pytest.mark.parametrize(
    ("threshold", "shares", "is_enough"), [(3, 5, True), (2, 4, False), (3, 4, True), (2, 3, True)]
)
def test_masks_come_off_by_a_majority_alone(threshold: int, shares: int, is_enough: bool) -> None:
    setup = {Key.THRESHOLD: threshold, Key.SHARE_NUMBER: shares}
    if is_enough:
        round_of(**setup)
    else:
        with pytest.raises(Refused, match=f"{threshold} of {shares} shares would take masks off"):
            round_of(**setup)


@pytest.mark.parametrize("sources", [[2, 2], [1, 2], [2, 6]], ids=["twice", "its own", "of a stranger"])
def test_shares_come_once_from_those_whose_keys_came(sources: list[int]) -> None:
    with pytest.raises(Refused, match="shares came twice, or from others"):
        round_of().check(Stage.COLLECT_MASKED_VECTORS, {Key.SOURCE_LIST: sources})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("active", "dead"),
    [([1, 2, 3], [3]), ([1, 2, 3, 3], []), ([1, 2, 3], [4, 4]), ([1, 2, 3], [5]), ([1, 2, 9], []), ([2, 3, 4], [])],
    ids=["both", "there twice", "gone twice", "no share came", "a stranger", "without itself"],
)
def test_a_client_is_there_or_gone_and_part_of_the_round(active: list[int], dead: list[int]) -> None:
    with pytest.raises(Refused, match="there and gone at once, or was never part of the round"):
        unmask(round_of(), active, dead)


@pytest.mark.parametrize(
    ("min_clients", "threshold", "shares", "wants"),
    # More than its shares it cannot want; fewer than the threshold would open nothing.
    [(2, 3, 5, 3), (4, 3, 5, 4), (9, 3, 4, 4), (9, 2, 3, 3)],
)
def test_a_sum_of_too_few_stays_closed(min_clients: int, threshold: int, shares: int, wants: int) -> None:
    found = round_of(min_clients, **{Key.THRESHOLD: threshold, Key.SHARE_NUMBER: shares})
    unmask(found, list(range(1, wants + 1)), [])
    said = f"a sum of {wants - 1} clients is to be opened, and this client wants {wants}"
    with pytest.raises(Refused, match=said):
        unmask(found, list(range(1, wants)), [])


def test_errors_tell_nothing_of_rows_and_refusals_stay_what_they_are() -> None:
    def fail(error: Exception) -> Any:
        raise error

    assert _as_refusal(lambda: 3) == 3
    with pytest.raises(Refused, match="^mine$"):
        _as_refusal(lambda: fail(Refused("mine")))
    with pytest.raises(Refused, match="^a share of another client's keys cannot be read$"):
        _as_refusal(lambda: fail(InvalidToken()))
    with pytest.raises(Refused, match="^secure aggregation: KeyError: 'x'$"):
        _as_refusal(lambda: fail(KeyError("x")))


@pytest.mark.parametrize(
    ("bound", "most"),
    [(None, 5), (1, 5), (0.0, 5), (-1.0, 5), (float("nan"), 5), (1.0, 0), (1.0, 2.0), (1.0, None), (1.0, True)],
)
def test_a_bound_and_a_number_of_rows_are_asked_for(
    bound: object, most: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {"max_update_norm": bound, "max_examples": most}
    monkeypatch.setattr(module, "recorddict_to_fitins", lambda content, keep_input: SimpleNamespace(config=config))
    learner: Any = SimpleNamespace()
    with pytest.raises(Refused, match=f"a change is to be clipped to {bound!r}, and {most!r} rows to count at most"):
        SecureLearner(learner)._learn(None)  # type: ignore[arg-type]


def test_other_questions_are_the_learners() -> None:
    learner: Any = SimpleNamespace(answer=lambda payload: payload + b"!")
    assert SecureLearner(learner).answer(b"plain") == b"plain!"
