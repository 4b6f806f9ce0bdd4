"""Layer skipping: quality, open share and speed against the budget.

Run as `python -m benchmarks.layer_skip [--plot PATH]`. Decoders learn to count in words in as many steps, one without
gates (`chorus`) and one a budget, the share of tokens that training lets pass each feed-forward by but the first. Rows:
nats for each letter of held-out texts; the share of letters of held-out answers that is right; the share of gates that
is open on held-out texts; milliseconds of a forward over a batch of texts; tokens per second of greedy answers at
batch 1.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
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
    """Quality and speed over the open share, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shares = [rows["open"][f"{name}_open"] for name in names]
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
        axis.set(xlabel="share of feed-forwards computed")
        axis.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> None:
    options = (
        ("--budgets", {"type": float, "nargs": "+", "default": [0.3, 0.5, 0.7]}),
        ("--steps", {"type": int, "default": 300}),
        ("--layers", {"type": int, "default": 6}),
        ("--hidden-size", {"type": int, "default": 128}),
        ("--new-tokens", {"type": int, "default": 48}),
        ("--plot", {"type": Path, "metavar": "PATH", "help": "also draw quality and speed over the open share"}),
    )
    parsed = parse("Layer skipping: quality against budget.", arguments, *options)
    if parsed.quick:
        parsed.budgets, parsed.steps, parsed.layers, parsed.hidden_size, parsed.new_tokens = [0.5], 2, 3, 32, 4
    report = Report(f"layer skipping, {parsed.layers} layers of {parsed.hidden_size}", parsed)
    sizes = (parsed.layers, parsed.hidden_size)
    models = {OURS: counting.decoder(*sizes)}
    models |= {f"skip_{round(100 * budget)}": counting.decoder(*sizes, skip_budget=budget) for budget in parsed.budgets}
    counting.learn(models, parsed.steps)
    ids = counting.held_out()
    found = {name: counting.quality(model, ids) for name, model in models.items()}
    rows = {
        "loss": {f"{name}_loss": loss for name, (loss, _) in found.items()},
        "right": {f"{name}_right": right for name, (_, right) in found.items()},
        "open": {f"{name}_open": share_open(model, ids) for name, model in models.items()},
    }
    rows["forward"], rows["decode"] = speed(models, parsed)
    units = {"forward": "ms", "decode": "tokens_per_second"}
    for row, values in rows.items():
        report.add(row, values, units.get(row, row))
    if parsed.plot is not None:
        plot(parsed.plot, rows, list(models))
    report.save()


if __name__ == "__main__":
    main()
