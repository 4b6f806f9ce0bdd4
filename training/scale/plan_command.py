"""The command `chorus-moe plan`."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from chorus_moe.training.cli import AsJson, app


@app.command()
def plan(
    config: Annotated[str, typer.Argument(help="config.json, model folder or Hub id")],
    gpus: Annotated[int, typer.Option(min=1, help="devices in all")],
    memory: Annotated[
        str | None, typer.Option(help="of one device, such as 80GB; that of --device if left out")
    ] = None,
    gpus_per_node: Annotated[int, typer.Option(min=1)] = 8,
    device: Annotated[str, typer.Option(help="a100, h100, h200, h800 or rtx4090")] = "h100",
    rates: Annotated[Path | None, typer.Option(help="YAML with measured rates in the place of the table's")] = None,
    sequence_length: Annotated[int, typer.Option(min=1, help="tokens of a sequence")] = 4096,
    batch: Annotated[int | None, typer.Option(min=1, help="sequences of a step; one a device if left out")] = None,
    micro_batch: Annotated[int, typer.Option(min=1, help="sequences that a rank computes at a time")] = 1,
    train: Annotated[str, typer.Option(help="whole, lora or frozen_towers")] = "whole",
    precision: Annotated[str, typer.Option(help="mixed, bfloat16 or float32")] = "mixed",
    mix: Annotated[str | None, typer.Option(help="shares of tokens, as in text=0.6,image=0.3,audio=0.1")] = None,
    best: Annotated[int, typer.Option(min=1, help="layouts to show")] = 3,
    as_json: AsJson = False,
) -> None:
    """Memory, traffic and time of a training step in every layout of many devices, from the configuration alone."""
    from chorus_moe.training.inspect_model import read_config
    from chorus_moe.training.scale.plan import Question, make_plan, read_mix
    from chorus_moe.training.scale.plan_rates import read_bytes, read_rates

    found = read_rates(device, rates)
    question = Question(
        gpus=gpus,
        memory=round(found.memory) if memory is None else read_bytes(memory),
        rates=found,
        per_node=gpus_per_node,
        sequence_length=sequence_length,
        batch=batch or 0,
        micro_batch=micro_batch,
        train=train,
        precision=precision,
        mix=None if mix is None else read_mix(mix),
    )
    print("counting ...", file=sys.stderr)
    made = make_plan(read_config(config), question, best)
    print(json.dumps(made.to_dict(), indent=2) if as_json else made)
