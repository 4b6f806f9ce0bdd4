"""A client that is killed by itself when it has shared its keys and is to send what it learned, in the second round."""

import os
import signal
import sys

from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key, Stage

from chorus_moe.training.federated.flower_client import serve_server
from chorus_moe.training.federated.flower_masks import record_of
from chorus_moe.training.federated.learner import Learner
from chorus_moe.training.federated.secure_client import SecureLearner
from chorus_moe.training.federated.updates import MASKED, MaskedMessage, kind_of
from chorus_moe.training.recipe import read_recipe

recipe, address = sys.argv[1:]
learner = SecureLearner(Learner.of(read_recipe(recipe)))


def answer(payload: bytes) -> bytes | None:
    if kind_of(payload) == MASKED:
        message = MaskedMessage.unpack(payload)
        stage = record_of(message.record).config_records[RECORD_KEY_CONFIGS][Key.STAGE]
        if message.round == 2 and stage == Stage.COLLECT_MASKED_VECTORS:
            os.kill(os.getpid(), signal.SIGKILL)
    return learner.answer(payload)


serve_server(address, answer, is_plain=True)
