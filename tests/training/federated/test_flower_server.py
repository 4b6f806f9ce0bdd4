"""The wire alone, over loopback in this process: no model, and answers of bytes."""

import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="Flower is not installed: `.ci/matrix federated` runs this")

from chorus_moe.training.federated.flower_client import serve_server
from chorus_moe.training.federated.flower_server import FlowerServer


def wait_for_client(server: FlowerServer) -> str:
    end = time.monotonic() + 60
    while not server.clients():
        assert time.monotonic() < end, "no client came"
        time.sleep(0.1)
    return server.clients()[0]


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_an_answer_that_comes_after_its_round_is_in_no_round(tmp_path: Path) -> None:
    is_late, sent = threading.Event(), []

    def answer(question: bytes) -> bytes | None:
        sent.append(question)
        if question == b"first":
            is_late.wait(60)
        return None if question == b"last" else question + b" answered"

    with FlowerServer("127.0.0.1:0", tmp_path / "flower.sqlite") as server:
        address = f"127.0.0.1:{server.port}"
        client = threading.Thread(target=serve_server, args=(address, answer), kwargs={"is_plain": True}, daemon=True)
        client.start()
        name = wait_for_client(server)
        assert server.ask({name: b"first"}, 15.0) == {name: "did not answer in 15 s"}
        is_late.set()
        # The late answer is refused, and the client is there for the next round.
        assert server.ask({name: b"second"}, 60.0) == {name: b"second answered"}
        assert server.ask({"stranger": b"third"}, 1.0) == {"stranger": "is not there"}
        server.ask({name: b"last"}, 60.0)
        client.join(30)
    assert sent == [b"first", b"second", b"last"] and not client.is_alive()
