"""The command `chorus-moe launch`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from chorus_moe.training.cli import PASS_ON, app


@app.command(context_settings=PASS_ON)
def launch(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(help="recipe in YAML, or one that `chorus-moe recipes` lists")],
    nodes: Annotated[int, typer.Option(min=1)] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=1)] = 8,
    starter: Annotated[str, typer.Option("--with", help="torchrun, accelerate, slurm or skypilot")] = "torchrun",
    accelerator: Annotated[str, typer.Option(help="SkyPilot's name of the device")] = "H100",
    bucket: Annotated[str | None, typer.Option(help="SkyPilot: storage that holds the output folder")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the launch file and start nothing")] = False,
    out: Annotated[Path | None, typer.Option(help="with --dry-run: folder to write the file to")] = None,
) -> None:
    """Start a recipe on the devices of this machine, or make the file that starts it on many; more options override
    the recipe: `--learning_rate 1e-4`."""
    from chorus_moe.training.scale.launch import Launch, launch_file, start

    asked = Launch(recipe, nodes, gpus_per_node, context.args, accelerator, bucket)
    if not dry_run:
        start(asked, starter)
    name, text = launch_file(asked, starter)
    if out is None:
        print(text, end="")
        return
    out.mkdir(parents=True, exist_ok=True)
    (out / name).write_text(text, encoding="utf-8")
    print(f"wrote {out / name}", file=sys.stderr)
