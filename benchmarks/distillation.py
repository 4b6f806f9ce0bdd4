"""A student of a third of the active parameters, with and without its teacher, on the demo's questions.

Run as `python -m benchmarks.distillation`. A teacher of three layers learns first, once. Then, for each seed, three
students of two layers and narrower experts learn from the same batches, in half as many steps and from the same
weights:

- `alone`: from the labels;
- `chorus`: from the labels and the teacher's probabilities of the answers' tokens (forward KL, temperature 2);
- `states`: also from the teacher's states, layer 1 of its layer 1 and layer 2 of its layer 3.

Encoders are the same, trained before and frozen. Tables by seed: milliseconds of a training step and of an answer,
accuracy by skill, loss on held-out answers; at the end the means over seeds. The teacher's forward is in the step of
`chorus`; `states` reads the same output.
"""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import Tensor, nn

from benchmarks.computation import TokenMix, active_in_decoder, decoder_mflops
from benchmarks.digit_lessons import Lesson, LessonSettings, lesson_options, media, score, unit_of, with_text
from benchmarks.timing import OURS, Report, figures, parse
from chorus_moe.modeling.configuration_chorus import ChorusConfig
from chorus_moe.modeling.modeling_generation import ChorusForConditionalGeneration
from chorus_moe.training.objectives.distillation import DistilledStates, DistilledTokens
from chorus_moe.training.objectives.objective import Objective
from chorus_moe.training.objectives.teachers import Teacher

TEMPERATURE = 2.0
TEACHER: dict[str, Any] = {
    # Nothing reads the image and audio positions of the last layer of a causal model: experts there would idle.
    "expert_banks": {"text": {}, "image": {"layers": [1]}, "audio": {"layers": [1]}, "common": {}}
}
STUDENT: dict[str, Any] = {
    "num_hidden_layers": 2,
    "layer_types": ["full_attention"] * 2,
    "mlp_layer_types": ["dense", "sparse"],
    "cross_modal_layers": [1],
    "expert_banks": {"text": {}, "common": {}},
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 32,
    "intermediate_size": 32,
}
LAYERS = {1: 1, 2: 3}


class TaughtStudent(nn.Module):
    """A student whose loss has the terms of its objectives, as `ChorusTrainer` adds them."""

    def __init__(self, student: ChorusForConditionalGeneration, objectives: Sequence[Objective]):
        super().__init__()
        self.student, self.objectives = student, nn.ModuleList(objectives)
        self.asked = {name: value for one in objectives for name, value in one.forward_options().items()}

    def forward(self, **batch: Any) -> dict[str, Tensor]:
        outputs = self.student(**batch, **self.asked)
        terms = [one.weight * one(self.student, batch, outputs) for one in self.objectives]
        return {"loss": outputs.loss + sum(terms)}


def sizes_of(configs: Mapping[str, ChorusConfig], mix: TokenMix) -> dict[str, float]:
    """Active parameters and computation on a token, and the student's share of the teacher's."""
    result: dict[str, float] = {}
    for name, config in configs.items():
        report, active = active_in_decoder(config)
        result |= {f"{name}_total": report.total, f"{name}_active": round(mix.mean(active))}
        result[f"{name}_mflops"] = decoder_mflops(config, mix)
    result["active_share"] = result[f"{OURS}_active"] / result["teacher_active"]
    return result


def teach(lesson: Lesson, config: ChorusConfig, folder: Path) -> ChorusForConditionalGeneration:
    """A trained teacher, saved with its processor."""
    teacher = lesson.decoder(config)
    lesson.learn({"teacher": teacher})
    teacher.save_pretrained(folder)
    lesson.processor.save_pretrained(folder)
    return teacher


def students(lesson: Lesson, config: ChorusConfig, folder: Path) -> dict[str, Any]:
    """The students, each with the module that is trained."""
    teacher = Teacher([str(folder)], temperature=TEMPERATURE, shares_encoders=True)
    width = config.text_config.hidden_size

    def taught(*more: Objective) -> TaughtStudent:
        student = lesson.decoder(config)
        objectives: list[Objective] = [DistilledTokens(teacher, temperature=TEMPERATURE), *more]
        for objective in objectives:
            objective.check(student, lesson.processor)
        return TaughtStudent(student, objectives)

    return {
        "alone": lesson.decoder(config),
        OURS: taught(),
        "states": taught(DistilledStates(teacher, LAYERS, (width, width))),
    }


def main(arguments: list[str] | None = None) -> None:
    options = lesson_options(steps=320, seeds=3, questions=60)
    parsed = parse("A student with and without its teacher.", arguments, *options)
    settings = LessonSettings.read(parsed)
    report = Report(f"distillation, {settings}", parsed)
    scores: list[dict[str, dict[str, float]]] = []
    with media(parsed) as found, tempfile.TemporaryDirectory() as folder:
        lesson = Lesson(found, settings, parsed.seeds[0])
        configs = {
            "teacher": with_text(lesson.teacher.config, **TEACHER),
            OURS: with_text(lesson.teacher.config, **STUDENT),
        }
        report.add("computation of a token", sizes_of(configs, TokenMix.of(lesson.held_out)), "mflops")
        teacher = teach(lesson, configs["teacher"], Path(folder))
        for row, values in score(lesson, {"teacher": teacher}).items():
            report.add(f"teacher {row}", values, unit_of(values))
        for seed in parsed.seeds[:1] if parsed.quick else parsed.seeds:
            # Not the teacher's questions.
            again = lesson.again(seed + 100, settings.steps // 2)
            learning = students(again, configs[OURS], Path(folder))
            report.add(f"seed {seed} training step", figures(again.learn(learning)))
            scores.append(score(again, {name: getattr(one, "student", one) for name, one in learning.items()}))
            for row, values in scores[-1].items():
                report.add(f"seed {seed} {row}", values, unit_of(values))
    for row, values in scores[0].items():
        means = {key: fmean(found[row][key] for found in scores) for key in values}
        report.add(f"mean {row}", means, unit_of(values))
    report.save()


if __name__ == "__main__":
    main()
