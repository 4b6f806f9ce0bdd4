"""What a compiled step was made from, besides the values of weights, and whether it still is so."""

from collections.abc import Callable
from dataclasses import is_dataclass
from functools import partial
from types import BuiltinFunctionType, FunctionType
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations
from transformers import PreTrainedConfig, PreTrainedModel

# Kinds of settings, by name: as a union they would be put together at each look.
PLAIN = bool, int, float, str


def signature_of(model: PreTrainedModel) -> tuple[Any, ...]:
    """Modules, their settings and hooks, adapters in use, the configuration."""
    modules = ((type(m), settings_of(vars(m))) for m in model.modules())
    return model.config.to_json_string(use_diff=False), *modules


def settings_of(value: object, other: Callable[[object], object] = type) -> object:
    """Something to compare; `other` says what of a value of a kind that is not known."""
    if value is None or isinstance(value, PLAIN):
        return value
    if isinstance(value, FunctionType | BuiltinFunctionType):
        return value
    if isinstance(value, partial):
        return value.func, settings_of(value.args, other), settings_of(value.keywords, other)
    if isinstance(value, dict):
        # A module has more than ten kinds of hooks, and most often none of them. Each is under a number of its own.
        filled = ((key, entry) for key, entry in value.items() if not isinstance(entry, dict) or entry)
        return tuple((key if isinstance(key, str) else "", settings_of(entry, other)) for key, entry in filled)
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device, value.requires_grad
    if isinstance(value, list | tuple | set | frozenset):
        return tuple(settings_of(entry, other) for entry in value)
    # A configuration is in `signature_of` already, and slow to print. Modules are looked at one by one.
    if is_dataclass(value) and not isinstance(value, PreTrainedConfig):
        return repr(value)
    return type_before_parametrizations(value) if isinstance(value, nn.Module) else other(value)


class Snapshot:
    """The objects that `signature_of` reads, and whether they are the same: a look takes a twentieth of a signature.

    Args:
        model: its modules and configuration are looked at.
    """

    def __init__(self, model: PreTrainedModel):
        # What is equal to itself and yet can change, with what is compared of it.
        self.watched: list[tuple[object, object]] = []
        owners: list[Any] = [*model.modules(), *_configurations(model.config)]
        self.owners = [(owner, type(owner), self._copied(vars(owner))) for owner in owners]

    def is_current(self) -> bool:
        """False also where it cannot tell, as with an equal tensor in another's place."""
        try:
            same = all(type(owner) is kind and vars(owner) == saved for owner, kind, saved in self.owners)
        except (RuntimeError, ValueError):  # other tensors or arrays: what `==` says of them is no yes or no
            return False
        return same and all(settings_of(value) == saved for value, saved in self.watched)

    def _copied(self, value: Any) -> Any:
        """Containers as they are now; everything else itself, which is compared by identity first."""
        for kind in (tuple, list, set, frozenset):
            if isinstance(value, kind):
                return kind(self._copied(entry) for entry in value)
        if isinstance(value, dict):
            return {key: self._copied(entry) for key, entry in value.items()}
        if isinstance(value, Tensor | partial) or (is_dataclass(value) and not isinstance(value, PreTrainedConfig)):
            self.watched.append((value, settings_of(value)))
        return value


def _configurations(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    below = [value for value in vars(config).values() if isinstance(value, PreTrainedConfig)]
    return [config, *(each for value in below for each in _configurations(value))]
