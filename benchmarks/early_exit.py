"""Early exit: what share of questions leaves a classifier of 16 layers in its first five, what time that saves.

Run as `python -m benchmarks.early_exit`. One bidirectional decoder learns the demo's questions as classes, with a head
after each of `EXITS`. Thresholds are found on half of the held-out questions and measured on the other half. Easy
questions read the written digit; hard ones need picture and sound.

- `chorus` is the classifier with thresholds, `full` the same with none, in turns, one question or 32 at a time. The
  encoders have run before: times are those of decoder and heads. `time_saving_ratio` is 1 - chorus / full, and
  `compute_saving_ratio` the same of the floating-point operations;
- `strict` is one threshold for all exits, set on the first half so that 99% of its hard questions go deep;
  `went_deep` is the share that runs through more than five layers.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.digit_lessons import Batch, Lesson, LessonSettings, lesson_options, media, with_text
from benchmarks.timing import OURS, Report, figures, measure, parse
from chorus_moe.modeling.modeling_classification import ChorusForSequenceClassification
from chorus_moe.training.collator import MEDIA, clean_messages
from chorus_moe.training.demo_data import BASE_SKILLS, SKILLS, Sample
from chorus_moe.training.exit_calibration import ExitAnswers, calibrate_exits

LAYERS, FIRST = 16, 5
EXITS = [1, 2, 3, 4, 5, 7, 9, 12]
EASY, HARD = ("written",), ("sum", "larger", "same")
KINDS = {"easy": EASY, "hard": HARD, "all": BASE_SKILLS}
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
CLASSES = sorted({SKILLS[name].answer(w, s) for name in BASE_SKILLS for w in range(10) for s in range(10)})


class QuestionCollator:
    """Questions without their answers, which are the labels."""

    def __init__(self, processor: Any):
        self.processor = processor

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        found = {column: [list(sample[column]) for sample in samples] for column in MEDIA.values()}
        messages = [clean_messages(sample["messages"][:1]) for sample in samples]
        options: dict[str, Any] = {"processor_kwargs": {"padding": True, "padding_side": "right"}}
        options |= {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
        batch = self.processor.apply_chat_template(messages, **options, **found)
        return {**batch, "labels": torch.tensor([CLASSES.index(sample["answer"]) for sample in samples])}


class ClassLesson(Lesson):
    """The demo's questions as a lesson for a classifier."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.collator: Any = QuestionCollator(self.processor)

    def classifier(self) -> ChorusForSequenceClassification:
        """A fresh classifier with exits; the encoders' tokens come with the batches."""
        torch.manual_seed(self.seed)
        config = with_text(self.teacher.config, **DECODER)
        config.num_labels = len(CLASSES)
        return ChorusForSequenceClassification(config)

    def batches(self, samples: Sequence[Sample], size: int) -> list[Batch]:
        return [self.encode(samples[start : start + size]) for start in range(0, len(samples), size)]


@torch.no_grad()
def outcome(model: Any, batches: list[Batch]) -> dict[str, float]:
    """Shares that left early, accuracy and operations, with and without thresholds."""
    thresholds = model.config.exit_thresholds
    results: dict[str, dict[str, Tensor]] = {}
    for name, chosen in ((OURS, thresholds), ("full", None)):
        model.config.exit_thresholds = chosen
        outputs = [model(**batch, output_compute=True) for batch in batches]
        right = [
            output.logits.argmax(dim=-1) == batch["labels"] for output, batch in zip(outputs, batches, strict=True)
        ]
        results[name] = {
            "layers": torch.cat([output.compute.layers for output in outputs]),
            "flops": torch.cat([output.compute.flops for output in outputs]),
            "right": torch.cat(right).double(),
        }
    model.config.exit_thresholds = thresholds
    ours, full = results[OURS], results["full"]
    early = (ours["layers"] <= FIRST).double().mean().item()
    return {
        f"left_in_first_{FIRST}": early,
        "went_deep": 1 - early,
        "mean_layers": ours["layers"].double().mean().item(),
        "accuracy": ours["right"].mean().item(),
        "full_accuracy": full["right"].mean().item(),
        "accuracy_drop": (full["right"].mean() - ours["right"].mean()).item(),
        "compute_saving_ratio": 1 - (ours["flops"].sum() / full["flops"].sum()).item(),
    }


def times(model: Any, batches: list[Batch], rounds: int) -> dict[str, float]:
    """Milliseconds for all batches, with and without thresholds, in turns."""
    thresholds = model.config.exit_thresholds
    inputs = [{name: value for name, value in batch.items() if name != "labels"} for batch in batches]

    @torch.no_grad()
    def run(chosen: list[float] | None) -> None:
        model.config.exit_thresholds = chosen
        for batch in inputs:
            model(**batch, use_cache=False)

    calls = {OURS: lambda: run(thresholds), "full": lambda: run(None)}
    result = figures(measure(calls, rounds, memory=False))
    model.config.exit_thresholds = thresholds
    return result | {"time_saving_ratio": 1 - 1 / result["full_ratio"]}


def strict_threshold(answers: ExitAnswers, hard: Tensor) -> float:
    """The confidence that one in a hundred hard questions is above at one of the first exits."""
    first = sum(layers <= FIRST for layers in answers.layers)
    return answers.confidence_NX[hard, :first].amax(dim=1).quantile(0.99, interpolation="higher").item()


def main(arguments: list[str] | None = None) -> None:
    parsed = parse("What early exit saves and costs.", arguments, *lesson_options(steps=300, seeds=1))
    settings = LessonSettings.read(parsed)
    report = Report(f"early exit, {LAYERS} layers, exits after {EXITS}, {settings}", parsed)
    with media(parsed) as found:
        for seed in parsed.seeds[:1]:
            lesson = ClassLesson(found, settings, seed)
            model: Any = lesson.classifier()
            report.add("training step", figures(lesson.learn({OURS: model})))
            model.eval()
            # Skills come in turn: pairs of turns alternate between the halves.
            half = [(row // len(BASE_SKILLS)) % 2 for row in range(len(lesson.test))]
            known = [sample for sample, side in zip(lesson.test, half, strict=True) if side == 0]
            unknown = [sample for sample, side in zip(lesson.test, half, strict=True) if side == 1] or known
            calibration = calibrate_exits(model, lesson.batches(known, 32))
            print(calibration, flush=True)
            groups = {kind: [s for s in unknown if s["skill"] in skills] for kind, skills in KINDS.items()}
            for kind, samples in groups.items():
                for size, count in ((32, 96), (1, 40)):
                    taken = samples if size > 1 else samples[:count]
                    values = outcome(model, lesson.batches(samples, 32))
                    values |= times(model, lesson.batches(taken[:count], size), parsed.rounds)
                    report.add(f"{kind} batch {size}", values)
                    print({name: round(value, 4) for name, value in values.items()}, flush=True)
            hard = torch.tensor([sample["skill"] in HARD for sample in known])
            answers = ExitAnswers.ask(model, lesson.batches(known, 32))
            model.config.exit_thresholds = [strict_threshold(answers, hard)] * len(EXITS)
            for kind, samples in groups.items():
                values = outcome(model, lesson.batches(samples, 32))
                report.add(f"{kind} strict", values, "accuracy")
                print({name: round(value, 4) for name, value in values.items()}, flush=True)
    report.save()


if __name__ == "__main__":
    main()
