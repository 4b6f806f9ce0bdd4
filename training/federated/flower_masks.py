"""Flower's secure aggregation (SecAgg+) with masks from AES, and its records as bytes.

Flower's protocol, key exchange, shares and quantisation are used as they are. Its masks are not: `pseudo_rand_gen`
folds each secret of 256 bits into a seed of 32 (28 of a key in base64) for a Mersenne Twister: whoever tries all seeds
takes the mask off. The protocol's paper asks for a cryptographic generator (Bonawitz et al. 2017, section 3.4: AES in
counter mode), which `cryptography` has. Importing this module puts it in the place of Flower's.
"""

import math
from collections.abc import Sequence
from importlib import import_module

import numpy as np
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from flwr.app import RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict
from flwr.server.workflow.secure_aggregation import secaggplus_workflow
from numpy.typing import NDArray

from chorus_moe.training.federated.flower_messages import quiet

MODULUS = 2**32
USE = b"chorus-moe mask of a SecAgg+ vector"


def masks(seed: bytes, num_range: int, dimensions_list: Sequence[tuple[int, ...]]) -> list[NDArray[np.int64]]:
    """Uniform integers below 2^32 that follow from a secret; in the place of Flower's `pseudo_rand_gen`.

    Each secret of the protocol makes one mask, so the counter always starts at zero.
    """
    if num_range != MODULUS:
        raise ValueError(f"masks: expected numbers below {MODULUS}, asked for {num_range}")
    key = HKDF(algorithm=hashes.SHA256(), length=32, salt=None, info=USE).derive(seed)
    stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
    return [
        np.frombuffer(stream.update(bytes(4 * math.prod(shape))), dtype="<u4").astype(np.int64).reshape(shape)
        for shape in dimensions_list
    ]


# By its path: the package has a function of the module's name.
secaggplus_mod = import_module("flwr.client.mod.secure_aggregation.secaggplus_mod")
for module in (secaggplus_mod, secaggplus_workflow):
    vars(module)["pseudo_rand_gen"] = masks
quiet()


def record_bytes(record: RecordDict) -> bytes:
    return recorddict_to_proto(record).SerializeToString()


def record_of(payload: bytes) -> RecordDict:
    return recorddict_from_proto(ProtoRecordDict.FromString(payload))
