"""A heat map of routing: where the tokens of each modality go, by layer, bank and expert."""

import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import numpy as np

from chorus_moe.modeling.configuration_modalities import MODALITY_IDS

# Inches of a cell, and of the whole at most. Numbers are written where a cell is large enough to read them.
CELL, MAX_SIZE, READABLE = (0.42, 0.3), (24.0, 24.0), (0.3, 0.2)
MARGIN = (2.6, 1.6)


def can_draw() -> bool:
    """Whether matplotlib, of the extra `plots`, is installed."""
    return find_spec("matplotlib") is not None


def pyplot_without_display() -> ModuleType:
    import matplotlib

    # Before pyplot is loaded: servers have no display.
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def draw_routing(path: Path, shares: Mapping[str, np.ndarray], layers: Sequence[int]) -> None:
    """Write a picture whose rows are modalities in each sparse layer and whose columns are the experts of each bank.

    Args:
        shares: what `routing_shares` returns. A bank is grey where it does not exist or is closed: where nothing of a
            modality, in a layer, went to any of its experts. So are experts that a layer does not have.
        layers: indices of the sparse layers.
    """
    pyplot = pyplot_without_display()
    grid = np.concatenate([share.reshape(-1, share.shape[-1]) for share in shares.values()], axis=1)
    idle = np.concatenate([_idle(share) for share in shares.values()], axis=1)
    sizes = [
        min(max(count * cell, 3.0), limit) for count, cell, limit in zip(grid.shape[::-1], CELL, MAX_SIZE, strict=True)
    ]
    width, height = sizes[0] / grid.shape[1], sizes[1] / grid.shape[0]
    figure, axes = pyplot.subplots(figsize=(sizes[0] + MARGIN[0], sizes[1] + MARGIN[1]), layout="constrained")
    colours = pyplot.get_cmap("Blues").with_extremes(bad="#ececec")
    picture = axes.imshow(np.ma.masked_array(100 * grid, idle), cmap=colours, aspect="auto", vmin=0)
    if width >= READABLE[0] and height >= READABLE[1]:
        for (row, column), value in np.ndenumerate(grid):
            # Less would be printed as 0.
            if value >= 0.005:
                # Readable on dark cells and on light ones.
                colour = "white" if value > 0.6 * np.nanmax(grid) else "black"
                axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=8, color=colour)
    modalities = list(MODALITY_IDS)
    # Inches of a row: below this labels of 8 points would overlap, so there is one for each layer.
    if height >= 0.14:
        labels = [f"layer {layer}, {name}" for layer in layers for name in modalities]
        axes.set_yticks(range(len(grid)), labels, fontsize=8)
    else:
        middle = np.arange(len(layers)) * len(modalities) + (len(modalities) - 1) / 2
        labels = [f"layer {layer} ({', '.join(modalities)})" for layer in layers]
        axes.set_yticks(middle, labels, fontsize=7)
    # A label for every 0.3 inches at most.
    ticks = _ticks(shares, every=math.ceil(0.3 / width))
    axes.set_xticks([place for place, _ in ticks], [str(expert) for _, expert in ticks], fontsize=8)
    start = 0
    for name, share in shares.items():
        centre = start + share.shape[-1] / 2 - 0.5
        axes.annotate(
            f"bank {name}", (centre, 1), xycoords=("data", "axes fraction"), xytext=(0, 5),
            textcoords="offset points", ha="center", fontsize=10,
        )  # fmt: skip
        start += share.shape[-1]
        if start < grid.shape[1]:
            axes.axvline(start - 0.5, color="black", linewidth=1.2)
    for layer in range(1, len(layers)):
        axes.axhline(layer * len(modalities) - 0.5, color="black", linewidth=1.2)
    axes.set_xlabel("expert")
    figure.colorbar(picture, label="share of the modality's routed weight (%)", aspect=5 * max(sizes[1], 4.0), pad=0.02)
    figure.savefig(path, dpi=130 if max(sizes) < 16 else 90)
    pyplot.close(figure)


def _idle(share: np.ndarray) -> np.ndarray:
    """True in the rows of a bank that no token of the modality entered, and for experts that do not exist."""
    rows = share.reshape(-1, share.shape[-1])
    return np.isnan(rows) | (np.nansum(rows, axis=1, keepdims=True) == 0)


def _ticks(shares: Mapping[str, np.ndarray], every: int) -> list[tuple[int, int]]:
    """(column, expert) of each bank's first expert and of every `every`-th one after it."""
    found, start = [], 0
    for share in shares.values():
        found += [(start + expert, expert) for expert in range(0, share.shape[-1], every)]
        start += share.shape[-1]
    return found
