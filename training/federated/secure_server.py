"""The server's side of secure aggregation: Flower's SecAgg+ workflow over our exchange, for one round.

Unusual here:
- Flower's workflow is of its old interface: it wants a `LegacyContext` with a strategy, and a grid. Both are stand-ins
  here: one says whom to ask and takes the sum, the other carries messages as our exchange does;
- what a client sends is looked at before the workflow reads it. A client whose message does not fit is left out as one
  that went away. What does not show in a message (a share that is wrong, a vector of nonsense) shows in the sum, and
  the round is given up;
- Flower asks for the keys of everyone who was asked, also of those that went away before they shared them, which no
  client can answer. Here they are forgotten after each of the first two stages.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import ConfigRecord, Context, Message, Metadata, RecordDict
from flwr.app.message import make_message
from flwr.app.message_type import MessageType
from flwr.common import FitIns, FitRes, Parameters, Scalar, bytes_to_ndarray, parameters_to_ndarrays
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key, Stage
from flwr.compat.common.recorddict_compat import parameters_to_arrayrecord, recorddict_to_fitres
from flwr.server.client_manager import ClientManager
from flwr.server.client_proxy import ClientProxy
from flwr.server.compat.legacy_context import LegacyContext
from flwr.server.strategy import FedAvg
from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD
from flwr.server.workflow.constant import Key as WorkflowKey
from flwr.server.workflow.secure_aggregation.secaggplus_workflow import SecAggPlusWorkflow, WorkflowState
from flwr.supercore.primitives.asymmetric import bytes_to_public_key
from flwr.supercore.task_identity import TaskIdentity

from chorus_moe.training.federated.arguments import FederatedArguments
from chorus_moe.training.federated.exchange import Exchange
from chorus_moe.training.federated.flower_masks import MODULUS, record_bytes, record_of
from chorus_moe.training.federated.layout import Layout
from chorus_moe.training.federated.masked_sums import (
    LEVELS,
    MOST_CLIENTS,
    MaskedMean,
    Vector,
    from_sum,
    vector_shapes,
)
from chorus_moe.training.federated.secure_client import BOUND, MOST
from chorus_moe.training.federated.updates import MaskedMessage


@dataclass
class MaskedRound:
    """What came of a round.

    Attributes:
        mean: of the clients' changes; None if the round was given up.
        clients: who is in the sum.
        refused: name -> why it is not; all of them where the round was given up.
        spent: name -> epsilon and delta that a private client says it has spent.
    """

    mean: MaskedMean | None = None
    clients: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    spent: dict[str, list[float]] = field(default_factory=dict)
    bytes_out: int = 0
    bytes_in: int = 0


def ask_masked(
    exchange: Exchange, names: Sequence[str], question: bytes, given: FederatedArguments, layout: Layout, number: int
) -> MaskedRound:
    """One round of secure aggregation.

    Args:
        names: of the clients to ask.
        question: what each of them is to train, as without masks.
    """
    found = MaskedRound()
    nodes = dict(enumerate(sorted(names)[:MOST_CLIENTS], start=1))
    # With noise each client has one part, whatever it counts.
    most = 1 if given.client_noise else given.max_examples
    config: dict[str, Any] = {BOUND: float(given.max_update_norm or 0), MOST: most}
    strategy = Strategy(list(nodes), FitIns(Parameters([question], "safetensors"), config))
    workflow = Workflow(given, len(nodes))
    carrier = Carrier(exchange, nodes, number, given.round_seconds, vector_shapes(layout), found)
    try:
        workflow.run(carrier, _context(strategy, number))
        total = [vector * len(strategy.nodes_in) for vector in strategy.mean]
        assert given.max_update_norm is not None  # `check_federated` has seen to it
        found.mean = from_sum(total, layout, given.max_update_norm, len(strategy.nodes_in))
        found.clients = [nodes[node] for node in strategy.nodes_in]
    # Bytes from outside went into it: whatever they do must not stop the server.
    except Exception as error:
        if carrier.is_broken:
            raise
        reason = f"{error}" if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        found.spent.clear()
        found.refused |= dict.fromkeys(set(names) - found.refused.keys(), f"the round is asked again: {reason}")
    return found


class Strategy(FedAvg):
    """Whom Flower's workflow asks, and where its result goes.

    Attributes:
        mean: the mean of the clients' vectors.
        nodes_in: whose they are.
    """

    def __init__(self, nodes: Sequence[int], asked: FitIns):
        super().__init__()
        self.nodes, self.asked = nodes, asked
        self.mean: list[Vector] = []
        self.nodes_in: list[int] = []

    def configure_fit(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, FitIns]]:
        # The workflow asks a proxy for its number alone.
        return [(cast(ClientProxy, SimpleNamespace(node_id=node)), self.asked) for node in self.nodes]

    def aggregate_fit(
        self, server_round: int, results: list[tuple[ClientProxy, FitRes]], failures: list[object]
    ) -> tuple[None, dict[str, Scalar]]:
        self.nodes_in = sorted(proxy.node_id for proxy, _ in results)
        self.mean = parameters_to_ndarrays(results[0][1].parameters)
        return None, {}


class Workflow(SecAggPlusWorkflow):
    """Flower's workflow, which forgets clients that went away before they shared keys, and opens no small sum."""

    def __init__(self, given: FederatedArguments, asked: int):
        # All of an even number; Flower wants a ring of an odd one.
        shares = asked if given.num_shares is None else min(given.num_shares, asked)
        self.least = given.min_clients
        # A majority, as `SecureLearner` wants it, and two at least.
        needed = max(2, shares // 2 + 1, round(given.reconstruction_threshold * shares))
        super().__init__(
            shares if 2 < shares < asked else 1.0,
            needed / shares,
            max_weight=1.0,
            clipping_range=1.0,
            quantization_range=LEVELS,
            modulus_range=MODULUS,
        )

    def run(self, grid: "Carrier", context: LegacyContext) -> None:
        """All stages.

        Raises:
            ValueError: too few clients are left after one.
        """
        state = WorkflowState()
        stages: list[tuple[str, Callable[..., bool]]] = [
            ("asked for keys", self.setup_stage),
            ("asked for shares of keys", self.share_keys_stage),
            ("asked for masked changes", self.collect_masked_vectors_stage),
            ("asked for shares of lost and finished clients", self.unmask_stage),
        ]
        for said, stage in stages:
            is_enough = stage(grid, context, state)
            # Who goes away in the last stage is in the sum already.
            if not is_enough or (stage != self.unmask_stage and len(state.active_node_ids) < self.least):
                raise ValueError(
                    f"{len(state.active_node_ids)} clients are left of those that were {said}, and "
                    f"{max(self.least, state.threshold)} are needed"
                )
            if stage in (self.setup_stage, self.share_keys_stage):
                state.sampled_node_ids = set(state.active_node_ids)
                for neighbours in state.nid_to_neighbours.values():
                    neighbours &= state.active_node_ids

    def _check_threshold(self, state: Any) -> bool:
        # As Flower's, which logs an error beside the one that `run` raises.
        return all(
            len(state.nid_to_neighbours[node] & state.active_node_ids) >= state.threshold
            for node in state.active_node_ids
        )


class Carrier:
    """What the workflow asks of Flower's grid, over an exchange."""

    def __init__(
        self,
        exchange: Exchange,
        nodes: Mapping[int, str],
        number: int,
        seconds: float,
        shapes: Sequence[tuple[int, ...]],
        found: MaskedRound,
    ):
        self.exchange, self.nodes, self.number, self.seconds, self.found = exchange, nodes, number, seconds, found
        # Flower puts its own weight before the vector.
        self.shapes = [(1,), *shapes]
        self.keys: set[bytes] = set()
        # The exchange itself failed, no client.
        self.is_broken = False

    def send_and_receive(self, messages: Sequence[Message], *, timeout: float | None = None) -> list[Message]:
        """The answers that fit."""
        asked = {message.metadata.dst_node_id: message for message in messages}
        questions = {
            self.nodes[node]: MaskedMessage(self.number, node, record_bytes(message.content)).pack()
            for node, message in asked.items()
        }
        self.found.bytes_out += sum(len(question) for question in questions.values())
        self.is_broken = True
        answers, replies = self.exchange.ask(questions, self.seconds), []
        self.is_broken = False
        for node, message in sorted(asked.items()):
            name = self.nodes[node]
            answer = answers.get(name, "did not answer")
            try:
                if isinstance(answer, str):
                    raise ValueError(answer)
                self.found.bytes_in += len(answer)
                content = record_of(MaskedMessage.unpack(answer).record)
                self._check(name, node, message, content)
                replies.append(_reply(node, content))
            # As in `ask_masked`.
            except Exception as error:
                self.found.refused[name] = f"{error}"
        return replies

    def _check(self, name: str, node: int, asked: Message, content: RecordDict) -> None:
        """Raises ValueError, KeyError or TypeError for an answer that Flower's workflow would stumble over."""
        configs, stage = content.config_records[RECORD_KEY_CONFIGS], _configs(asked)[Key.STAGE]
        if stage == Stage.SETUP:
            pair = {_bytes(configs[key]) for key in (Key.PUBLIC_KEY_1, Key.PUBLIC_KEY_2)}
            for key in pair:
                found = bytes_to_public_key(key)
                if not isinstance(found, ec.EllipticCurvePublicKey) or not isinstance(found.curve, ec.SECP384R1):
                    raise ValueError("sent keys of another kind")
            if len(pair) != 2 or pair & self.keys:
                raise ValueError("sent keys that are there already")
            self.keys |= pair
        elif stage == Stage.SHARE_KEYS:
            others = {int(key) for key in _configs(asked) if key != Key.STAGE} - {node}
            to = configs[Key.DESTINATION_LIST]
            if sorted(to) != sorted(others) or len(configs[Key.CIPHERTEXT_LIST]) != len(to):
                raise ValueError(f"sent {len(to)} shares for {len(others)} other clients")
            for share in configs[Key.CIPHERTEXT_LIST]:
                _bytes(share)
        elif stage == Stage.COLLECT_MASKED_VECTORS:
            vectors = [bytes_to_ndarray(_bytes(part)) for part in configs[Key.MASKED_PARAMETERS]]
            shapes = [vector.shape for vector in vectors]
            if shapes != self.shapes:
                raise ValueError(f"masked vectors have shapes {shapes}, this federation's {self.shapes}")
            if any(v.dtype != np.int64 or v.min() < 0 or v.max() >= MODULUS for v in vectors):
                raise ValueError("masked vectors hold other numbers than those below 2^32")
            self._note_spent(name, recorddict_to_fitres(content, keep_input=True).metrics)
        else:
            wanted = _configs(asked)[Key.ACTIVE_NODE_ID_LIST] + _configs(asked)[Key.DEAD_NODE_ID_LIST]
            shares = configs[Key.SHARE_LIST]
            if configs[Key.NODE_ID_LIST] != wanted or len(shares) != len(wanted):
                raise ValueError(f"sent shares of {configs[Key.NODE_ID_LIST]}, asked for {wanted}")
            if any(len(_bytes(share)) % 16 != 4 for share in shares):
                raise ValueError("sent shares that are none")

    def _note_spent(self, name: str, metrics: Mapping[str, Any]) -> None:
        if not metrics:
            return
        spent = [metrics["epsilon"], metrics["delta"]]
        if not all(type(value) is float and value >= 0 for value in spent):
            raise ValueError(f"has spent {spent!r}, which is no epsilon and delta")
        self.found.spent[name] = spent


def _bytes(value: object) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError(f"sent {type(value).__name__} in the place of bytes")
    return value


def _configs(message: Message) -> Any:
    return message.content.config_records[RECORD_KEY_CONFIGS]


def _reply(node: int, content: RecordDict) -> Message:
    metadata = Metadata(0, "", node, SUPERLINK_NODE_ID, "", "", 0.0, 1e18, MessageType.TRAIN)
    return make_message(metadata, content)


def _context(strategy: Strategy, number: int) -> LegacyContext:
    # As `flwr.server.compat.app` does, for messages that the workflow makes.
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 0, SUPERLINK_NODE_ID
    state = RecordDict(
        {
            MAIN_CONFIGS_RECORD: ConfigRecord({WorkflowKey.CURRENT_ROUND: number}),
            # What is trained goes with the instructions.
            MAIN_PARAMS_RECORD: parameters_to_arrayrecord(Parameters([], "safetensors"), keep_input=True),
        }
    )
    return LegacyContext(Context(0, SUPERLINK_NODE_ID, {}, state, {}), strategy=strategy)
