"""What the page shows of an answer, read out of its HTML and its pixels."""

import io
import re
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from chorus_moe.serving.page_views import (
    heat_html,
    looked_at,
    nearest_html,
    picture_attention,
    sound_attention,
    spent_text,
    words_html,
)
from chorus_moe.serving.trace import Trace

EXPERTS = {1: {"te<xt": torch.tensor([[0.5, 0.0], [0.0, 0.0], [0.25, 0.75]]), "common": torch.tensor([[1.0]] * 3)}}


def trace(weights: list[list[float]] | None = None, **fields: Any) -> Trace:
    attention = None if weights is None else torch.tensor(weights)
    values: dict[str, Any] = {
        "words": ["<b>", "<image>", "four"], "modalities": ["text", "image", "text"], "prompt_length": 2,
        "experts": EXPERTS, "attention_layers": [0], "layers": 3, "visits": 1234, "flops": 5_600_000,
    }  # fmt: skip
    return Trace(**values | {"attention_AS": attention} | fields)


def test_words_say_their_experts_and_nothing_of_a_text_becomes_html() -> None:
    html = words_html(trace())
    spans = re.findall(r'<span title="(.*?)" style=".*?font-weight:(\w+)">(.*?)</span>', html, flags=re.DOTALL)
    assert [(weight, shown) for _, weight, shown in spans] == [
        ("normal", "&lt;b&gt;"), ("normal", "▣"), ("bold", "four"),
    ]  # fmt: skip
    assert spans[0][0] == "layer 1: common 0 (1.00), te&lt;xt 0 (0.50)"
    assert spans[2][0] == "layer 1: common 0 (1.00), te&lt;xt 1 (0.75), te&lt;xt 0 (0.25)"
    nobody = words_html(trace(experts={2: {"text": torch.zeros(3, 2)}}))
    assert 'title="layer 2: none"' in nobody


def test_a_cell_of_the_heat_map_is_a_share_of_the_layers_visits() -> None:
    html = heat_html(EXPERTS)
    cells = re.findall(r'<td title="(.*?)" style="background:rgba\(40,90,200,(.*?)\)">(.*?)</td>', html)
    # Of six visits two, one and three.
    assert [cell[2] for cell in cells] == ["33", "17", "50"] and [cell[1] for cell in cells] == ["0.67", "0.33", "1.00"]
    assert cells[0][0] == "layer 1, bank te&lt;xt, expert 0: 33.3 % of the visits"
    assert "<th>layer 1, te&lt;xt</th>" in html and html.count("<tr>") == 2
    assert re.search(r">(\d*)</td>", heat_html({0: {"text": torch.zeros(1, 1)}}))[1] == ""  # type: ignore[index]
    assert heat_html({}) == "<p>The model has no sparse layer.</p>"


def test_the_nearest_have_bars_and_what_points_away_has_none() -> None:
    html = nearest_html([("<a>", 0.825), ("b", -0.5)])
    assert re.findall(r"width:(.*?)%.*?<td>(.*?)</td>", html) == [("82.5", "0.825"), ("0.0", "-0.500")]
    assert "<th>&lt;a&gt;</th>" in html


def test_what_was_spent() -> None:
    assert spent_text(trace(), 12.34) == (
        "2 tokens read, 1 written, 12.3 tokens a second; 3 layers, 1,234 visits to experts, 6 MFLOPs"
    )


def test_what_was_looked_at_is_a_mean_whose_strongest_is_one() -> None:
    found = trace([[0.1, 0.4, 0.0, 0.5], [0.3, 0.0, 0.2, 0.5]])
    np.testing.assert_allclose(looked_at(found, range(0, 3)), [1.0, 1.0, 0.5])
    assert looked_at(found, range(2, 2)) is None and looked_at(trace(), range(3)) is None
    assert np.array_equal(looked_at(trace([[0.0, 0.0]]), range(2)), [0.0, 0.0])  # type: ignore[arg-type]


def file_of(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def redness(shown: Image.Image) -> np.ndarray:
    """Red beyond green in the four quarters of a picture, row by row."""
    pixels = np.asarray(shown, dtype=float)
    height, width = pixels.shape[0] // 2, pixels.shape[1] // 2
    excess = pixels[..., 0] - pixels[..., 1]
    return np.array([[excess[:height, :width].mean(), excess[:height, width:].mean()],
                     [excess[height:, :width].mean(), excess[height:, width:].mean()]])  # fmt: skip


@pytest.mark.parametrize(("size", "shown"), [((20, 10), (384, 192)), ((10, 20), (192, 384)), ((1, 9_000), (1, 384))])
def test_a_picture_is_red_where_the_answer_looked(size: tuple[int, int], shown: tuple[int, int]) -> None:
    found = picture_attention(trace([[0.0, 1.0, 0.0, 0.0]]), range(4), file_of(Image.new("RGB", size, "grey")))
    assert found is not None and found.size == shown
    if size[0] > 1:
        quarters = redness(found)
        assert quarters.argmax() == 1 and quarters[0, 1] > 4 * max(quarters[0, 0], quarters[1, 1], 1)


def test_a_picture_is_shown_as_the_model_saw_it() -> None:
    """Turned as its tag says, and in a black square where the model saw one."""
    picture = Image.new("RGB", (20, 10), "grey")
    picture.paste("blue", (0, 0, 10, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise: the left side comes to the top
    file = file_of(picture, exif=exif)
    turned = picture_attention(trace([[0.0] * 4]), range(4), file)
    assert turned is not None and turned.size == (192, 384)
    assert turned.getpixel((96, 60)) == (0, 0, 255) and turned.getpixel((96, 320)) == (128, 128, 128)
    padded = picture_attention(trace([[0.0] * 4]), range(4), file, is_padded=True)
    assert padded is not None and padded.size == (384, 384)
    assert padded.getpixel((20, 200)) == (0, 0, 0) and padded.getpixel((192, 60)) == (0, 0, 255)


def test_without_a_map_or_a_square_of_tokens_there_is_no_picture() -> None:
    file = file_of(Image.new("RGB", (4, 4)))
    assert picture_attention(trace(), range(4), file) is None
    assert picture_attention(trace([[1.0] * 3]), range(3), file) is None
    assert sound_attention(trace(), range(2), torch.zeros(4, 3)) is None


def test_a_spectrogram_has_low_tones_below_and_a_bar_above() -> None:
    features = torch.zeros(8, 4)
    features[4:, 0] = 2.0  # the lowest tone, in the second half
    shown = sound_attention(trace([[1.0, 0.0]]), range(2), features)
    assert shown is not None and shown.size == (384, 168)
    bar, gap = shown.getpixel((50, 12)), shown.getpixel((300, 12))
    assert bar == (224, 48, 30) and gap == (255, 255, 255) and shown.getpixel((50, 26)) == (255, 255, 255)
    pixels = np.asarray(shown.convert("L"), dtype=float)[28:]
    assert pixels[120:, 250:].mean() > 150 and pixels[:60].mean() < 20 and pixels[120:, :130].mean() < 20
    assert sound_attention(trace([[1.0]]), range(1), torch.full((3, 2), 5.0)) is not None  # silence all the same
