"""The demo's report: what was reached, what each modality is worth, and where the tokens went.

`report.json`, `report.md` and the pictures hold the same figures; the model card is written from them.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from chorus_moe.processors.processing_chorus import ChorusProcessor
from chorus_moe.surgery import parameter_report
from chorus_moe.training.demo.card import write_model_card
from chorus_moe.training.demo.data import SKILLS, Sample, best_blind_accuracy
from chorus_moe.training.demo.pictures import draw_accuracy, draw_examples
from chorus_moe.training.loading import ModelOrAdapter
from chorus_moe.training.results.answers import wilson_interval
from chorus_moe.training.results.confusion import Confusion, confusion_of, confusion_table
from chorus_moe.training.results.pictures import Curves, curves_of, draw_confusion, draw_curves
from chorus_moe.training.routing.report import count_rows, routing_table, write_routing
from chorus_moe.training.routing.statistics import summarise

Marks = Mapping[str, Sequence[bool]]
EXTRA = {
    "new_voices": "*spoken*, by voices that the base model does not know",
    "new_phrasings": "The old skills, asked in phrasings that neither stage has seen",
    "known_speakers": "The same phrasings, with other takes of the speakers that the base model knows",
}
# Skills whose answer is a digit itself.
READING = ("written", "spoken")
WITHHELD = ("image_withheld", "audio_withheld")


def rate(marks: Sequence[bool]) -> float:
    return sum(marks) / len(marks)


def _skill_figures(before: Marks, after: Mapping[str, Marks]) -> dict[str, dict[str, float]]:
    return {
        name: {
            "n": len(after["full"][name]),
            "before": rate(before[name]),
            "after": rate(after["full"][name]),
            **{variant: rate(after[variant][name]) for variant in WITHHELD},
        }
        for name in before
    }


def _percent(marks: Sequence[bool]) -> str:
    low, high = wilson_interval(marks)
    return f"{100 * rate(marks):.1f}% ({100 * low:.1f} to {100 * high:.1f})"


def _skill_table(before: Marks, after: Mapping[str, Marks], new_skill: str) -> list[str]:
    lines = [
        "| skill | questions | before LoRA | after LoRA | image withheld | sound withheld |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, marks in before.items():
        cells = [_percent(marks), _percent(after["full"][name])]
        for variant in WITHHELD:
            medium = variant.split("_")[0]
            cell = f"{100 * rate(after[variant][name]):.1f}%"
            # "Chance" is what the best model reaches without the medium, not one over the number of answers.
            if medium in SKILLS[name].needs:
                cell += f" (chance {100 * best_blind_accuracy(name, medium):.0f}%)"
            cells.append(cell)
        title = f"**{name}** (new)" if name == new_skill else name
        lines.append(f"| {title} | {len(marks)} | {' | '.join(cells)} |")
    return lines


def loss_curves(logs: Mapping[str, Sequence[Mapping[str, float]]]) -> Curves:
    """The training loss of each stage, a panel each."""
    found = {stage: curves_of(history).metrics.get("loss", {}) for stage, history in logs.items()}
    return Curves({f"loss, {stage}": series for stage, series in found.items() if series})


def confusions_of(questions: Sequence[Sample], answers: Sequence[str]) -> dict[str, Confusion]:
    """Which digit was read or heard for which, by the skill that asks for it."""
    found = {}
    for skill in READING:
        pairs = [(given, q["answer"]) for q, given in zip(questions, answers, strict=True) if q["skill"] == skill]
        if pairs and (confusion := confusion_of(*zip(*pairs, strict=True))) is not None:
            found[skill] = confusion
    return found


def _curves_section(picture: Path | None) -> list[str]:
    if picture is None:
        return []
    text = "Training loss, label smoothing and routing losses included; a point is the mean since the one before."
    return ["## How it learned", "", text, "", f"![Training loss of both stages by step]({picture.name})", ""]


def _confusion_section(confusions: Mapping[str, Confusion], picture: Path | None) -> list[str]:
    if not confusions:
        return []
    lines = ["## Which digits it confuses", "", "Held-out questions after LoRA; a row is the right answer.", ""]
    lines += [f"![Answers by right answer]({picture.name})", ""] if picture else []
    for skill, confusion in confusions.items():
        lines += [f"**{skill}**", "", *confusion_table(confusion), ""]
    return lines


def write_report(
    out: Path,
    *,
    model: ModelOrAdapter,
    processor: ChorusProcessor,
    questions: Sequence[Sample],
    answers: Sequence[str],
    before: Marks,
    after: Mapping[str, Marks],
    extra: Mapping[str, tuple[Sequence[bool], Sequence[bool]]],
    new_skill: str,
    voices: str,
    logs: Mapping[str, Sequence[Mapping[str, float]]],
    agreement: tuple[int, int],
    stages: Mapping[str, float],
    seconds: float,
    peak_gib: float,
) -> dict[str, Any]:
    """Write `report.json`, `report.md`, the pictures and the model card of `out/merged`; returns the JSON.

    Args:
        answers: to `questions`, of the model as it is at the end.
        logs: stage -> what its Trainer has logged.
    """
    parameters = parameter_report(model.config)
    # A few questions of every skill are enough for shares.
    counters = count_rows(model, processor, questions[:192])
    draw_accuracy(out / "accuracy.png", before, after)
    picture = write_routing(out, counters)
    draw_examples(out / "examples.png", processor, questions, answers)
    curves, confusions = loss_curves(logs), confusions_of(questions, answers)
    curves_picture = draw_curves(out / "curves.png", curves)
    confusion_picture = draw_confusion(out / "confusion.png", confusions)
    result = {
        "skills": _skill_figures(before, after),
        **{name: {"n": len(old), "before": rate(old), "after": rate(new)} for name, (old, new) in extra.items()},
        "parameters": {"total": parameters.total, "active": parameters.active["text"]},
        "active_by_modality": parameters.active,
        "adapter_and_merged_agree": agreement[0] / agreement[1],
        "voices": voices,
        "losses": {name: [list(point) for point in series["train"]] for name, series in curves.metrics.items()},
        "confusions": {name: found._asdict() | {"counts": found.counts.tolist()} for name, found in confusions.items()},
        "stages": {name: round(value, 1) for name, value in stages.items()},
        "seconds": round(seconds, 1),
        "peak_gib": round(peak_gib, 2),
    }
    lines = [
        "# What the demo reached",
        "",
        f"Handwriting: scikit-learn's digits, the last quarter held out in writer order. Speech: {voices}.",
        "Answers are generated text and count when they are exactly right; 95% intervals in brackets.",
        "",
        *_skill_table(before, after, new_skill),
        "",
        *(
            f"{EXTRA[name]} ({len(old)} questions): {_percent(old)} before LoRA, {_percent(new)} after. "
            for name, (old, new) in extra.items()
        ),
        f"Adapter on the base model and merged model, both loaded in a fresh process, agree on {agreement[0]} of "
        f"{agreement[1]} answers.",
        "",
        "![Accuracy before and after LoRA and with a medium withheld](accuracy.png)",
        "",
        *_curves_section(curves_picture),
        *_confusion_section(confusions, confusion_picture),
        "## Three worked examples",
        "",
        "![Picture, spectrogram, question and answer](examples.png)",
        "",
        "## Where the tokens went",
        "",
        "Share of each modality's routed weight by bank and expert, after LoRA.",
        "",
        "![Bank and expert use by modality](routing.png)",
        "",
        "```",
        routing_table(summarise(counters)),
        "```",
        "",
        "## Size, time and memory",
        "",
        "```",
        str(parameters),
        "```",
        "",
        "| stage | seconds |",
        "| --- | --- |",
        *(f"| {name} | {value:.0f} |" for name, value in stages.items()),
        f"| **all** | **{seconds:.0f}** |",
        "",
        f"Peak memory {peak_gib:.2f} GiB.",
        "",
    ]
    (out / "report.json").write_text(json.dumps(result, indent=2) + "\n")
    (out / "report.md").write_text("\n".join(lines))
    write_model_card(out / "merged", model, result, table=_skill_table(before, after, new_skill), picture=picture)
    return result
