"""What crosses the wire: weights, counts and a few facts, as the bytes of one safetensors file."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

TRAIN, STOP, MASKED = "train", "stop", "masked"
# Of the names in the file.
WEIGHTS, TOKENS, SEEN, RECORD = "weights/", "tokens/", "seen/", "record/"
Place = tuple[int, str]


class Refused(ValueError):
    """Why a question or an answer is not taken. The other side may read it, so it tells nothing of rows."""


@dataclass(frozen=True)
class Question:
    """What the server asks: train from these weights, or stop.

    Attributes:
        base: SHA-256 of all that nobody trains, see `layout.py`.
        rounds_left: this one included; a private client divides its budget among them.
        proximal_weight: of FedProx.
        train_lora_a: whether the first matrices of a LoRA are trained, too.
    """

    kind: str
    round: int = 0
    base: str = ""
    rounds_left: int = 1
    proximal_weight: float = 0.0
    train_lora_a: bool = True
    weights: dict[str, Tensor] = field(default_factory=dict)

    def pack(self) -> bytes:
        names = ("kind", "round", "base", "rounds_left", "proximal_weight", "train_lora_a")
        facts = {name: getattr(self, name) for name in names}
        return pack({WEIGHTS: self.weights}, facts)

    @classmethod
    def unpack(cls, payload: bytes) -> "Question":
        tensors, facts = unpack(payload)
        return cls(**facts, weights=tensors.get(WEIGHTS, {}))


@dataclass(frozen=True)
class Update:
    """What a client has learned.

    Attributes:
        weights: what it trained, after training.
        examples: its rows.
        tokens: (layer, bank) -> int64, how often each expert was chosen; empty from a private client.
        seen: modality -> its tokens; empty from a private client.
        spent: epsilon and delta that a private client has spent of each of its rows so far; None without privacy.
    """

    round: int
    base: str
    examples: int
    weights: dict[str, Tensor]
    tokens: dict[Place, Tensor]
    seen: dict[str, int]
    spent: list[float] | None = None

    @property
    def is_private(self) -> bool:
        return self.spent is not None

    def pack(self) -> bytes:
        tokens = {f"{layer}/{bank}": count_E for (layer, bank), count_E in self.tokens.items()}
        seen = {name: torch.tensor(count) for name, count in self.seen.items()}
        facts = {"round": self.round, "base": self.base, "examples": self.examples, "spent": self.spent}
        return pack({WEIGHTS: self.weights, TOKENS: tokens, SEEN: seen}, facts)

    @classmethod
    def unpack(cls, payload: bytes) -> "Update":
        tensors, facts = unpack(payload)
        tokens: dict[Place, Tensor] = {}
        for name, count_E in tensors.get(TOKENS, {}).items():
            layer, _, bank = name.partition("/")
            tokens[int(layer), bank] = count_E
        seen = {name: int(count) for name, count in tensors.get(SEEN, {}).items()}
        return cls(**facts, weights=tensors.get(WEIGHTS, {}), tokens=tokens, seen=seen)


@dataclass(frozen=True)
class MaskedMessage:
    """A message of secure aggregation, in either direction.

    Attributes:
        node: the client's number in this round.
        record: what Flower's protocol says, in its own bytes.
    """

    round: int
    node: int
    record: bytes

    def pack(self) -> bytes:
        record = torch.frombuffer(bytearray(self.record), dtype=torch.uint8)
        return pack({RECORD: {"bytes": record}}, {"kind": MASKED, "round": self.round, "node": self.node})

    @classmethod
    def unpack(cls, payload: bytes) -> "MaskedMessage":
        """Raises Refused: these are other bytes."""
        tensors, facts = unpack(payload)
        record, number, node = tensors.get(RECORD, {}).get("bytes"), facts.get("round"), facts.get("node")
        if facts.get("kind") != MASKED or record is None or type(number) is not int or type(node) is not int:
            raise Refused(f"expected a message of secure aggregation, found {sorted(facts)} with {sorted(tensors)}")
        return cls(number, node, record.numpy().tobytes())


def kind_of(payload: bytes) -> object:
    """What a question asks for; None where it cannot be read."""
    try:
        return _facts(payload).get("kind")
    except (KeyError, TypeError, AttributeError, ValueError):
        return None


def _facts(payload: bytes) -> Any:
    # safetensors gives metadata of files only.
    header = json.loads(payload[8 : 8 + int.from_bytes(payload[:8], "little")])
    return json.loads(header["__metadata__"]["facts"])


def pack(groups: Mapping[str, Mapping[str, Tensor]], facts: Mapping[str, Any]) -> bytes:
    """Groups of tensors and facts in JSON as a safetensors file."""
    tensors = {group + name: tensor for group, found in groups.items() for name, tensor in found.items()}
    # safetensors refuses tensors that share memory or have gaps.
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    return save(tensors, metadata={"facts": json.dumps(facts, sort_keys=True)})


def unpack(payload: bytes) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The groups of tensors and the facts of `pack`.

    Raises:
        Refused: these are other bytes.
    """
    try:
        tensors = load(payload)
        # The library has checked the length of the header.
        facts = _facts(payload)
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise Refused(f"{len(payload)} bytes that are no message of a federation: {error!r:.200}") from error
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        group, _, rest = name.partition("/")
        groups.setdefault(f"{group}/", {})[rest] = tensor
    return groups, facts
