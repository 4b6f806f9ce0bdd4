"""What both ends of the wire share: bytes in the content of a Flower message, and a Flower that keeps quiet."""

import logging
import os

# Before Flower is imported, which reads them once: no news of this run goes to Flower's makers.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_UPDATE_CHECK", "0")

from flwr.app import Array, ArrayRecord, Message, RecordDict

NAME = "payload"


def content_of(payload: bytes) -> RecordDict:
    """Bytes as one array: Flower sends large arrays in pieces."""
    array = Array(dtype="uint8", shape=(len(payload),), stype="safetensors", data=payload)
    return RecordDict({NAME: ArrayRecord({NAME: array})})


def payload_of(message: Message) -> bytes | str:
    """The bytes of a message, or what went wrong at the client."""
    if message.has_error():
        return f"error {message.error.code}: {message.error.reason}"
    record = message.content.get(NAME)
    if not isinstance(record, ArrayRecord) or NAME not in record:
        return f"sent a message of {sorted(message.content)} in the place of {NAME!r}"
    return record[NAME].data


def quiet() -> None:
    """Flower logs every message and every poll."""
    logging.getLogger("flwr").setLevel(logging.WARNING)
