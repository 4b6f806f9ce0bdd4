"""Pictures of results: a confusion, and the curves of a run."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from chorus_moe.training.results.confusion import Confusion
from chorus_moe.training.routing.pictures import can_draw, pyplot_without_display

COLOURS = {"train": "#2f6db3", "eval": "#d98032"}
CURVES = "curves.png"
NO_PICTURES = "matplotlib is not installed, so no picture is drawn: pip install 'chorus-moe[plots]'"


class Curves(NamedTuple):
    """What a Trainer has logged: metric ("loss", "token accuracy") -> series ("train", "eval") -> (step, value)."""

    metrics: dict[str, dict[str, list[tuple[int, float]]]]

    @property
    def can_be_seen(self) -> bool:
        """Whether a series has two points; one point is no curve."""
        return any(len(points) > 1 for series in self.metrics.values() for points in series.values())


def curves_of(log_history: Sequence[Mapping[str, float]]) -> Curves:
    """The curves in a Trainer's `state.log_history`. Of two values of one step the last counts."""
    names = {"loss": ("loss", "train"), "eval_loss": ("loss", "eval")}
    names |= {"token_accuracy": ("token accuracy", "train"), "eval_token_accuracy": ("token accuracy", "eval")}
    found: dict[str, dict[str, dict[int, float]]] = {}
    for entry in log_history:
        for key, (metric, series) in names.items():
            if key in entry:
                found.setdefault(metric, {}).setdefault(series, {})[int(entry["step"])] = float(entry[key])
    return Curves({metric: {s: sorted(p.items()) for s, p in series.items()} for metric, series in found.items()})


def draw_curves(path: Path, curves: Curves) -> Path | None:
    """One panel a metric; None, and no picture, where there is no curve or matplotlib is missing. A picture of an
    earlier run is removed in any case."""
    path.unlink(missing_ok=True)
    if not curves.can_be_seen or not can_draw():
        return None
    pyplot = pyplot_without_display()
    count = len(curves.metrics)
    figure, panels = pyplot.subplots(1, count, figsize=(4.8 * count, 3.4), layout="constrained", squeeze=False)
    for axes, (metric, series) in zip(panels[0], curves.metrics.items(), strict=True):
        for name, points in series.items():
            # A series that was logged once is a point, which a line would not show.
            axes.plot(*zip(*points, strict=True), label=name, color=COLOURS[name], marker="o", markersize=3)
        axes.set(xlabel="step", ylabel=metric)
        heights = [value for points in series.values() for _, value in points if math.isfinite(value)]
        # From zero, and room above the first point, which is mostly the highest.
        axes.set_ylim(min(0.0, *heights, 0.0), 1.08 * max(heights, default=0.0) or 1.0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path


def draw_confusion(path: Path, confusions: Mapping[str, Confusion]) -> Path | None:
    """Heat maps side by side, by title: shares of each reference in colour, counts in the cells; None without
    matplotlib. A picture of an earlier evaluation is removed in any case."""
    path.unlink(missing_ok=True)
    if not confusions or not can_draw():
        return None
    pyplot = pyplot_without_display()
    sizes = [max(2.8, 0.42 * len(confusion.columns) + 1.4) for confusion in confusions.values()]
    figure, panels = pyplot.subplots(
        1, len(sizes), figsize=(sum(sizes), max(sizes)), layout="constrained", width_ratios=sizes, squeeze=False
    )
    for axes, (title, confusion) in zip(panels[0], confusions.items(), strict=True):
        shares = confusion.counts / confusion.counts.sum(axis=1, keepdims=True)
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        for (row, column), count in np.ndenumerate(confusion.counts):
            if count:
                colour = "white" if shares[row, column] > 0.6 else "black"
                axes.text(column, row, str(count), ha="center", va="center", fontsize=8, color=colour)
        axes.set_xticks(range(len(confusion.columns)), confusion.columns, rotation=90, fontsize=8)
        axes.set_yticks(range(len(confusion.labels)), confusion.labels, fontsize=8)
        axes.set(xlabel="answer", ylabel="reference", title=title)
    # Square panels leave the layout's room for title and labels when the widths are scarce.
    figure.savefig(path, dpi=130, bbox_inches="tight")
    pyplot.close(figure)
    return path
