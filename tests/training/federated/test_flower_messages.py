"""Bytes in Flower's messages, and what stands in the place of an answer."""

import logging
import os

import pytest

pytest.importorskip("flwr", reason="Flower is not installed: `.ci/matrix federated` runs this")
from flwr.app import ArrayRecord, Error, Message, Metadata, RecordDict
from flwr.app.message import make_message
from flwr.app.message_type import MessageType

from chorus_moe.training.federated.flower_messages import NAME, content_of, payload_of, quiet


def question(content: RecordDict) -> Message:
    metadata = Metadata(0, "", 0, 1, "", "", 0.0, 1e18, MessageType.TRAIN)
    return make_message(metadata, content)


@pytest.mark.parametrize("payload", [b"", b"abc", bytes(range(256)) * 5000])
def test_bytes_come_back(payload: bytes) -> None:
    content = content_of(payload)
    array = content[NAME][NAME]  # type: ignore[index]
    assert (array.dtype, tuple(array.shape)) == ("uint8", (len(payload),))
    assert payload_of(question(content)) == payload


def test_an_error_or_another_content_is_said() -> None:
    failed = Message(Error(3, "gone"), reply_to=question(content_of(b"")))
    assert payload_of(failed) == "error 3: gone"
    other = RecordDict({"b": ArrayRecord(), "a": ArrayRecord()})
    assert payload_of(question(other)) == "sent a message of ['a', 'b'] in the place of 'payload'"
    assert payload_of(question(RecordDict({NAME: ArrayRecord()}))) == (
        "sent a message of ['payload'] in the place of 'payload'"
    )


def test_flower_keeps_quiet() -> None:
    assert os.environ["FLWR_TELEMETRY_ENABLED"] == "0" and os.environ["FLWR_UPDATE_CHECK"] == "0"
    logging.getLogger("flwr").setLevel(logging.DEBUG)
    quiet()
    assert logging.getLogger("flwr").level == logging.WARNING
