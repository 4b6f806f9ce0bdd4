"""How many bytes the groups of a model take, and in what numbers they are stored, whoever quantised them."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from chorus_moe.surgery.parameters import part_of
from chorus_moe.surgery.parts import bank_tensor
from chorus_moe.surgery.report import numbers_in

logger = logging.get_logger(__name__)


@dataclass
class GroupBytes:
    """One group of weights.

    Args:
        numbers: kind of number, such as "float32" or "int4" -> how many weights are stored so.
        bytes: with scales and offsets.
    """

    numbers: dict[str, int] = field(default_factory=dict)
    bytes: int = 0

    @property
    def total(self) -> int:
        return sum(self.numbers.values())

    @property
    def is_quantized(self) -> bool:
        """Whether any of it is stored in 8 bits or fewer."""
        return self.total > 0 and any(not kind.startswith(("float", "bfloat")) for kind in self.numbers)


@dataclass(frozen=True)
class BytesReport:
    """Group -> its weights and bytes. Experts are a group by bank, their routers and gates one for all banks."""

    groups: dict[str, GroupBytes]

    @property
    def bytes(self) -> int:
        return sum(group.bytes for group in self.groups.values())

    @property
    def bytes_in_float32(self) -> int:
        return 4 * sum(group.total for group in self.groups.values())

    @property
    def missed(self) -> str | None:
        """The largest group, if nothing in it is quantised."""
        name = max(self.groups, key=lambda group: self.groups[group].total)
        return None if self.groups[name].is_quantized else name

    def warn(self) -> None:
        """Say it where the largest group was not reached."""
        if self.missed is not None:
            share = self.groups[self.missed].total * 4 / self.bytes_in_float32
            logger.warning(
                f"nothing in {self.missed!r} is quantised, and it is the largest group: {share:.0%} of the weights"
            )

    def __str__(self) -> str:
        lines = [f"{'group':<24}{'weights':>16}{'bytes':>16}{'of float32':>12}  stored as"]
        for name, group in self.groups.items():
            share, kinds = group.bytes / (4 * group.total), ", ".join(group.numbers)
            lines.append(f"{name:<24}{group.total:>16,}{group.bytes:>16,}{share:>12.3f}  {kinds}")
        total = self.bytes_in_float32 // 4
        lines.append(f"{'all':<24}{total:>16,}{self.bytes:>16,}{self.bytes / self.bytes_in_float32:>12.3f}")
        return "\n".join(lines)


def bytes_report(model: nn.Module) -> BytesReport:
    """Count what `save_pretrained` would write, tied weights once."""
    groups: dict[str, GroupBytes] = {}
    for name, tensor in _saved_tensors(model):
        place = bank_tensor(name)
        if place is None:
            group = part_of(name)
        else:
            is_expert = place.part.startswith(("experts.", "deeper_experts."))
            group = f"experts:{place.bank}" if is_expert else "routers"
        found = groups.setdefault(group, GroupBytes())
        found.bytes += _bytes_of(tensor)
        # Scales and offsets are bytes of the weights that they belong to.
        if isinstance(tensor, nn.Parameter) or not _is_scale(name):
            kind = _kind_of(tensor)
            found.numbers[kind] = found.numbers.get(kind, 0) + numbers_in(tensor)
    order = sorted(groups.items(), key=lambda item: (not item[0].startswith("experts:"), -item[1].total))
    return BytesReport({name: group for name, group in order if group.total})


def _saved_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    saved = set(model.state_dict())
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in saved)


def _is_scale(name: str) -> bool:
    return ".parametrizations." in name


def _bytes_of(tensor: Any) -> int:
    # Tensors of torchao are made of several plain ones.
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return sum(_bytes_of(getattr(tensor, name)) for name in names)
    return tensor.numel() * tensor.element_size()


def _kind_of(tensor: Tensor) -> str:
    if hasattr(tensor, "__tensor_flatten__"):
        return type(tensor).__name__
    return {torch.uint8: "int4"}.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))
