"""What the package does for the model and code exported without it lacks: nothing that loading or running needs."""

from collections.abc import Callable
from typing import Any

# Name -> function. `import chorus_moe` enters them, so this folder need not import what does not ship with it.
SERVICES: dict[str, Callable[..., Any]] = {}


def service(name: str, wanted: str) -> Callable[..., Any]:
    """A function of the package.

    Args:
        wanted: what the caller asked for, in words.

    Raises:
        ImportError: the package was not imported before this code.
    """
    if name not in SERVICES:
        raise ImportError(f"{wanted} takes the whole package: install chorus-moe, and `import chorus_moe` first")
    return SERVICES[name]
