"""A client's side of secure aggregation: Flower's mod, what a client checks before it helps, and its own vector.

Unusual here:
- training comes before the mod is called, so an error of the protocol and one of training are told apart;
- the mod does whatever the server says. What would give a client away is refused first: both kinds of a client's
  shares, a sum of too few, a minority that opens masks, keys or shares twice.
"""

from collections.abc import Callable
from typing import Any, cast

from cryptography.fernet import InvalidToken
from flwr.app import ConfigRecord, Context, Message, Metadata, RecordDict
from flwr.app.message import make_message
from flwr.app.message_type import MessageType
from flwr.client.mod import secaggplus_mod
from flwr.common import Code, FitRes, Status, ndarrays_to_parameters
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key, Stage
from flwr.compat.common.recorddict_compat import fitres_to_recorddict, recorddict_to_fitins

from chorus_moe.training.federated.arguments import FederatedArguments
from chorus_moe.training.federated.flower_masks import MODULUS, record_bytes, record_of
from chorus_moe.training.federated.layout import layout_asked
from chorus_moe.training.federated.learner import Learner
from chorus_moe.training.federated.masked_sums import LEVELS, to_vector
from chorus_moe.training.federated.updates import MASKED, MaskedMessage, Question, Refused, kind_of

# Of the instructions that come with the weights.
BOUND, MOST = "max_update_norm", "max_examples"
# What the vectors of `masked_sums.py` are made for.
FIXED = {Key.CLIPPING_RANGE: 1.0, Key.TARGET_RANGE: LEVELS, Key.MOD_RANGE: MODULUS, Key.MAX_WEIGHT: 1.0}


class SecureLearner:
    """Answers a server's questions: those of secure aggregation here, all others as the learner does."""

    def __init__(self, learner: Learner):
        self.learner = learner
        self._round: Round | None = None

    def answer(self, payload: bytes) -> bytes | None:
        """As `Learner.answer`.

        Raises:
            Refused: as there; a message that does not fit the protocol, or that would give this client away.
        """
        if kind_of(payload) != MASKED:
            return self.learner.answer(payload)
        asked = MaskedMessage.unpack(payload)
        with_context = _as_refusal(lambda: _message(asked))
        configs = with_context.content.config_records.get(RECORD_KEY_CONFIGS, {})
        stage = configs.get(Key.STAGE)
        if stage == Stage.SETUP:
            self._round = Round(asked, self.learner.recipe.federated)
        found = self._round
        if found is None or (found.number, found.node) != (asked.round, asked.node):
            raise Refused(f"stage {stage!r} of round {asked.round} came without its beginning")
        _as_refusal(lambda: found.check(stage, configs))
        learned = self._learn(with_context.content) if stage == Stage.COLLECT_MASKED_VECTORS else None

        def give(message: Message, context: Context) -> Message:
            assert learned is not None  # the mod asks in this stage alone
            return Message(fitres_to_recorddict(learned, keep_input=True), reply_to=message)

        reply = _as_refusal(lambda: secaggplus_mod(with_context, found.context, give))
        if stage == Stage.UNMASK:
            # No second word about these masks.
            self._round = None
        return MaskedMessage(asked.round, asked.node, record_bytes(reply.content)).pack()

    def _learn(self, content: RecordDict) -> FitRes:
        instructions = _as_refusal(lambda: recorddict_to_fitins(content, keep_input=True))
        bound, most = instructions.config.get(BOUND), instructions.config.get(MOST)
        if type(bound) is not float or not bound > 0 or type(most) is not int or most < 1:
            raise Refused(f"a change is to be clipped to {bound!r}, and {most!r} rows to count at most")
        question = Question.unpack(instructions.parameters.tensors[0])
        update = self.learner.train(question)
        layout = layout_asked(self.learner.model, question.weights, question.train_lora_a)
        vector = to_vector(update, question.weights, layout, bound, most)
        told: dict[str, Any] = {}
        if update.spent is not None:
            told = dict(zip(("epsilon", "delta"), update.spent, strict=True))
        # The weights are in the vector: to Flower, every client counts as one.
        return FitRes(Status(Code.OK, ""), ndarrays_to_parameters(cast(Any, vector)), 1, told)


class Round:
    """One run of the protocol: Flower's state, which holds this client's secrets, and what was agreed."""

    def __init__(self, first: MaskedMessage, own: FederatedArguments):
        self.number, self.node, self.own = first.round, first.node, own
        self.context = Context(run_id=0, node_id=first.node, node_config={}, state=RecordDict(), run_config={})
        self.peers: set[int] = set()
        self.sources: set[int] = set()
        self.shares = self.threshold = 0

    def check(self, stage: object, configs: ConfigRecord) -> None:
        """Raises Refused for what would tell more than the sum of enough clients."""
        if stage == Stage.SETUP:
            self._check_setup(configs)
        elif stage == Stage.SHARE_KEYS:
            self.peers = {int(name) for name in configs if name != Key.STAGE}
        elif stage == Stage.COLLECT_MASKED_VECTORS:
            sources = configs[Key.SOURCE_LIST]
            self.sources = set(sources)
            if len(self.sources) != len(sources) or not self.sources <= self.peers - {self.node}:
                raise Refused("shares came twice, or from others than those whose keys came")
        elif stage == Stage.UNMASK:
            self._check_unmask(configs[Key.ACTIVE_NODE_ID_LIST], configs[Key.DEAD_NODE_ID_LIST])

    def _check_setup(self, configs: ConfigRecord) -> None:
        for name, wanted in FIXED.items():
            if configs[name] != wanted:
                raise Refused(f"{name} is {configs[name]!r} at the server and {wanted!r} here")
        self.shares, self.threshold = configs[Key.SHARE_NUMBER], configs[Key.THRESHOLD]
        # Each client tells one kind of share of each other one, so two majorities would have to be found.
        if not self.threshold * 2 > self.shares:
            raise Refused(f"{self.threshold} of {self.shares} shares would take masks off: this client wants over half")

    def _check_unmask(self, active: list[int], dead: list[int]) -> None:
        least = max(self.threshold, min(self.own.min_clients, self.shares))
        if len(set(active)) < least:
            raise Refused(f"a sum of {len(set(active))} clients is to be opened, and this client wants {least}")
        known = self.sources | {self.node}
        if len({*active, *dead}) != len(active) + len(dead) or not {*active, *dead} <= known or self.node not in active:
            raise Refused("a client is said to be there and gone at once, or was never part of the round")


def _message(asked: MaskedMessage) -> Message:
    metadata = Metadata(
        run_id=0,
        message_id="",
        src_node_id=0,
        dst_node_id=asked.node,
        reply_to_message_id="",
        group_id=f"{asked.round}",
        created_at=0.0,
        # The wire has a limit of its own.
        ttl=1e18,
        message_type=MessageType.TRAIN,
    )
    return make_message(metadata, record_of(asked.record))


def _as_refusal(step: Callable[[], Any]) -> Any:
    """What Flower raises for a message that does not fit tells nothing of rows."""
    try:
        return step()
    except Refused:
        raise
    except InvalidToken as error:
        raise Refused("a share of another client's keys cannot be read") from error
    except Exception as error:
        raise Refused(f"secure aggregation: {type(error).__name__}: {error}") from error
