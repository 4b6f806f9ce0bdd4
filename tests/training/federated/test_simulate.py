"""Clients in one process answer as over a network."""

import pytest

from chorus_moe.training.federated.simulate import InProcess
from chorus_moe.training.federated.updates import Refused


def refuse(payload: bytes) -> bytes:
    raise Refused(f"no {payload.decode()}")


def fail(payload: bytes) -> bytes:
    raise ValueError("an error in training")


def test_answers_are_those_of_the_clients_that_were_asked() -> None:
    exchange = InProcess({"b": lambda payload: payload + b"!", "a": lambda payload: None, "c": refuse, "d": fail})
    assert exchange.clients() == ["a", "b", "c", "d"]
    found = exchange.ask({"c": b"3", "b": b"2", "a": b"1"}, seconds=0.0)
    # A client that stops says nothing, one that refuses says why.
    assert found == {"c": "no 3", "b": b"2!", "a": b""}


def test_an_error_in_training_is_no_answer() -> None:
    with pytest.raises(ValueError, match="an error in training"):
        InProcess({"d": fail}).ask({"d": b""}, seconds=1.0)


def test_clients_are_those_of_the_start() -> None:
    clients = {"a": lambda payload: payload}
    exchange = InProcess(clients)
    clients.clear()
    assert exchange.clients() == ["a"]
