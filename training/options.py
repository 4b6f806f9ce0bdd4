"""Options that a command does not take, and says why."""

import typer
from typer.models import OptionInfo


def without(option: str, instead: str) -> OptionInfo:
    """The hidden option of a command that has no use for it; who asks for it is told what to do.

    Raises:
        ValueError: when it is given.
    """

    def refuse(value: str | None) -> None:
        if value is not None:
            raise ValueError(f"{option} {value}: {instead}")

    return typer.Option(option, hidden=True, callback=refuse)
