"""What the server's rounds need of a wire."""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Protocol


class Exchange(Protocol):
    """Who carries questions to clients."""

    def clients(self) -> list[str]:
        """Names of those that are there now."""

    def ask(self, questions: Mapping[str, bytes], seconds: float) -> dict[str, bytes | str]:
        """The answers that came in time, or what went wrong, by the client's name."""


def need_flower() -> None:
    """Raises ImportError, saying how to install it, where Flower is missing."""
    if find_spec("flwr") is None:
        raise ImportError("flwr is missing: pip install 'chorus-moe[federated]'")
