"""Whether a checkpoint fits the model that is loaded from it: transformers only reports what does not.

Unusual here: a checkpoint saved by the same class must hold exactly its tensors. One saved by another class (another
head, or no head) may differ in the head, and in nothing else.
"""

import re
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

MAX_NAMES = 5
# Operation of a model -> the tensors that it adds, where a configuration alone asks for them in vain.
GROWN = {"add_exits": r"exits\.\d+\..+", "add_skip_gates": r".*\.skip_gate\..+"}
ALIGNMENT = 64  # bytes, as torch allocates


class CheckpointError(RuntimeError, ValueError):
    """A checkpoint that does not fit: a RuntimeError as transformers raises, a ValueError as all mistakes of users."""


def check_shapes(model: nn.Module, name_or_path: Any, mismatched: Iterable[tuple[str, Any, Any]]) -> None:
    """Refuse tensors of another shape.

    Args:
        mismatched: name, shape in the checkpoint and shape in the model of each.

    Raises:
        CheckpointError: naming them with both shapes.
    """
    found = [f"{name} {tuple(theirs)}, expected {tuple(ours)}" for name, theirs, ours in sorted(mismatched)]
    if found:
        raise CheckpointError(
            f"{_subject(model, name_or_path)}: {_counted('mismatched', found, '; ')}. Pass "
            "ignore_mismatched_sizes=True to start these tensors anew"
        )


def describe_misfit(model: Any, name_or_path: Any, missing: Iterable[str], unexpected: Iterable[str]) -> str | None:
    """What the checkpoint lacks or has too much of, in one line that names the tensors; None if it fits.

    Args:
        model: a Chorus model whose `config.architectures` says which class saved the checkpoint.
        missing, unexpected: names after what the model itself ignores was taken out.
    """
    same_class = type(model).__name__ in (model.config.architectures or [])
    prefix, base = f"{model.base_model_prefix}.", model.base_model

    def matters(name: str) -> bool:
        return same_class or name.startswith(prefix) or hasattr(base, name.partition(".")[0])

    lacks, has_too_much = sorted(filter(matters, missing)), sorted(filter(matters, unexpected))
    faults = [
        _counted(kind, names, ", ") for kind, names in (("missing", lacks), ("unexpected", has_too_much)) if names
    ]
    if not faults:
        return None
    operations = [] if has_too_much else _operations_that_add(lacks)
    advice = f"Load it with its own configuration and call {' and '.join(operations)}. " if operations else ""
    return (
        f"{_subject(model, name_or_path)}: {'; '.join(faults)}. {advice}Pass output_loading_info=True to load it all "
        "the same, missing tensors newly initialised, and get the full list"
    )


def _operations_that_add(missing: list[str]) -> list[str]:
    """The operations of a model after which it has these tensors; empty if one is of another kind."""
    found = {name: sum(bool(re.fullmatch(pattern, tensor)) for tensor in missing) for name, pattern in GROWN.items()}
    return [name for name, count in found.items() if count] if sum(found.values()) == len(missing) else []


def _subject(model: nn.Module, name_or_path: Any) -> str:
    source = "the state dict" if name_or_path is None else f"the checkpoint {str(name_or_path)!r}"
    return f"{source} does not fit {type(model).__name__}"


def _counted(kind: str, names: list[str], separator: str) -> str:
    more = f"{separator}and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return f"{len(names)} {kind} tensor{'s' if len(names) > 1 else ''}: {separator.join(names[:MAX_NAMES])}{more}"


def align_parameters(model: Any) -> None:
    """Copy parameters that lie in a mapped file, at any multiple of eight bytes, to memory as torch allocates it.

    Some processors sum in another order where operands are not aligned: a loaded model would differ from the saved one
    in the last bit of what it computes. And a mapped file must not change while the model lives.
    """
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and type(parameter.data) is Tensor and parameter.data_ptr() % ALIGNMENT:
            parameter.data = parameter.data.clone()
