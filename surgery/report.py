"""The report of an operation on a model, and the check that refuses one while adapters are active.

Operations (compose, add, prune, merge, convert, exchange) change weights and configuration together, and return a
report.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from typing import Any, TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn

from chorus_moe.fastpaths.quantized_weights import QuantizedWeight
from chorus_moe.surgery.printing import Table

Built = TypeVar("Built")


@dataclass(frozen=True, kw_only=True)
class OperationReport:
    """What changed.

    Args:
        operation: what was done, such as `add_bank`.
        subject: what it was done to: a bank, a modality, a checkpoint.
        parameters_before, parameters_after: parameters of the whole model.
        experts: `bank -> {layer: (experts before, experts after)}`, for the banks that changed.
        notes: anything else worth a line.
        trainable_before, trainable_after: parameters that are trained, where the operation is about that.
    """

    operation: str
    subject: str
    parameters_before: int
    parameters_after: int
    experts: dict[str, dict[int, tuple[int, int]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    trainable_before: int | None = None
    trainable_after: int | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"{self.operation} {self.subject}: {self.parameters_before:,} -> {self.parameters_after:,} parameters "
            f"({self.parameters_after - self.parameters_before:+,})"
        ]
        if self.trainable_before is not None and self.trainable_after is not None:
            lines.append(f"  trainable: {self.trainable_before:,} -> {self.trainable_after:,} parameters")
        for bank, layers in self.experts.items():
            counts = ", ".join(f"layer {layer}: {before} -> {after}" for layer, (before, after) in layers.items())
            lines.append(f"  experts of {bank}: {counts}")
        return "\n".join(lines + [f"  {note}" for note in self.notes])

    def _repr_html_(self) -> str:
        rows: list[Sequence[object]] = [("parameters", self.parameters_before, self.parameters_after)]
        if self.trainable_before is not None and self.trainable_after is not None:
            rows.append(("trainable parameters", self.trainable_before, self.trainable_after))
        rows += [
            (f"experts of {bank}, layer {layer}", *counts)
            for bank, layers in self.experts.items()
            for layer, counts in layers.items()
        ]
        notes = "".join(f"<li>{escape(note)}</li>" for note in self.notes)
        title = f"{self.operation} {self.subject}".strip()
        return Table((title, "before", "after"), rows).to_html() + (f"<ul>{notes}</ul>" if notes else "")


def count_parameters(model: nn.Module) -> int:
    return sum(numbers_in(parameter) for parameter in model.parameters())


def numbers_in(parameter: Tensor) -> int:
    """How many weights a parameter holds: bytes of 4-bit weights hold two each, DeepSpeed leaves empty ones behind."""
    return getattr(parameter, "ds_numel", parameter.numel()) * (2 if parameter.dtype == torch.uint8 else 1)


def checked(operation: str, build: Callable[[], Built]) -> Built:
    """Turn an error of a configuration into a ValueError of the operation, like all its other errors."""
    try:
        return build()
    # The strict dataclass wraps the error of a check; its cause says what is wrong, without the wrapper.
    except (StrictDataclassError, ValueError) as error:
        raise ValueError(f"{operation}: {error.__cause__ or error}") from error


def refuse_adapters(model: nn.Module, operation: str, may_be_quantized: bool = False) -> None:
    """Refuse an operation that would leave an adapter's tensors in the wrong shape or on the wrong expert, and one that
    would take whole numbers for weights.

    Raises:
        ValueError: the model carries adapters (PEFT), naming some of the adapted modules, or weights of `quantize`.
    """
    adapted = [
        name
        for name, module in model.named_modules()
        # By attribute, so that PEFT need not be installed: LoRA layers, LoRA on embeddings and any other wrapper of
        # PEFT.
        if any(hasattr(module, mark) for mark in ("lora_A", "lora_embedding_A", "base_layer"))
    ]
    if adapted:
        more = f" and {len(adapted) - 3} more" if len(adapted) > 3 else ""
        raise ValueError(
            f"{operation}: {len(adapted)} modules carry adapters ({', '.join(adapted[:3])}{more}); merge them "
            "(`merge_and_unload()`) or unload them first"
        )
    stored = [name for name, module in model.named_modules() if isinstance(module, QuantizedWeight)]
    if stored and not may_be_quantized:
        name = stored[0].replace(".parametrizations", "").removesuffix(".0")
        more = f" and {len(stored) - 1} more" if len(stored) > 1 else ""
        raise ValueError(f"{operation}: {name}{more} are quantised; call dequantize(model) first, and quantize again")
