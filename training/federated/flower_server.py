"""The server's end of the wire: Flower's Fleet API in this process, and one Flower run for each question.

Unusual here:
- Flower's SuperLink and SuperNode start a process for each message, which loads torch again. This process serves the
  same Fleet API, with the same messages, keys and database, and asks from within. The parts of a SuperLink by which
  others start programs on it (Control and Runtime API) are not there;
- nodes live in a SQLite file, so clients keep their places when the server restarts;
- a question to the clients is a Flower run of its own: once it ends, Flower refuses what still comes for it.
"""

import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import uvicorn
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from fastapi import FastAPI
from flwr.app import Message, Metadata
from flwr.app.message import make_message
from flwr.app.message_type import MessageType
from flwr.common.constant import NOOP_ACCOUNT_NAME, NOOP_FLWR_AID, SUPERLINK_NODE_ID, Status, SubStatus
from flwr.proto.task_pb2 import Task
from flwr.server.superlink.linkstate import LinkState
from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType
from flwr.supercore.error import http_error_translator
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, uses_nist_ec_curve
from flwr.supercore.protobuf.translation import ProtobufTranslationMiddleware
from flwr.superlink.config_loader import get_federation_manager, get_objectstore_linkstate_factories
from flwr.superlink.grid.http_grid import HttpGrid
from flwr.superlink.routers.fleet.node_auth import NodeAuthMiddleware
from flwr.superlink.routers.fleet.router import router
from flwr.superlink.servicer.runtime import runtime_handlers
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware

from chorus_moe.training.federated.flower_messages import content_of, payload_of, quiet

# Seconds between two looks at what came.
PAUSE = 0.2


class FlowerServer:
    """Serves clients until the end of a `with` block; `ask` is what `rounds.py` needs of a server.

    Args:
        address: `HOST:PORT` to listen on.
        database: SQLite file of the clients and their messages.
        clients: name -> public key of those that may take part; None lets everyone in, under a number.
        certificate, key: PEM files of this server; None for both speaks plain HTTP.

    Raises:
        ValueError: clients are to prove who they are over plain HTTP, where what proves it can be copied.
    """

    def __init__(
        self,
        address: str,
        database: Path,
        clients: Mapping[str, ec.EllipticCurvePublicKey] | None = None,
        certificate: Path | None = None,
        key: Path | None = None,
    ):
        if clients is not None and certificate is None:
            raise ValueError("clients prove who they are only over TLS: give a certificate and its key as well")
        quiet()
        database.parent.mkdir(parents=True, exist_ok=True)
        _, factory = get_objectstore_linkstate_factories(str(database), get_federation_manager())
        self._state: LinkState = factory.state()
        self._names: dict[int, str] | None = None if clients is None else self._register(clients)
        for task in self._state.get_tasks(statuses=[Status.PENDING, Status.STARTING, Status.RUNNING]):
            # Left by a server that was killed; nobody waits for the answers.
            self._state.stop_run(task.run_id)
        host, _, port = address.rpartition(":")
        self._server = uvicorn.Server(
            uvicorn.Config(
                self._application(is_closed=clients is not None),
                host=host,
                port=int(port),
                log_level="warning",
                ssl_certfile=certificate,
                ssl_keyfile=key,
            )
        )
        self._thread = threading.Thread(target=self._server.run, daemon=True)

    def _register(self, clients: Mapping[str, ec.EllipticCurvePublicKey]) -> dict[int, str]:
        names = {}
        for name, public in clients.items():
            found = public_key_to_bytes(public)
            node = self._state.get_node_id_by_public_key(found)
            node = self._state.create_node(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, found, 0) if node is None else node
            names[node] = name
        return names

    def _application(self, is_closed: bool) -> FastAPI:
        """A SuperLink's application, with its Fleet API alone."""
        translate = Middleware(BaseHTTPMiddleware, dispatch=http_error_translator)
        middleware = [translate, Middleware(ProtobufTranslationMiddleware), Middleware(NodeAuthMiddleware)]
        # No page lists the routes: clients know them.
        application = FastAPI(middleware=middleware, docs_url=None, redoc_url=None, openapi_url=None)
        application.state.linkstate_factory = _Factory(self._state)
        application.state.enable_supernode_auth = is_closed
        application.include_router(router)
        return application

    def __enter__(self) -> "FlowerServer":
        self._thread.start()
        while not self._server.started:
            if not self._thread.is_alive():
                raise OSError(f"cannot listen on {self._server.config.host}:{self._server.config.port}")
            time.sleep(PAUSE)
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.should_exit = True
        self._thread.join()

    @property
    def port(self) -> int:
        return self._server.servers[0].sockets[0].getsockname()[1]

    def clients(self) -> list[str]:
        """Those that are there now."""
        return sorted(self._nodes())

    def _nodes(self) -> dict[str, int]:
        online = [node.node_id for node in self._state.get_node_info(statuses=["online"])]
        if self._names is None:
            return {str(node): node for node in online}
        # A key that was taken out of the list is still in the database.
        return {self._names[node]: node for node in online if node in self._names}

    def ask(self, questions: Mapping[str, bytes], seconds: float) -> dict[str, bytes | str]:
        """Send each client its question and wait for the answers.

        Returns:
            What came in time: an answer, or what went wrong there.
        """
        nodes, deadline = self._nodes(), time.monotonic() + seconds
        answers: dict[str, bytes | str] = {name: "is not there" for name in questions if name not in nodes}
        grid, task = self._begin()
        try:
            asked = {
                name: self._message(task, nodes[name], question, seconds)
                for name, question in questions.items()
                if name in nodes
            }
            waiting = dict(zip(grid.push_messages(list(asked.values())), asked, strict=True))
            while waiting and time.monotonic() < deadline:
                # Flower ends a run that shows no life for a minute.
                self._state.acknowledge_task_heartbeat(task.task_id)
                for reply in grid.pull_messages(list(waiting)):
                    answers[waiting.pop(reply.metadata.reply_to_message_id)] = payload_of(reply)
                time.sleep(PAUSE)
        finally:
            self._state.finish_task(task.task_id, SubStatus.COMPLETED, "")
            self._state.cleanup_run(task.run_id)
        return answers | {name: f"did not answer in {seconds:g} s" for name in waiting.values()}

    def _begin(self) -> tuple[HttpGrid, Task]:
        """A Flower run that is under way, and Flower's grid on it."""
        run = self._state.create_run(None, None, None, {}, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID, TaskType.SERVER_APP)
        (task,) = self._state.get_tasks(run_ids=[run])
        token = self._state.claim_task(task.task_id)
        assert token is not None and self._state.activate_task(task.task_id)
        grid = HttpGrid(token=token)
        grid.set_run(self._state.get_run_info(run_ids=[run])[0])
        # The grid is Flower's client of the Runtime API; the API's functions are called here without HTTP between.
        grid._client = _Runtime(self._state, task)
        return grid, task

    @staticmethod
    def _message(task: Task, node: int, payload: bytes, seconds: float) -> Message:
        metadata = Metadata(
            run_id=task.run_id,
            message_id="",
            src_node_id=SUPERLINK_NODE_ID,
            dst_node_id=node,
            reply_to_message_id="",
            group_id="",
            created_at=time.time(),
            ttl=seconds,
            message_type=MessageType.TRAIN,
        )
        return make_message(metadata, content_of(payload))


class _Factory:
    def __init__(self, state: LinkState):
        self._state = state

    def state(self) -> LinkState:
        return self._state


class _Runtime:
    """What Flower's grid asks of the Runtime API."""

    def __init__(self, state: LinkState, task: Task):
        self._asked = {"state": state, "task": task}

    def PushMessages(self, request: Any) -> Any:
        return runtime_handlers.push_messages(request, **self._asked)

    def PushObject(self, request: Any) -> Any:
        return runtime_handlers.push_object(request, **self._asked)

    def PullMessages(self, request: Any) -> Any:
        return runtime_handlers.pull_messages(request, **self._asked)

    def PullObject(self, request: Any) -> Any:
        return runtime_handlers.pull_object(request, **self._asked)

    def ConfirmMessageReceived(self, request: Any) -> Any:
        return runtime_handlers.confirm_message_received(request, **self._asked)


def read_clients(path: Path) -> dict[str, ec.EllipticCurvePublicKey]:
    """The clients that may take part, from lines of `ssh-keygen`: type, key, and a comment that is the client's name.

    Raises:
        ValueError: a line that is none, a key of another kind, or a name twice.
    """
    clients: dict[str, ec.EllipticCurvePublicKey] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        where = f"{path}:{number}"
        if len(words) != 3:
            raise ValueError(
                f"{where}: expected a line of ssh-keygen, `ecdsa-sha2-nistp384 KEY NAME`, found {line:.60}"
            )
        try:
            public = load_ssh_public_key(line.encode())
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        if not isinstance(public, ec.EllipticCurvePublicKey) or not uses_nist_ec_curve(public):
            raise ValueError(f"{where}: {words[0]} is no key of `ssh-keygen -t ecdsa -b 384`")
        if words[2] in clients:
            raise ValueError(f"{where}: the name {words[2]!r} is given twice")
        clients[words[2]] = public
    return clients
