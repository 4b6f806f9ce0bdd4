"""Layer skipping: quality, open share and speed against the budget.

Run as `python -m benchmarks.layer_skip [--plot PATH]`. Decoders learn to count in words in as many steps: one without
gates (`chorus`), and for each budget, the share of tokens that skip, one whose tokens skip feed-forwards (`skip_30`)
and one whose tokens skip whole layers (`layer_30`), all but the first. Rows, means over the seeds: nats for each letter
of held-out texts; the share of letters of held-out answers that is right; the share of gates that is open on held-out
texts; operations in the layers, over those of the model without gates; of the first seed, milliseconds of a forward
over a batch of texts and tokens per second of greedy answers at batch 1.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from benchmarks import counting
from benchmarks.timing import OURS, Report, figures, measure, parse
from chorus_moe.modeling.depth_skip import open_share
from chorus_moe.modeling.modeling_generation import ChorusForConditionalGeneration

Models = Mapping[str, ChorusForConditionalGeneration]
ROWS = 8


@torch.no_grad()
def share_open(model: ChorusForConditionalGeneration, ids: Tensor) -> float:
    """Share of the gates that are open on the held-out texts; 1 without gates."""
    if not model.config.text_config.skip_layers:
        return 1.0
    return open_share(model.model(input_ids=ids, output_skip_logits=True).skip_logits, None).item()


@torch.no_grad()
def operations(model: ChorusForConditionalGeneration, ids: Tensor) -> float:
    """Floating-point operations in the layers on the held-out texts."""
    return float(model(input_ids=ids, output_compute=True).compute.flops.sum())


def speed(models: Models, parsed: argparse.Namespace) -> tuple[dict[str, float], dict[str, float]]:
    """A forward over a batch, and greedy answers."""
    ids = counting.held_out()[:ROWS]
    question = torch.tensor([counting.encode(counting.question(*counting.pairs(held_out=True)[0]))])

    @torch.no_grad()
    def forward(model: ChorusForConditionalGeneration) -> Any:
        return model(input_ids=ids, logits_to_keep=1)

    def answer(model: ChorusForConditionalGeneration) -> Any:
        mask = torch.ones_like(question)
        return model.generate(
            input_ids=question, attention_mask=mask, do_sample=False, max_new_tokens=parsed.new_tokens
        )

    forwards = {name: lambda m=model: forward(m) for name, model in models.items()}
    answers = {name: lambda m=model: answer(m) for name, model in models.items()}
    timings = measure(answers, parsed.rounds, memory=False)
    decoding = {f"{name}_tokens_per_second": parsed.new_tokens / timing.seconds for name, timing in timings.items()}
    ratios = {key: value for key, value in figures(timings).items() if key.endswith("_ratio")}
    return figures(measure(forwards, parsed.rounds, memory=False)), decoding | ratios


def plot(path: Path, rows: Mapping[str, Mapping[str, float]], names: list[str]) -> None:
    """Quality and speed over the operations, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shares = [rows["flops"][f"{name}_flops"] for name in names]
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    right = [rows["right"][f"{name}_right"] for name in names]
    axes[0].plot(shares, right, "o")
    axes[0].set(title="letters of held-out answers that are right", ylim=(min(right) - 0.05, 1))
    for kind in ("forward", "decode"):
        # Formed within each round: how long it takes, over the model without gates.
        times = [rows[kind].get(f"{name}_ratio", 1.0) for name in names]
        axes[1].plot(shares, times, "o-", label=kind)
    axes[1].set(title="time, over the model without gates", ylim=(0, 1.2))
    axes[1].legend()
    for axis in axes:
        axis.set(xlabel="operations, over the model without gates")
        axis.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def trained(parsed: argparse.Namespace, seed: int) -> dict[str, ChorusForConditionalGeneration]:
    """One model without gates, and two for each budget."""
    options: dict[str, dict[str, Any]] = {OURS: {}}
    for budget in parsed.budgets:
        options[f"skip_{round(100 * budget)}"] = {"skip_budget": budget}
        options[f"layer_{round(100 * budget)}"] = {"skip_budget": budget, "skip_scope": "layer"}
    models = {name: counting.decoder(parsed.layers, parsed.hidden_size, seed, **o) for name, o in options.items()}
    counting.learn(models, parsed.steps, seed=seed + 1)
    return models


def main(arguments: list[str] | None = None) -> None:
    options = (
        ("--budgets", {"type": float, "nargs": "+", "default": [0.3, 0.5, 0.7]}),
        ("--steps", {"type": int, "default": 300}),
        ("--seeds", {"type": int, "nargs": "+", "default": [0, 1, 2]}),
        ("--layers", {"type": int, "default": 6}),
        ("--hidden-size", {"type": int, "default": 128}),
        ("--new-tokens", {"type": int, "default": 48}),
        ("--plot", {"type": Path, "metavar": "PATH", "help": "also draw quality and speed over the operations"}),
    )
    parsed = parse("Layer skipping: quality against budget.", arguments, *options)
    if parsed.quick:
        parsed.seeds = [0]
        parsed.budgets, parsed.steps, parsed.layers, parsed.hidden_size, parsed.new_tokens = [0.5], 2, 3, 32, 4
    report = Report(f"layer skipping, {parsed.layers} layers of {parsed.hidden_size}", parsed)
    ids = counting.held_out()
    found: dict[str, dict[str, list[float]]] = {name: {} for name in ("loss", "right", "open", "flops")}
    shown: Models = {}
    for seed in parsed.seeds:
        models = trained(parsed, seed)
        shown = shown or models
        whole = operations(models[OURS], ids)
        for name, model in models.items():
            loss, right = counting.quality(model, ids)
            values = {"loss": loss, "right": right, "open": share_open(model, ids)}
            values["flops"] = operations(model, ids) / whole
            report.add(f"{name}, seed {seed}", values | {f"{name}_right": right}, "right")
            for row, value in values.items():
                found[row].setdefault(f"{name}_{row}", []).append(value)
    rows = {row: {name: fmean(values) for name, values in arms.items()} for row, arms in found.items()}
    rows["forward"], rows["decode"] = speed(shown, parsed)
    units = {"forward": "ms", "decode": "tokens_per_second"}
    for row, values in rows.items():
        report.add(row, values, units.get(row, row))
    if parsed.plot is not None:
        plot(parsed.plot, rows, list(shown))
    report.save()


if __name__ == "__main__":
    main()
