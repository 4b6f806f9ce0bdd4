"""A client's end of the wire: Flower's connection of a SuperNode, and one process that answers all messages.

A stock SuperNode starts a process for each message. A client of ours loads its model once.
"""

import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.app import Error, Message
from flwr.common.constant import ErrorCode
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents, pull_objects, push_objects
from flwr.supercore.run import RunNotRunningException
from flwr.supernode.fleet_http_connection import http_request_response

from chorus_moe.training.federated.flower_messages import content_of, payload_of, quiet
from chorus_moe.training.federated.updates import Refused

# Seconds between two questions to a server that has none, and before a lost server is asked again.
PAUSE = 0.5
Answer = Callable[[bytes], bytes | None]


def serve_server(
    address: str,
    answer: Answer,
    private_key: Path | None = None,
    root_certificate: Path | None = None,
    is_plain: bool = False,
) -> None:
    """Answer a server's questions until one says that it was the last; a server that goes away is waited for.

    Args:
        address: `HOST:PORT` of the server.
        answer: question -> answer; None says that there will be no other question. What a `Refused` says goes to the
            server. Of any other error it learns that there was one: the text may tell of rows, and stays here.
        private_key: file of `ssh-keygen -t ecdsa -b 384`, whose public half the server has; None where it lets
            everyone in.
        root_certificate: PEM file of who vouches for the server's certificate; None for those of the system.
        is_plain: speak HTTP, without TLS.
    """
    quiet()
    keys = None if private_key is None else read_key(private_key)
    root = None if root_certificate is None else root_certificate.read_bytes()
    is_over = False
    while not is_over:
        # Flower logs what breaks the connection, and the block ends: the server may be back in a moment.
        with http_request_response(address, is_plain, root, keys) as callbacks:
            connection = Connection(*callbacks)
            while not is_over:
                try:
                    question = connection.receive()
                    if question is None:
                        time.sleep(PAUSE)
                        continue
                    start = time.monotonic()
                    reply, is_over = _answered(question, answer)
                    connection.reply(reply, time.monotonic() - start)
                except RunNotRunningException:
                    # No `Exception` of Flower's: it would end the client, which the next round wants.
                    print("too late: the round is over, and the answer is in none", file=sys.stderr, flush=True)
        time.sleep(PAUSE)


class Connection:
    """Whole messages over Flower's callbacks, which carry headers and objects one by one."""

    def __init__(
        self,
        node: int,
        receive: Callable[[], tuple[Message, ObjectTree] | None],
        send: Callable[[Message, ObjectTree, float], tuple[set[str], str]],
        get_run: object,
        get_fab: object,
        pull: Callable[[int, str], bytes],
        push: Callable[[int, str, str, bytes], None],
        confirm: Callable[[int, str], None],
    ):
        self._receive, self._send, self._pull, self._push, self._confirm = receive, send, pull, push, confirm

    def receive(self) -> Message | None:
        received = self._receive()
        if received is None:
            return None
        header, tree = received
        run, identity = header.metadata.run_id, header.metadata.message_id
        names = [found.object_id for found in iterate_object_tree(tree)]
        contents = pull_objects(names, pull_object_fn=partial(self._pull, run))
        self._confirm(run, identity)
        message = inflate_object_from_contents(identity, contents)
        assert isinstance(message, Message)
        # The object itself does not hold it: it is the hash of the object.
        message.metadata.__dict__["_message_id"] = identity
        return message

    def reply(self, message: Message, seconds: float) -> None:
        with no_object_id_recompute():
            message.metadata.__dict__["_message_id"] = message.object_id
            wanted, session = self._send(message, get_object_tree(message), seconds)
            push = partial(self._push, message.metadata.run_id, session)
            push_objects(get_all_nested_objects(message), push, object_ids_to_push=wanted)


def _answered(question: Message, answer: Answer) -> tuple[Message, bool]:
    asked, failed = payload_of(question), ErrorCode.CLIENT_APP_RAISED_EXCEPTION
    try:
        if isinstance(asked, str):
            raise Refused(asked)
        found = answer(asked)
    except Refused as error:
        print(f"refused: {error}", file=sys.stderr, flush=True)
        return Message(Error(failed, str(error)), reply_to=question), False
    except Exception:
        traceback.print_exc()
        return Message(Error(failed, "training failed; the client's log says why"), reply_to=question), False
    return Message(content_of(found or b""), reply_to=question), found is None


def read_key(path: Path) -> tuple[ec.EllipticCurvePrivateKey, ec.EllipticCurvePublicKey]:
    """A key pair from the file of its private half. Raises ValueError if it is no key of `ssh-keygen -t ecdsa`."""
    private = load_ssh_private_key(path.read_bytes(), password=None)
    if not isinstance(private, ec.EllipticCurvePrivateKey):
        raise ValueError(f"{path} is no key of `ssh-keygen -t ecdsa -b 384`")
    return private, private.public_key()
