"""Deep experts: one wide feed-forward against two or three narrow ones, at equal parameters.

Run as `python -m benchmarks.deep_experts`. Decoders learn to count in words in as many steps: `chorus` with experts of
one feed-forward, `depth_2` and `depth_3` with experts of two and three, each so much narrower that total and active
parameters are the same. Rows, by seed and in the mean: active parameters of a text token; nats for each letter of
held-out texts; the share of letters of held-out answers that is right; milliseconds of a forward over a batch of texts.
`spread` is the standard deviation of the loss over the seeds.
"""

import argparse
from statistics import fmean, pstdev
from typing import Any

import torch

from benchmarks import counting
from benchmarks.timing import OURS, Report, figures, measure, parse
from chorus_moe.modeling.modeling_generation import ChorusForConditionalGeneration
from chorus_moe.surgery import parameter_report

DEPTHS = {OURS: 1, "depth_2": 2, "depth_3": 3}
EXPERTS, TOP_K, ROWS = 8, 2, 8
UNITS = ("active", "loss", "right")


def decoders(parsed: argparse.Namespace, seed: int) -> dict[str, ChorusForConditionalGeneration]:
    """A decoder for each depth; only the first layer is dense."""
    models = {}
    for name, depth in DEPTHS.items():
        bank = {
            "num_experts": EXPERTS,
            "num_experts_per_tok": TOP_K,
            "intermediate_size": parsed.width // depth,
            "expert_depth": depth,
        }
        models[name] = counting.decoder(
            parsed.layers,
            parsed.hidden_size,
            seed,
            modalities=["text"],
            mlp_layer_types=["dense"] + ["sparse"] * (parsed.layers - 1),
            expert_banks={"common": bank},
            shared_expert_intermediate_size=0,
        )
    return models


@torch.no_grad()
def forward(model: ChorusForConditionalGeneration, ids: torch.Tensor) -> Any:
    return model(input_ids=ids, use_cache=False).logits


def main(arguments: list[str] | None = None) -> None:
    options = (
        ("--steps", {"type": int, "default": 300, "help": "training steps (default 300)"}),
        ("--seeds", {"type": int, "nargs": "+", "default": [0, 1, 2]}),
        ("--layers", {"type": int, "default": 4}),
        ("--hidden-size", {"type": int, "default": 64}),
        ("--width", {"type": int, "default": 96, "help": "of an expert of one feed-forward, a multiple of 6"}),
    )
    parsed = parse("Deep experts at equal parameters.", arguments, *options)
    if parsed.quick:
        parsed.steps, parsed.seeds, parsed.layers, parsed.hidden_size, parsed.width = 2, [0], 2, 32, 12
    if parsed.width % 6:
        raise SystemExit(f"--width {parsed.width} is no multiple of 6, so the experts would differ in parameters")
    report = Report(f"deep experts, {parsed.layers} layers of {parsed.hidden_size}", parsed)
    found: dict[str, dict[str, list[float]]] = {unit: {} for unit in UNITS}
    ids, models = counting.held_out(), {}
    for seed in parsed.seeds:
        models = decoders(parsed, seed)
        counting.learn(models, parsed.steps, seed=seed)
        for name, model in models.items():
            values = (parameter_report(model).active["text"], *counting.quality(model, ids))
            for unit, value in zip(UNITS, values, strict=True):
                found[unit].setdefault(f"{name}_{unit}", []).append(value)
        for unit in UNITS:
            report.add(f"{unit}, seed {seed}", {key: values[-1] for key, values in found[unit].items()}, unit)
    for unit in UNITS:
        report.add(f"{unit}, mean", {key: fmean(values) for key, values in found[unit].items()}, unit)
    spread = {key.replace("_loss", "_spread"): pstdev(values) for key, values in found["loss"].items()}
    report.add("loss, spread", spread, "spread")
    calls = {name: lambda m=model: forward(m, ids[:ROWS]) for name, model in models.items()}
    report.add("forward", figures(measure(calls, parsed.rounds, memory=False)))
    report.save()


if __name__ == "__main__":
    main()
