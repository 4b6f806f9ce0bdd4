"""Experts of other shapes at equal active parameters: deep ones, and leading shares of their width.

Run as `python -m benchmarks.deep_experts`. Decoders learn to count in words in as many steps, in two parts:

- `depth`: `chorus` with experts of one feed-forward, `depth_2` and `depth_3` with experts of two and three, each so
  much narrower that total and active parameters are the same;
- `width`: `nested` is one decoder trained with `expert_width_shares` (nested dropout) and asked for each of `SHARES`;
  `narrow` are decoders of their own, whose experts have that width from the start and so equal active parameters.

Rows, by seed and in the mean: active parameters of a text token; nats for each letter of held-out texts; the share of
letters of held-out answers that is right; of `depth` also milliseconds of a forward over a batch of texts. `spread` is
the standard deviation of the loss over the seeds.
"""

import argparse
from collections.abc import Mapping
from statistics import fmean, pstdev
from typing import Any

import torch

from benchmarks import counting
from benchmarks.timing import OURS, Report, figures, measure, parse
from chorus_moe.modeling.modeling_generation import ChorusForConditionalGeneration
from chorus_moe.surgery import parameter_report

DEPTHS = {OURS: 1, "depth_2": 2, "depth_3": 3}
SHARES = [0.25, 0.5, 1.0]
EXPERTS, TOP_K, ROWS = 8, 2, 8
UNITS = ("active", "loss", "right")
Models = dict[str, ChorusForConditionalGeneration]
# Unit -> arm with its unit -> a value for each seed.
Found = dict[str, dict[str, list[float]]]


def decoder(parsed: argparse.Namespace, seed: int, width: int, depth: int = 1, **text: Any) -> Any:
    """Only the first layer is dense."""
    bank = {
        "num_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
        "intermediate_size": width,
        "expert_depth": depth,
    }
    return counting.decoder(
        parsed.layers,
        parsed.hidden_size,
        seed,
        modalities=["text"],
        mlp_layer_types=["dense"] + ["sparse"] * (parsed.layers - 1),
        expert_banks={"common": bank},
        shared_expert_intermediate_size=0,
        **text,
    )


@torch.no_grad()
def forward(model: ChorusForConditionalGeneration, ids: torch.Tensor) -> Any:
    return model(input_ids=ids, use_cache=False).logits


def summed_up(found: Found, part: str, report: Report) -> None:
    """The means over the seeds, and how far the losses of the seeds lie apart."""
    for unit in UNITS:
        report.add(f"{part}, {unit}, mean", {key: fmean(values) for key, values in found[unit].items()}, unit)
    spread = {key.replace("_loss", "_spread"): pstdev(values) for key, values in found["loss"].items()}
    report.add(f"{part}, loss, spread", spread, "spread")


def noted(found: Found, values: Mapping[str, tuple[float, float, float]], case: str, report: Report) -> None:
    """Keep and print what the arms of one seed have reached."""
    for place, unit in enumerate(UNITS):
        row = {f"{name}_{unit}": of_arm[place] for name, of_arm in values.items()}
        report.add(case.format(unit), row, unit)
        for key, value in row.items():
            found[unit].setdefault(key, []).append(value)


def study_depth(parsed: argparse.Namespace, report: Report) -> None:
    found, ids, models = Found({unit: {} for unit in UNITS}), counting.held_out(), Models()
    for seed in parsed.seeds:
        models = {name: decoder(parsed, seed, parsed.width // depth, depth) for name, depth in DEPTHS.items()}
        counting.learn(models, parsed.steps, seed=seed)
        values = {
            name: (parameter_report(model).active["text"], *counting.quality(model, ids))
            for name, model in models.items()
        }
        noted(found, values, f"depth, {{}}, seed {seed}", report)
    summed_up(found, "depth", report)
    calls = {name: lambda m=model: forward(m, ids[:ROWS]) for name, model in models.items()}
    report.add("forward", figures(measure(calls, parsed.rounds, memory=False)))


def study_width(parsed: argparse.Namespace, report: Report) -> None:
    found, ids = Found({unit: {} for unit in UNITS}), counting.held_out()
    for seed in parsed.seeds:
        models: Models = {f"narrow_{share:g}": decoder(parsed, seed, round(share * parsed.width)) for share in SHARES}
        nested = decoder(parsed, seed, parsed.width, expert_width_shares=SHARES)
        counting.learn({**models, "nested": nested}, parsed.steps, seed=seed)
        values = {
            name: (parameter_report(model).active["text"], *counting.quality(model, ids))
            for name, model in models.items()
        }
        for share in SHARES:
            active = parameter_report(nested, expert_width_share=share).active["text"]
            values[f"nested_{share:g}"] = (active, *counting.quality(nested, ids, expert_width_share=share))
        noted(found, values, f"width, {{}}, seed {seed}", report)
    summed_up(found, "width", report)


PARTS = {"depth": study_depth, "width": study_width}


def main(arguments: list[str] | None = None) -> None:
    options = (
        ("--steps", {"type": int, "default": 300, "help": "training steps (default 300)"}),
        ("--seeds", {"type": int, "nargs": "+", "default": [0, 1, 2]}),
        ("--layers", {"type": int, "default": 4}),
        ("--hidden-size", {"type": int, "default": 64}),
        ("--width", {"type": int, "default": 96, "help": "of an expert of one feed-forward, a multiple of 12"}),
        ("--parts", {"nargs": "+", "choices": list(PARTS), "default": list(PARTS)}),
    )
    parsed = parse("Deep and narrowed experts at equal active parameters.", arguments, *options)
    if parsed.quick:
        parsed.steps, parsed.seeds, parsed.layers, parsed.hidden_size, parsed.width = 2, [0], 2, 32, 12
    if parsed.width % 12:
        raise SystemExit(f"--width {parsed.width} is no multiple of 12, so the experts would differ in parameters")
    report = Report(f"shapes of experts, {parsed.layers} layers of {parsed.hidden_size}", parsed)
    for part in parsed.parts:
        PARTS[part](parsed, report)
    report.save()


if __name__ == "__main__":
    main()
