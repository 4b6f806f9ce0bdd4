"""Messages of a federation: what is packed comes back bit for bit, and other bytes are refused."""

import json
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from chorus_moe.training.federated.updates import (
    MASKED,
    TRAIN,
    MaskedMessage,
    Question,
    Refused,
    Update,
    kind_of,
    pack,
    unpack,
)

WEIGHTS = {
    "layers.0.w": torch.tensor([[1.5, -2.0], [float("nan"), 1e-45]]),
    "half/name": torch.arange(3, dtype=torch.bfloat16),
    "scalar": torch.tensor(7, dtype=torch.int64),
    "none": torch.zeros(0, 4),
}
QUESTION = Question(TRAIN, 3, "abc", rounds_left=4, proximal_weight=0.25, train_lora_a=False, weights=WEIGHTS)
UPDATE = Update(
    round=2,
    base="def",
    examples=5,
    weights=WEIGHTS,
    tokens={(0, "text"): torch.tensor([1, 2**40]), (11, "a/b"): torch.tensor([0])},
    seen={"text": 2**40, "image": 0},
)


def same(a: dict[Any, Tensor], b: dict[Any, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(a[name].nan_to_num(9), b[name].nan_to_num(9)) for name in a
    )


def facts_of(message: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(message).items() if name not in ("weights", "tokens")}


def test_a_question_comes_back() -> None:
    found = Question.unpack(QUESTION.pack())
    assert same(found.weights, WEIGHTS) and facts_of(found) == facts_of(QUESTION)
    stop = Question("stop")
    assert Question.unpack(stop.pack()) == stop
    assert asdict(stop) == {
        "kind": "stop",
        "round": 0,
        "base": "",
        "rounds_left": 1,
        "proximal_weight": 0.0,
        "train_lora_a": True,
        "weights": {},
    }


@pytest.mark.parametrize("spent", [None, [0.5, 1e-5]])
def test_an_update_comes_back_and_is_private_if_it_says_what_was_spent(spent: list[float] | None) -> None:
    given = replace(UPDATE, spent=spent)
    found = Update.unpack(given.pack())
    assert same(found.weights, WEIGHTS) and same(found.tokens, UPDATE.tokens)
    assert facts_of(found) == facts_of(given) and found.is_private == (spent is not None)
    assert {type(count) for count in found.seen.values()} == {int}


def test_an_update_of_nothing_comes_back() -> None:
    nothing = Update(0, "", 0, {}, {}, {})
    assert Update.unpack(nothing.pack()) == nothing


def test_a_masked_message_comes_back() -> None:
    message = MaskedMessage(round=2, node=5, record=bytes(range(256)))
    assert MaskedMessage.unpack(message.pack()) == message
    assert kind_of(message.pack()) == MASKED and kind_of(QUESTION.pack()) == TRAIN
    assert kind_of(UPDATE.pack()) is None


def record(**facts: Any) -> bytes:
    tensors = {"bytes": torch.zeros(1, dtype=torch.uint8)}
    return pack({"record/": tensors}, {"kind": MASKED, "round": 1, "node": 1} | facts)


@pytest.mark.parametrize(
    "payload",
    [
        QUESTION.pack(),
        record(kind=TRAIN),
        record(round=None),
        record(round=True),
        record(node="1"),
        record(node=1.0),
        pack({}, {"kind": MASKED, "round": 1, "node": 1}),
        pack({"record/": {"byte": torch.zeros(1)}}, {"kind": MASKED, "round": 1, "node": 1}),
    ],
    ids=["question", "kind", "no round", "true", "text", "float", "no record", "another record"],
)
def test_another_message_is_no_masked_one(payload: bytes) -> None:
    with pytest.raises(Refused, match=r"expected a message of secure aggregation, found \[.*\] with \["):
        MaskedMessage.unpack(payload)


def test_tensors_that_share_memory_or_have_gaps_are_packed_as_they_look() -> None:
    whole = torch.arange(12.0).view(3, 4).requires_grad_()
    given = {"a": whole, "columns": whole[:, ::2], "turned": whole.t(), "row": whole[1]}
    groups, facts = unpack(pack({"weights/": given}, {"b": 1, "a": [2]}))
    assert same(groups["weights/"], {name: tensor.detach() for name, tensor in given.items()})
    assert facts == {"a": [2], "b": 1}
    # The same bytes, whoever named them first.
    assert pack({}, {"b": 1, "a": 2}) == pack({}, {"a": 2, "b": 1})


def test_a_name_keeps_all_that_follows_its_group() -> None:
    groups, _ = unpack(pack({"x/": {"a/b/c": torch.zeros(1)}, "y/": {"a": torch.ones(1)}}, {}))
    assert {group: list(found) for group, found in groups.items()} == {"x/": ["a/b/c"], "y/": ["a"]}


WITHOUT_FACTS = save({"weights/a": torch.zeros(1)})
GARBLED = save({"weights/a": torch.zeros(1)}, metadata={"facts": "{"})


@pytest.mark.parametrize(
    "payload",
    [b"", b"short", b"x" * 40, QUESTION.pack()[:-1], WITHOUT_FACTS, save({}, metadata={"other": "{}"}), GARBLED],
    ids=["nothing", "short", "noise", "cut", "no facts", "other facts", "no JSON"],
)
def test_other_bytes_are_refused_with_their_number(payload: bytes) -> None:
    with pytest.raises(Refused, match=f"^{len(payload)} bytes that are no message of a federation: "):
        unpack(payload)


@pytest.mark.parametrize(
    "payload",
    [b"", b"x" * 40, WITHOUT_FACTS, GARBLED, save({}, metadata={"facts": "[1]"}), save({}, metadata={"facts": "null"})],
    ids=["nothing", "noise", "no facts", "no JSON", "a list", "null"],
)
def test_other_bytes_are_of_no_kind(payload: bytes) -> None:
    assert kind_of(payload) is None


def test_a_long_reason_is_cut() -> None:
    payload = save({}, metadata={"facts": json.dumps({})})
    assert load(payload) == {}
    with pytest.raises(Refused) as caught:
        unpack(save({}, metadata={"f" * 500: "{}"}))
    assert len(str(caught.value)) < 300
