"""Fewer experts after training: pruned by use, by saliency and at random, and merged; before and after a recovery.

Run as `python -m benchmarks.prune_merge`. An expert model (`chorus`) learns the demo's questions. Copies of it lose a
quarter, half and three quarters of the experts of every bank. Tables by seed and share that is kept: parameters,
milliseconds of a forward of the decoder on a held-out batch, accuracy and loss on held-out questions right after, and
after a short training. The model with all experts gets the same training, so that what more steps bring is seen. Use
and saliency are measured on batches of the training questions.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import partial
from statistics import fmean
from typing import Any

import torch

from benchmarks.digit_lessons import Lesson, LessonSettings, lesson_options, media, with_text
from benchmarks.moe_vs_dense import EXPERTS
from benchmarks.timing import OURS, Report, figures, measure, parse
from chorus_moe.modeling.modeling_generation import ChorusForConditionalGeneration
from chorus_moe.surgery import merge_experts, prune_experts
from chorus_moe.training.routing.observer import RoutingObserver
from chorus_moe.training.routing.saliency import ExpertSaliency, SaliencyObserver, Scores

SIZES = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
SHARES = (0.75, 0.5, 0.25)
CALIBRATION_BATCHES = 8
RECOVERY_LR = 5e-4
Model = ChorusForConditionalGeneration


@torch.no_grad()
def calibrate(lesson: Lesson, model: Model, batches: int) -> ExpertSaliency:
    size = lesson.settings.batch_size
    model.eval()
    with RoutingObserver(model) as routing, SaliencyObserver(model) as saliency:
        for start in range(0, batches * size, size):
            model(**lesson.encode([lesson.questions[row] for row in range(start, start + size)]))
    return ExpertSaliency.read(routing.counters, saliency.norms)


def with_fewer(model: Model, found: ExpertSaliency, share: float, seed: int) -> dict[str, Model]:
    """Copies of the model with a share of the experts of every bank."""
    banks = list(model.config.text_config.expert_banks)
    generator = torch.Generator().manual_seed(seed)
    chance: Scores = {
        layer: {name: torch.rand(len(use_E), generator=generator) for name, use_E in of_layer.items()}
        for layer, of_layer in found.uses.items()
    }

    def prune(copy: Model, scores: Scores) -> None:
        prune_experts(copy, dict.fromkeys(banks, share), scores)

    def merge(copy: Model) -> None:
        for bank in banks:
            merge_experts(copy, bank, round(share * SIZES["num_experts"]), found.uses)

    ways: dict[str, Callable[[Model], None]] = {
        "use": lambda copy: prune(copy, found.uses),
        "saliency": lambda copy: prune(copy, found.saliency),
        "random": lambda copy: prune(copy, chance),
        "merge": merge,
    }
    copies = {name: deepcopy(model) for name in ways}
    for name, change in ways.items():
        change(copies[name])
    return copies


def quality(lesson: Lesson, models: dict[str, Model]) -> dict[str, dict[str, float]]:
    return {
        "accuracy": {f"{name}_accuracy": lesson.accuracies(model)[0]["all"] for name, model in models.items()},
        "loss": {f"{name}_loss": lesson.held_out_loss(model) for name, model in models.items()},
    }


def recover(lesson: Lesson, models: dict[str, Model], steps: int) -> None:
    settings = lesson.settings
    lesson.settings = replace(settings, steps=steps, lr=RECOVERY_LR)
    lesson.learn(models)
    lesson.settings = settings


def run_seed(lesson: Lesson, parsed: Any, report: Report, is_first: bool) -> dict[str, dict[str, float]]:
    """All rows of one seed; sizes and times are reported for the first."""
    full = lesson.decoder(with_text(lesson.teacher.config, **EXPERTS, **SIZES))
    lesson.learn({OURS: full})
    found = calibrate(lesson, full, 1 if parsed.quick else CALIBRATION_BATCHES)
    rows = {}
    more = deepcopy(full)
    recover(lesson, {OURS: more}, parsed.recovery)
    before, after = quality(lesson, {OURS: full}), quality(lesson, {OURS: more})
    for share in SHARES[1:2] if parsed.quick else SHARES:
        copies = with_fewer(full, found, share, lesson.seed)
        if is_first:
            models = {OURS: full.eval()} | {name: copy.eval() for name, copy in copies.items()}
            counts = {f"{name}_parameters": sum(p.numel() for p in m.parameters()) for name, m in models.items()}
            report.add(f"keep {share} parameters", counts, "parameters")
            with torch.inference_mode():
                calls = {name: partial(model, **lesson.held_out[0]) for name, model in models.items()}
                report.add(f"keep {share} forward", figures(measure(calls, parsed.rounds, memory=False)))
        for name, values in quality(lesson, copies).items():
            rows[f"keep {share} right after, {name}"] = before[name] | values
        recover(lesson, copies, parsed.recovery)
        for name, values in quality(lesson, copies).items():
            rows[f"keep {share} recovered, {name}"] = after[name] | values
    return rows


def main(arguments: list[str] | None = None) -> None:
    options = lesson_options(steps=250, seeds=1)
    recovery = ("--recovery", {"type": int, "default": 40, "help": "steps of the recovery (default 40)"})
    parsed = parse("Experts pruned and merged.", arguments, *options, recovery)
    parsed.recovery = 2 if parsed.quick else parsed.recovery
    settings = LessonSettings.read(parsed)
    report = Report(f"fewer experts, {settings}, {parsed.recovery} steps of recovery", parsed)
    scores: list[dict[str, dict[str, float]]] = []
    with media(parsed) as found:
        for seed in parsed.seeds[:1] if parsed.quick else parsed.seeds:
            rows = run_seed(Lesson(found, settings, seed), parsed, report, not scores)
            for row, values in rows.items():
                report.add(f"seed {seed} {row}", values, row.rpartition(" ")[2])
            scores.append(rows)
    for row, values in scores[0].items():
        means = {key: fmean(rows[row][key] for rows in scores) for key in values}
        report.add(f"mean {row}", means, row.rpartition(" ")[2])
    report.save()


if __name__ == "__main__":
    main()
