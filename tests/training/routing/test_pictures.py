"""The heat map of routing: what its axes hold, read from the figure itself."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chorus_moe.training.routing import pictures as module
from chorus_moe.training.routing.pictures import _idle, _ticks, can_draw, draw_routing

pyplot = pytest.importorskip("matplotlib", reason="of the extra `plots`") and module.pyplot_without_display()
NAN = float("nan")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Figures that were closed, and how they were saved."""
    seen: list[Any] = []
    close = pyplot.close
    monkeypatch.setattr(pyplot, "close", seen.append)
    # To paint them takes seconds; `test_report.py` does.
    monkeypatch.setattr(pyplot.Figure, "savefig", lambda figure, path, **options: seen.append((path, options)))
    yield seen
    for figure in seen:
        if not isinstance(figure, tuple):
            close(figure)


# Bank -> (layers, modalities, experts): the second layer has three experts in bank a; nothing of sound entered it.
SHARES = {
    "a": np.array([[[0.5, 0.5, 0, 0.0], [0.2, 0.004, 0.0, 0.796], [0] * 4],
                   [[0.1, 0.7, 0.2, NAN], [0.0, 1.0, 0.0, NAN], [NAN] * 4]]),
    "b": np.full((2, 3, 2), 0.25),
}  # fmt: skip


def test_cells_labels_and_lines_are_those_of_the_shares(tmp_path: Path, drawn: list[Any]) -> None:
    draw_routing(tmp_path / "p.png", SHARES, [1, 4])
    (path, options), figure = drawn
    assert path == tmp_path / "p.png" and options == {"dpi": 130}
    axes, bar = figure.axes
    grid = axes.images[0].get_array()
    expected = np.concatenate([100 * SHARES["a"].reshape(6, 4), 100 * SHARES["b"].reshape(6, 2)], axis=1)
    np.testing.assert_allclose(grid.filled(NAN)[~grid.mask], expected[~grid.mask])
    grey = [(2, c) for c in range(4)] + [(3, 3), (4, 3)] + [(5, c) for c in range(4)]
    assert sorted(map(tuple, np.argwhere(grid.mask).tolist())) == sorted(grey)
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        f"layer {layer}, {name}" for layer in (1, 4) for name in ("text", "image", "audio")
    ]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1", "2", "3", "0", "1"]
    assert [text.get_text() for text in axes.texts if text.get_text().startswith("bank")] == ["bank a", "bank b"]
    assert [text.xy[0] for text in axes.texts if text.get_text().startswith("bank")] == [1.5, 4.5]
    lines = [(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines]
    assert [x for x, _ in lines][:1] == [3.5] and [y for _, y in lines][1:] == [2.5] and len(lines) == 2
    assert axes.get_xlabel() == "expert" and "share of the modality's routed weight (%)" in bar.get_ylabel()
    assert axes.images[0].get_clim()[0] == 0


def test_numbers_stand_in_cells_that_have_one_light_on_dark(tmp_path: Path, drawn: list[Any]) -> None:
    draw_routing(tmp_path / "p.png", SHARES, [1, 4])
    texts = drawn[1].axes[0].texts
    cells = {t.get_position(): (t.get_text(), t.get_color()) for t in texts if not t.get_text().startswith("bank")}
    # Below half a percent nothing is written; above 60 of the largest it is white.
    found = {(row, column): cells.get((column, row)) for row in range(6) for column in range(4)}
    assert found[0, 0] == ("50", "black") and found[1, 0] == ("20", "black") and found[1, 3] == ("80", "white")
    assert found[3, 1] == ("70", "white") and found[4, 1] == ("100", "white")
    assert found[1, 1] is None and found[0, 2] is None and found[3, 3] is None
    assert cells[4, 0] == ("25", "black")


@pytest.mark.parametrize(
    ("layers", "experts", "inches", "dpi", "is_written"),
    [
        (1, 2, (3.0 + 2.6, 3.0 + 1.6), 130, True),
        (4, 20, (20 * 0.42 + 2.6, 12 * 0.3 + 1.6), 130, True),
        # 24 inches at most; cells of less than .3 by .2 are too small for numbers.
        (2, 100, (24.0 + 2.6, 3.0 + 1.6), 90, False),
        (40, 4, (3.0 + 2.6, 24.0 + 1.6), 90, True),
        (60, 4, (3.0 + 2.6, 24.0 + 1.6), 90, False),
    ],
)
def test_a_picture_grows_with_its_cells_up_to_a_bound(
    layers: int, experts: int, inches: tuple[float, float], dpi: int, is_written: bool,
    tmp_path: Path, drawn: list[Any],
) -> None:  # fmt: skip
    draw_routing(tmp_path / "p.png", {"a": np.full((layers, 3, experts), 0.2)}, list(range(layers)))
    figure = drawn[1]
    assert tuple(figure.get_size_inches()) == pytest.approx(inches)
    assert drawn[0][1] == {"dpi": dpi}
    assert (len(figure.axes[0].texts) > 1) == is_written


@pytest.mark.parametrize(("layers", "is_each"), [(57, True), (58, False)])
def test_low_rows_have_a_label_for_each_layer(
    layers: int, is_each: bool, tmp_path: Path, drawn: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_routing(tmp_path / "p.png", {"a": np.full((layers, 3, 2), 0.5)}, list(range(layers)))
    axes = drawn[1].axes[0]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    if is_each:
        assert len(labels) == 3 * layers and labels[3] == "layer 1, text"
    else:
        assert labels[1] == "layer 1 (text, image, audio)" and len(labels) == layers
        assert list(axes.get_yticks()[:3]) == [1, 4, 7]


def test_a_bank_is_idle_where_nothing_entered_it() -> None:
    share = np.array([[[0.5, 0.5], [0.0, 0.0]], [[NAN, 1.0], [NAN, NAN]]])
    assert _idle(share).tolist() == [[False, False], [True, True], [True, False], [True, True]]


def test_labels_begin_anew_with_each_bank() -> None:
    shares = {"a": np.zeros((1, 3, 5)), "b": np.zeros((1, 3, 3))}
    assert _ticks(shares, every=2) == [(0, 0), (2, 2), (4, 4), (5, 0), (7, 2)]
    assert _ticks(shares, every=1) == [(i, i) for i in range(5)] + [(5 + i, i) for i in range(3)]


def test_wide_pictures_have_fewer_labels(tmp_path: Path, drawn: list[Any]) -> None:
    draw_routing(tmp_path / "p.png", {"a": np.full((1, 3, 128), 0.1)}, [0])
    # 24 inches for 128 experts: one label for two.
    assert [label.get_text() for label in drawn[1].axes[0].get_xticklabels()][:3] == ["0", "2", "4"]


def test_pictures_need_matplotlib_and_no_display(monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib

    assert can_draw() and matplotlib.get_backend().lower() == "agg"
    asked: list[str] = []
    monkeypatch.setattr(module, "find_spec", lambda name: asked.append(name))
    assert not can_draw() and asked == ["matplotlib"]
