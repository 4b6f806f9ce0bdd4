"""Masks against the standards they are made of, step by step, and Flower's records as bytes."""

import hashlib
import hmac
from importlib import import_module

import numpy as np
import pytest

pytest.importorskip("flwr", reason="Flower is not installed: `.ci/matrix federated` runs this")
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from flwr.app import ConfigRecord, RecordDict
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen
from flwr.server.workflow.secure_aggregation import secaggplus_workflow

from chorus_moe.training.federated.flower_masks import MODULUS, masks, record_bytes, record_of


def test_a_mask_is_aes_in_counter_mode_by_a_key_of_hkdf() -> None:
    seed = bytes(range(32))
    # RFC 5869 with an empty salt, one block of output.
    extracted = hmac.new(bytes(32), seed, hashlib.sha256).digest()
    key = hmac.new(extracted, b"chorus-moe mask of a SecAgg+ vector" + b"\x01", hashlib.sha256).digest()
    # Counter mode by hand: each block of the stream is a number, encrypted.
    single = Cipher(algorithms.AES(key), modes.ECB()).encryptor()
    stream = b"".join(single.update(number.to_bytes(16, "big")) for number in range(5))
    expected = [int.from_bytes(stream[4 * i : 4 * i + 4], "little") for i in range(17)]
    found = masks(seed, MODULUS, [(2, 3), (1,), (), (9,)])
    assert [part.shape for part in found] == [(2, 3), (1,), (), (9,)]
    # One stream runs through all parts.
    assert [int(value) for part in found for value in part.ravel()] == expected
    assert {part.dtype for part in found} == {np.dtype(np.int64)}


@pytest.mark.parametrize("size", [2**31, 2**32 - 1, 2**33])
def test_another_range_is_refused_with_both_numbers(size: int) -> None:
    with pytest.raises(ValueError, match=f"masks: expected numbers below 4294967296, asked for {size}"):
        masks(bytes(32), size, [(1,)])


def test_flower_masks_by_it_at_both_ends() -> None:
    mod = import_module("flwr.client.mod.secure_aggregation.secaggplus_mod")
    assert mod.pseudo_rand_gen is masks and secaggplus_workflow.pseudo_rand_gen is masks


def test_records_come_back() -> None:
    record = RecordDict({"configs": ConfigRecord({"a": 1, "b": [b"x", b"y"], "c": 0.5, "d": "text"})})
    found = record_of(record_bytes(record))
    assert dict(found.config_records["configs"]) == dict(record.config_records["configs"])
    with pytest.raises(Exception, match="(?i)pars|decod|wire|truncated"):
        record_of(b"\xff\xff")


def test_a_mask_follows_from_the_whole_secret() -> None:
    """Flower's own generator folds it to 32 bits; when this fails, ours can go."""
    one, other = bytes(28) + b"abcd", b"abcd" + bytes(28)
    (first,), (second,) = (masks(seed, MODULUS, [(1000,)]) for seed in (one, other))
    assert (first != second).all() and first.min() >= 0 and first.max() < MODULUS and first.std() > MODULUS / 4
    (flowers,), (same,) = (pseudo_rand_gen(seed, MODULUS, [(1000,)]) for seed in (one, other))
    assert (flowers == same).all()
