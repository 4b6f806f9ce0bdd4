"""Draw the picture of the model in the README: `python docs/pictures/model.py`."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

COLOURS = {"image": "#4c9f70", "audio": "#c97b2a", "text": "#3b6fb6", "common": "#7a7a7a"}


def box(axes: plt.Axes, left: float, bottom: float, width: float, label: str, colour: str, height: float = 0.7) -> None:
    shape = FancyBboxPatch((left, bottom), width, height, "round,pad=0.02,rounding_size=0.1", fc=colour, ec="none")
    axes.add_patch(shape)
    axes.text(left + width / 2, bottom + height / 2, label, ha="center", va="center", color="white", fontsize=10)


def arrow(axes: plt.Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": "#444444", "lw": 1.4})


def main() -> None:
    figure, axes = plt.subplots(figsize=(9, 5.2))
    inputs = {"text": "text\ntokenizer", "image": "image\nany vision encoder", "audio": "sound\nany audio encoder"}
    for column, (name, label) in enumerate(inputs.items()):
        box(axes, 3.2 * column, 0, 2.9, label, COLOURS[name], 0.8)
        if name != "text":
            box(axes, 3.2 * column, 1.1, 2.9, "connector", COLOURS[name], 0.45)
            arrow(axes, (3.2 * column + 1.45, 0.82), (3.2 * column + 1.45, 1.08))
        arrow(axes, (3.2 * column + 1.45, 0.82 if name == "text" else 1.57), (3.2 * column + 1.45, 1.95))
    for index in range(18):
        name = "text" if index % 9 in (0, 1, 5) else "image" if index % 9 < 5 else "audio"
        box(axes, 0.52 * index + 0.02, 2.0, 0.44, "", COLOURS[name], 0.35)
    axes.text(9.5, 2.17, "one sequence", va="center", fontsize=10)
    arrow(axes, (4.65, 2.37), (4.65, 2.75))
    box(axes, 0, 2.8, 9.3, "attention: one softmax over all tokens; keys and values for each modality", "#4a4a68", 0.5)
    arrow(axes, (4.65, 3.32), (4.65, 3.65))
    box(axes, 0, 3.7, 9.3, "gate over named expert banks", "#4a4a68", 0.4)
    for column, name in enumerate(COLOURS):
        left = 2.36 * column
        axes.text(left + 1.1, 5.22, f"“{name}”" + (": all modalities" if name == "common" else " bank"), ha="center")
        for expert in range(4):
            box(axes, left + 0.56 * expert, 4.5, 0.5, f"E{expert + 1}", COLOURS[name], 0.5)
        arrow(axes, (left + 1.1, 4.12), (left + 1.1, 4.47))
    axes.text(9.5, 4.0, "× layers", va="center", fontsize=10)
    arrow(axes, (4.65, 5.5), (4.65, 5.85))
    box(axes, 0, 5.9, 9.3, "text, a label, or an embedding", "#4a4a68", 0.45)
    axes.set(xlim=(-0.1, 11.1), ylim=(-0.1, 6.45))
    axes.axis("off")
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    main()
