"""An expert model against dense ones on the demo's questions: accuracy, computation, time.

Run as `python -m benchmarks.moe_vs_dense`. Three decoders of three layers learn the same questions in as many steps:

- `chorus`: banks for text, images, sound and all of them, two of eight experts each;
- `dense`: as many parameters in *total*, all of them at work on every token;
- `equal_active`: experts again, wider, so that as many parameters are *active* on a token as in `dense`.

Encoders are the same, trained before and frozen. Tables by seed: milliseconds of a training step and of an answer,
accuracy by skill, loss on held-out answers; at the end the means over seeds. `mflops` is the computation of the decoder
on a token of the questions, forward, in the mean. The answer's time includes the encoders and the processor.
"""

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from benchmarks.computation import TokenMix, active_in_decoder, decoder_mflops
from benchmarks.digit_lessons import Lesson, LessonSettings, lesson_options, media, score, unit_of, with_text
from benchmarks.timing import OURS, Report, figures, parse
from chorus_moe.modeling.configuration_chorus import ChorusConfig
from chorus_moe.surgery import parameter_report

EXPERTS: dict[str, Any] = {
    # Nothing reads the image and audio positions of the last layer of a causal model: experts there would idle.
    "expert_banks": {"text": {}, "image": {"layers": [1]}, "audio": {"layers": [1]}, "common": {}},
}
SIZES = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
DENSE: dict[str, Any] = {"mlp_layer_types": ["dense"] * 3, "expert_banks": {"common": {}}}


def width_for(wanted: float, size: Callable[[int], float]) -> int:
    """The width at which `size`, linear in it, comes closest to what is wanted."""
    at_8, at_16 = size(8), size(16)
    return round(8 + (wanted - at_8) * 8 / (at_16 - at_8))


def decoders(base: ChorusConfig, mix: TokenMix, sizes: Sequence[int]) -> dict[str, ChorusConfig]:
    """The three configurations; the first has the given `SIZES`, which set those of the others."""
    experts = EXPERTS | dict(zip(SIZES, sizes, strict=True))

    def dense(width: int) -> ChorusConfig:
        return with_text(base, **DENSE, intermediate_size=width)

    def sparse(width: int) -> ChorusConfig:
        return with_text(base, **experts | {"moe_intermediate_size": width})

    def active(config: ChorusConfig) -> float:
        return mix.mean(active_in_decoder(config)[1])

    ours = with_text(base, **experts)
    same_total = dense(width_for(parameter_report(ours).total, lambda width: parameter_report(dense(width)).total))
    same_active = sparse(width_for(active(same_total), lambda width: active(sparse(width))))
    return {OURS: ours, "dense": same_total, "equal_active": same_active}


def sizes_of(configs: Mapping[str, ChorusConfig], mix: TokenMix) -> dict[str, float]:
    """Total and active parameters, and computation on a token."""
    result: dict[str, float] = {}
    for name, config in configs.items():
        report, active = active_in_decoder(config)
        result |= {f"{name}_total": report.total, f"{name}_active": round(mix.mean(active))}
        result[f"{name}_mflops"] = decoder_mflops(config, mix)
    for name in configs:
        if name != OURS:
            result[f"{name}_ratio"] = result[f"{name}_mflops"] / result[f"{OURS}_mflops"]
    return result


def main(arguments: list[str] | None = None) -> None:
    sizes = {"type": int, "nargs": 3, "default": [8, 2, 64], "metavar": ("E", "K", "WIDTH")}
    options = [*lesson_options(steps=250, seeds=3), ("--experts", sizes)]
    parsed = parse("An expert model against dense ones.", arguments, *options)
    settings = LessonSettings.read(parsed)
    report = Report(f"experts against dense, {settings}", parsed)
    scores: list[dict[str, dict[str, float]]] = []
    with media(parsed) as found:
        for seed in parsed.seeds[:1] if parsed.quick else parsed.seeds:
            lesson = Lesson(found, settings, seed)
            mix = TokenMix.of(lesson.held_out)
            configs = decoders(lesson.teacher.config, mix, parsed.experts)
            if not scores:
                report.add("computation of a token", sizes_of(configs, mix), "mflops")
            models = {name: lesson.decoder(config) for name, config in configs.items()}
            report.add(f"seed {seed} training step", figures(lesson.learn(models)))
            scores.append(score(lesson, models))
            for row, values in scores[-1].items():
                report.add(f"seed {seed} {row}", values, unit_of(values))
    for row, values in scores[0].items():
        means = {key: fmean(found[row][key] for found in scores) for key in values}
        report.add(f"mean {row}", means, unit_of(values))
    report.save()


if __name__ == "__main__":
    main()
