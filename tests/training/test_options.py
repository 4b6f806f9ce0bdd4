"""An option that a command does not take, and says why."""

from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from chorus_moe.training.options import without


def test_an_option_that_is_not_taken_is_hidden_and_says_what_to_do() -> None:
    app = typer.Typer()

    @app.command()
    def work(name: str, device: Annotated[str | None, without("--device", "take --use_cpu true")] = None) -> None:
        print(f"worked on {name}")

    assert "worked on x" in CliRunner().invoke(app, ["x"]).stdout
    assert "--device" not in CliRunner().invoke(app, ["--help"]).stdout
    with pytest.raises(ValueError, match="^--device cpu: take --use_cpu true$"):
        CliRunner().invoke(app, ["x", "--device", "cpu"], catch_exceptions=False)
