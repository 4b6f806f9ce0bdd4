"""The pictures of the demo's report."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from chorus_moe.processors.processing_chorus import ChorusProcessor
from chorus_moe.training.demo.data import Sample
from chorus_moe.training.routing.pictures import pyplot_without_display

Marks = Mapping[str, Sequence[bool]]
BARS = {"before LoRA": "#b8c4d6", "after LoRA": "#2f6db3", "image withheld": "#d98032", "sound withheld": "#7a9f45"}


def draw_accuracy(path: Path, before: Marks, after: Mapping[str, Marks]) -> None:
    """Bars of accuracy in percent: four for each skill."""
    pyplot = pyplot_without_display()
    series = dict(zip(BARS, (before, after["full"], after["image_withheld"], after["audio_withheld"]), strict=True))
    figure, axes = pyplot.subplots(figsize=(10, 3.8), layout="constrained")
    for index, (name, marks) in enumerate(series.items()):
        heights = [100 * np.mean(marks[skill]) for skill in before]
        bars = axes.bar(np.arange(len(before)) + (index - 1.5) * 0.2, heights, 0.19, label=name, color=BARS[name])
        axes.bar_label(bars, fmt="%.0f", fontsize=7, padding=1)
    axes.set_xticks(range(len(before)), before)
    # Room for the numbers above full bars.
    axes.set(ylim=(0, 112), ylabel="accuracy (%)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(ncols=4, frameon=False, loc="upper center", bbox_to_anchor=(0.5, 1.16))
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def draw_examples(
    path: Path, processor: ChorusProcessor, questions: Sequence[Sample], answers: Sequence[str], count: int = 3
) -> None:
    """Picture, log-mel spectrogram, question and answer of the first questions, of different skills, that need both."""
    pyplot = pyplot_without_display()
    chosen: dict[str, int] = {}
    for index, sample in enumerate(questions):
        if sample["images"] and sample["audio"] and sample["skill"] not in ("written", "spoken"):
            # The first of each skill, whether its answer is right or wrong.
            chosen.setdefault(sample["skill"], index)
    rows = list(chosen.values())[-count:]
    figure, axes = pyplot.subplots(
        len(rows), 3, figsize=(10, 2.1 * len(rows)), layout="constrained", width_ratios=(1, 2, 3), squeeze=False
    )
    for line, index in zip(axes, rows, strict=True):
        sample = questions[index]
        line[0].imshow(Image.open(sample["images"][0]), cmap="gray")
        line[0].set(xticks=[], yticks=[])
        features = processor.feature_extractor(sample["audio"], return_tensors="np")["input_features"][0]
        line[1].imshow(features.T, origin="lower", aspect="auto", cmap="magma")
        line[1].set(xlabel="frame (10 ms)", ylabel="mel band")
        text = next(p["text"] for turn in sample["messages"] for p in turn["content"] if p["type"] == "text")
        verdict = "right" if answers[index] == sample["answer"] else f"wrong, expected {sample['answer']}"
        line[2].axis("off")
        line[2].text(0, 0.5, f"{text}\n\nanswer: {answers[index]}   ({verdict})", va="center", fontsize=11, wrap=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
