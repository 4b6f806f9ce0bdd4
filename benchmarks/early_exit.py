"""Early exit: what share of questions leaves a classifier of 16 layers in its first five, what time that saves.

Run as `python -m benchmarks.early_exit [--plot PATH]`. A classifier with heads after some of its layers, all trained
together, learns one of two tasks (`--tasks`):

- `far` (12 layers): texts with a near and a far fact. Easy questions ask for the near one. Hard ones ask for the far
  one, which no window of the first five layers reaches, see `far_facts.py`;
- `digits` (16 layers, bidirectional): questions about digits. Easy ones name the written or the spoken digit, hard ones
  need both. Thresholds are found on half of the held-out pictures and voices; everything is measured on questions
  about the other half, which are drawn alike but share no picture and no voice with the first.

Rows of both:

- `promised` are the thresholds of [`calibrate_exits`]: at most half a point of accuracy lost on other rows, with a
  margin; `no margin` are those that lose as much on the rows they were found on;
- `deep` is the threshold of [`calibrate_depth`] on hard rows alone: 98% of them are to run through more than five
  layers. This is what a threshold that asks for depth means here;
- `chorus` is the classifier with promised thresholds, `full` the same with none, in turns, one question or 32 at a
  time. The encoders have run before: times are those of decoder and heads. `time_saving_ratio` is 1 - chorus / full,
  and `compute_saving_ratio` the same of the floating-point operations;
- `mean` rows are means over the seeds, with the standard deviation over them as `_spread`;
- `curve` rows, of the first seed of `digits`, have one threshold for all exits, over the strictness.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import torch
from torch import Tensor

from benchmarks.digit_lessons import Batch, Lesson, LessonSettings, Media, lesson_options, media, with_text
from benchmarks.far_facts import SHALLOW, FarLesson
from benchmarks.timing import OURS, Report, figures, measure, parse
from chorus_moe.modeling.modeling_heads import ChorusForSequenceClassification
from chorus_moe.processors.processing_media import MEDIA
from chorus_moe.training.collator import clean_messages
from chorus_moe.training.demo.augment import PictureAugment
from chorus_moe.training.demo.data import SKILLS, DigitPictures, DigitQuestions, Sample
from chorus_moe.training.exit_calibration import THRESHOLDS, ExitAnswers, find_depth_thresholds, find_thresholds

LAYERS, FAR_LAYERS, FIRST = 16, 12, SHALLOW
EXITS = [1, 2, 3, 4, 5, 7, 9, 12]
# Weights in training. A sum has nineteen answers.
LESSON = {"written": 1.0, "spoken": 1.0, "sum": 2.0}
KINDS = {"easy": ("written", "spoken", "near"), "hard": ("sum", "far"), "all": (*LESSON, "near", "far")}
DECODER: dict[str, Any] = {
    "num_hidden_layers": LAYERS,
    "layer_types": ["full_attention"] * LAYERS,
    "mlp_layer_types": ["sparse" if i % 4 == 3 else "dense" for i in range(LAYERS)],
    "cross_modal_layers": [1, 3],
    "expert_banks": {"text": {}, "image": {}, "audio": {}, "common": {}},
    "is_causal": False,
    "initializer_range": 0.05,
    "exit_layers": EXITS,
    "exit_loss_coef": 1.0,
}
CLASSES = sorted({SKILLS[name].answer(w, s) for name in LESSON for w in range(10) for s in range(10)})
# Rows that are timed at each batch size; all held-out rows count for shares and accuracy.
TIMED = {1: 40, 32: 96}


class QuestionCollator:
    """Questions without their answers, which are the labels."""

    def __init__(self, processor: Any):
        self.processor = processor

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        found = {row.column: [list(sample[row.column]) for sample in samples] for row in MEDIA.values()}
        messages = [clean_messages(sample["messages"][:1]) for sample in samples]
        options: dict[str, Any] = {"processor_kwargs": {"padding": True, "padding_side": "right"}}
        options |= {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
        batch = self.processor.apply_chat_template(messages, **options, **found)
        return {**batch, "labels": torch.tensor([CLASSES.index(sample["answer"]) for sample in samples])}


class ClassLesson(Lesson):
    """Questions as a lesson for a classifier; `calibration` and `fresh` share no picture and no voice."""

    def __init__(self, found: Media, settings: LessonSettings, seed: int):
        super().__init__(found, settings, seed)
        self.collator: Any = QuestionCollator(self.processor)
        steps = settings.steps * settings.batch_size
        augment = PictureAugment()
        self.questions = DigitQuestions(found.pictures, found.clips, LESSON, steps, seed=seed, picture_augment=augment)
        self.calibration, self.fresh = (self._held_out(found, side) for side in (0, 1))

    def _held_out(self, found: Media, side: int) -> list[Sample]:
        """Questions about every second held-out picture and voice."""
        shown = found.test_pictures
        pictures = DigitPictures(shown.images[side::2], shown.digits[side::2])
        voices = sorted(set(found.test_clips.speakers))
        clips = found.test_clips.by_speaker(*(voices[side::2] or voices))
        count = self.settings.questions_per_skill * len(LESSON)
        questions = DigitQuestions(pictures, clips, list(LESSON), count, seed=self.seed + 7 + side)
        return [questions[row] for row in range(count)]

    def classifier(self) -> ChorusForSequenceClassification:
        """A fresh classifier with exits; the encoders' tokens come with the batches."""
        torch.manual_seed(self.seed)
        config = with_text(self.teacher.config, **DECODER)
        config.num_labels = len(CLASSES)
        return ChorusForSequenceClassification(config)

    def batches(self, samples: Sequence[Sample], size: int) -> list[Batch]:
        return [self.encode(samples[start : start + size]) for start in range(0, len(samples), size)]


def trained(found: Media, settings: LessonSettings, seed: int, folder: Path | None) -> tuple[Any, Any, Any]:
    """The lesson, its classifier and how long a step took (None where weights were there before)."""
    path = None if folder is None else folder / f"early_exit-{seed}.pt"
    known = path is not None and path.exists()
    lesson = ClassLesson(found, replace(settings, encoder_steps=0) if known else settings, seed)
    model = lesson.classifier()
    if known:
        weights = torch.load(path, weights_only=True)
        lesson.teacher.load_state_dict(weights["encoders"])
        model.load_state_dict(weights["classifier"])
        print(f"weights read from {path}")
        return lesson, model.eval(), None
    timings = lesson.learn({OURS: model})  # type: ignore[dict-item]
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"encoders": lesson.teacher.state_dict(), "classifier": model.state_dict()}, path)
    return lesson, model.eval(), figures(timings)


def outcome(answers: ExitAnswers, thresholds: list[float]) -> dict[str, float]:
    """What thresholds do to rows."""
    lost, won = answers.lost_and_won(thresholds)
    rows = len(answers.is_right_NX)
    drop = (lost - won) / rows
    depth = torch.tensor(answers.layers)[answers.exits_taken(thresholds)]
    early = (depth <= FIRST).double().mean().item()
    return {
        f"left_in_first_{FIRST}": early,
        "went_deep": 1 - early,
        "mean_layers": depth.double().mean().item(),
        "accuracy": answers.accuracy(thresholds),
        "full_accuracy": answers.is_right_NX[:, -1].double().mean().item(),
        "accuracy_drop": drop,
        "accuracy_drop_error": ((lost + won) / rows - drop**2) ** 0.5 / rows**0.5,
        "rows": rows,
    }


def times(
    model: Any, batches: list[Batch], variants: Mapping[str, list[float] | None], rounds: int
) -> dict[str, float]:
    """Milliseconds and operations for all batches, by variant, in turns."""
    inputs = [{name: value for name, value in batch.items() if name != "labels"} for batch in batches]

    @torch.no_grad()
    def run(thresholds: list[float] | None, **options: Any) -> list[Any]:
        model.config.exit_thresholds = thresholds
        return [model(**batch, use_cache=False, **options) for batch in inputs]

    calls = {name: lambda t=thresholds: run(t) for name, thresholds in variants.items()}
    result = figures(measure(calls, rounds, memory=False), ours="full")
    flops = {
        name: sum(output.compute.flops.sum().item() for output in run(thresholds, output_compute=True))
        for name, thresholds in variants.items()
    }
    for name in calls.keys() - {"full"}:
        prefix = "" if name == OURS else f"{name}_"
        result[f"{prefix}time_saving_ratio"] = 1 - result.pop(f"{name}_ratio")
        result[f"{prefix}compute_saving_ratio"] = 1 - flops[name] / flops["full"]
    return result


def of_kind(samples: Sequence[Sample], kind: str) -> list[int]:
    """Rows of the samples that are of this kind."""
    return [row for row, sample in enumerate(samples) if sample["skill"] in KINDS[kind]]


def curve(lesson: Any, model: Any, answers: ExitAnswers, rounds: int, points: int) -> dict[str, dict[str, float]]:
    """Accuracy, shares and time saved by one threshold for all exits, falling."""
    loose = THRESHOLDS[len(THRESHOLDS) // 2 :]  # above, nobody leaves
    step = max(1, (len(loose) - 1) // points)
    chosen = {f"{value:.6f}": [value] * len(EXITS) for value in loose[::step]}
    timed = times(model, lesson.batches(lesson.fresh[:64], 32), {"full": None, **chosen}, rounds)
    kinds = {kind: answers.at(torch.tensor(of_kind(lesson.fresh, kind))) for kind in KINDS}
    rows: dict[str, dict[str, float]] = {}
    for name, thresholds in chosen.items():
        rows[name] = {"threshold": thresholds[0], **outcome(kinds["all"], thresholds)}
        for kind in ("easy", "hard"):
            rows[name][f"{kind}_left_in_first_{FIRST}"] = outcome(kinds[kind], thresholds)[f"left_in_first_{FIRST}"]
        for what in ("time", "compute"):
            rows[name][f"{what}_saving_ratio"] = timed[f"{name}_{what}_saving_ratio"]
    return rows


def plot(path: Path, rows: Mapping[str, Mapping[str, float]], promised: float) -> None:
    """Accuracy, time saved and shares that left over the threshold, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    doubts = [max(1 - row["threshold"], 1e-6) for row in rows.values()]
    left.plot(doubts, [row["accuracy"] for row in rows.values()], "o-", label="with exits")
    left.axhline(next(iter(rows.values()))["full_accuracy"], color="grey", linestyle="--", label="all 16 layers")
    left.set_title("accuracy on fresh questions")
    lines = {
        "time saved": "time_saving_ratio",
        f"easy left in first {FIRST}": f"easy_left_in_first_{FIRST}",
        f"hard left in first {FIRST}": f"hard_left_in_first_{FIRST}",
    }
    for label, key in lines.items():
        right.plot(doubts, [row[key] for row in rows.values()], "o-", label=label)
    right.set_title("share")
    for axis in (left, right):
        axis.axvline(1 - promised, color="tab:red", linewidth=1, label="promised: at most half a point lost")
        axis.set(xscale="log", xlabel="1 - threshold (strict to loose)")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


class Seeds:
    """Figures of all seeds of a task, printed as they come, and their means."""

    def __init__(self, task: str, report: Report):
        self.task, self.report = task, report
        self.rows: dict[str, list[dict[str, float]]] = {}

    def add(self, case: str, values: dict[str, float], seed: int) -> None:
        self.rows.setdefault(case, []).append(values)
        self.report.add_named(f"{self.task}, {case}, seed {seed}", values)

    def means(self) -> None:
        for case, rows in self.rows.items():
            values = {name: fmean(row[name] for row in rows) for name in rows[0]}
            values |= {f"{name}_spread": pstdev(row[name] for row in rows) for name in rows[0]}
            self.report.add_named(f"{self.task}, {case}, mean", values)


def study(
    lesson: Any, model: Any, seed: int, seeds: Seeds, parsed: argparse.Namespace
) -> tuple[ExitAnswers, list[float]]:
    """All rows of one seed; the answers to fresh questions, and the promised thresholds."""
    drop, error_rate = (1.0, None) if parsed.quick else (parsed.max_drop, 0.05)
    known = ExitAnswers.ask(model, lesson.batches(lesson.calibration, 32))
    promised = find_thresholds(known, drop, error_rate)
    margin_free = find_thresholds(known, drop, error_rate=None)
    hard = known.at(torch.tensor(of_kind(lesson.calibration, "hard")))
    deep = find_depth_thresholds(hard, FIRST, 0.98, error_rate)
    seeds.add("calibration, promised", {"threshold": promised[0], **outcome(known, promised)}, seed)
    answers = ExitAnswers.ask(model, lesson.batches(lesson.fresh, 32))
    for kind in KINDS:
        rows = of_kind(lesson.fresh, kind)
        taken = answers.at(torch.tensor(rows))
        for size, count in TIMED.items():
            batches = lesson.batches([lesson.fresh[row] for row in rows[:count]], size)
            timed = times(model, batches, {OURS: promised, "full": None}, parsed.rounds)
            values = {"threshold": promised[0], **outcome(taken, promised), **timed}
            seeds.add(f"{kind}, batch {size}", values, seed)
        for name, thresholds in {"no margin": margin_free, "deep": deep}.items():
            seeds.add(f"{kind}, {name}", {"threshold": thresholds[0], **outcome(taken, thresholds)}, seed)
    return answers, promised


def study_far(parsed: argparse.Namespace, report: Report) -> None:
    seeds = Seeds("far", report)
    for seed in parsed.seeds:
        lesson = FarLesson(parsed, FAR_LAYERS, [layers for layers in EXITS if layers < FAR_LAYERS], seed)
        model = lesson.classifier()
        lesson.learn(model)
        study(lesson, model.eval(), seed, seeds, parsed)
    seeds.means()


def study_digits(parsed: argparse.Namespace, report: Report) -> None:
    settings, seeds = LessonSettings.read(parsed), Seeds("digits", report)
    with media(parsed) as found:
        for seed in parsed.seeds:
            lesson, model, step = trained(found, settings, seed, parsed.weights)
            if step is not None:
                report.add(f"training step, seed {seed}", step)
            answers, promised = study(lesson, model, seed, seeds, parsed)
            report.save()
            if seed == parsed.seeds[0]:
                drawn = curve(lesson, model, answers, min(parsed.rounds, 3), 3 if parsed.quick else 12)
                for name, values in drawn.items():
                    report.add_named(f"curve {name}", values)
                if parsed.plot is not None:
                    plot(parsed.plot, drawn, promised[0])
    seeds.means()


TASKS = {"far": study_far, "digits": study_digits}


def main(arguments: list[str] | None = None) -> None:
    options = [
        *lesson_options(steps=380, seeds=3, questions=1000),
        ("--tasks", {"nargs": "+", "choices": list(TASKS), "default": list(TASKS)}),
        ("--far-steps", {"type": int, "default": 200, "help": "training steps of the task far (default 200)"}),
        ("--max-drop", {"type": float, "default": 0.005, "help": "accuracy that may be lost (default 0.005)"}),
        ("--weights", {"type": Path, "metavar": "FOLDER", "help": "keep trained weights of digits here, or read them"}),
        ("--plot", {"type": Path, "metavar": "PATH", "help": "also draw the curve of the first seed of digits"}),
    ]
    parsed = parse("What early exit saves and costs.", arguments, *options)
    if parsed.quick:
        parsed.seeds = parsed.seeds[:1]
    report = Report(f"early exit, tasks {', '.join(parsed.tasks)}, exits after {EXITS}", parsed)
    for task in parsed.tasks:
        TASKS[task](parsed, report)
    report.save()


if __name__ == "__main__":
    main()
