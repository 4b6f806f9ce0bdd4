"""HTML and pictures of what the model did for one answer."""

import io
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor

from chorus_moe.serving.trace import Trace, shares
from chorus_moe.surgery.printing import Html

COLOURS = {"text": "#5b8def", "image": "#e8875b", "audio": "#56b28a"}
# The longer side of a picture, in pixels.
SIDE = 384
STYLE = """
.chorus-words span {padding: 1px 2px; margin: 1px; border-radius: 3px; display: inline-block; white-space: pre-wrap}
.chorus-heat td {min-width: 20px; height: 16px; font-size: 10px; text-align: center; border: 1px solid #8883}
.chorus-heat th {font-weight: normal; font-size: 11px; padding: 0 6px; text-align: left}
.chorus-nearest {width: 100%}
.chorus-nearest td:nth-child(2) {width: 45%}
.chorus-nearest th {font-weight: normal; padding: 0 6px; text-align: left; overflow-wrap: anywhere}
"""


def words_html(trace: Trace) -> str:
    """The tokens, coloured by modality; a hovered one says its experts, layer by layer."""
    pieces = []
    for position, (word, modality) in enumerate(zip(trace.words, trace.modalities, strict=True)):
        lines = []
        for layer in trace.experts:
            experts = [f"{bank} {expert} ({weight:.2f})" for bank, expert, weight in trace.strongest(position, layer)]
            lines.append(f"layer {layer}: " + (", ".join(experts) or "none"))
        weight = "bold" if position >= trace.prompt_length else "normal"
        # A picture's tokens all say <image>: a box is enough.
        shown = escape(word) if modality == "text" else "▣"
        pieces.append(
            f'<span title="{escape(chr(10).join(lines), quote=True)}" '
            f'style="background:{COLOURS.get(modality, "#999")}33;font-weight:{weight}">{shown}</span>'
        )
    legend = " ".join(f'<span style="background:{colour}33">{name}</span>' for name, colour in COLOURS.items())
    return f'<div class="chorus-words">{legend} <b>answer</b><hr>{"".join(pieces)}</div>'


def heat_html(experts: Mapping[int, Mapping[str, Tensor]]) -> str:
    """A row for each bank of each layer: share of the layer's visits, in percent, that each of its experts had."""
    if not experts:
        return "<p>The model has no sparse layer.</p>"
    rows = []
    for layer, banks in experts.items():
        for name, share_E in shares(banks).items():
            cells = [f"<th>layer {layer}, {escape(name)}</th>"]
            for expert, share in enumerate(share_E.tolist()):
                title = f"layer {layer}, bank {name}, expert {expert}: {100 * share:.1f} % of the visits"
                number = f"{100 * share:.0f}" if share else ""
                colour = f"rgba(40,90,200,{min(2 * share, 1):.2f})"
                cells.append(f'<td title="{escape(title, quote=True)}" style="background:{colour}">{number}</td>')
            rows.append("<tr>" + "".join(cells) + "</tr>")
    return f'<table class="chorus-heat">{"".join(rows)}</table>'


def trace_html(trace: Trace) -> Html:
    """Experts and tokens of one answer, for a notebook."""
    return Html(f"<style>{STYLE}</style>{heat_html(trace.experts)}{words_html(trace)}")


def nearest_html(found: Sequence[tuple[str, float]]) -> str:
    """A bar for each name, of cosine similarities; what points away has none."""
    rows = [
        f"<tr><th>{escape(name)}</th>"
        f'<td><div style="background:{COLOURS["text"]};width:{100 * max(score, 0):.1f}%">&nbsp;</div></td>'
        f"<td>{score:.3f}</td></tr>"
        for name, score in found
    ]
    return f'<table class="chorus-nearest">{"".join(rows)}</table>'


def spent_text(trace: Trace, tokens_per_second: float) -> str:
    written = len(trace.words) - trace.prompt_length
    return (
        f"{trace.prompt_length} tokens read, {written} written, {tokens_per_second:.1f} tokens a second; "
        f"{trace.layers} layers, {trace.visits:,} visits to experts, {trace.flops / 1e6:,.0f} MFLOPs"
    )


def picture_attention(trace: Trace, span: range, picture: str | bytes, is_padded: bool = False) -> Image.Image | None:
    """A picture with what the answer looked at over it; None without a map, or where the tokens are no square.

    Args:
        is_padded: the model saw it in the middle of a black square, not stretched to one.
    """
    weight_N = looked_at(trace, span)
    side = round(len(span) ** 0.5)
    if weight_N is None or side * side != len(span):
        return None
    file = io.BytesIO(picture) if isinstance(picture, bytes) else picture
    # As the model saw it: a camera's tag says which side is up.
    shown = ImageOps.exif_transpose(Image.open(file)).convert("RGB")
    scale = SIDE / max(shown.size)
    shown = shown.resize((max(1, round(scale * shown.width)), max(1, round(scale * shown.height))))
    if is_padded:
        square = Image.new("RGB", (SIDE, SIDE), "black")
        square.paste(shown, ((SIDE - shown.width) // 2, (SIDE - shown.height) // 2))
        shown = square
    grid = Image.fromarray((255 * weight_N.reshape(side, side)).astype(np.uint8)).resize(
        shown.size, Image.Resampling.BICUBIC
    )
    return Image.composite(Image.new("RGB", shown.size, "#e0301e"), shown, grid.point(lambda value: value * 0.7))


def sound_attention(trace: Trace, span: range, features: Tensor) -> Image.Image | None:
    """A spectrogram, low tones below, with what the answer listened to as a bar above it.

    Args:
        features: `(frames, mels)` of the clip.
    """
    weight_N = looked_at(trace, span)
    if weight_N is None:
        return None
    mel = np.asarray(features.float()).T[::-1]
    low, high = mel.min(), mel.max()
    grey = Image.fromarray((255 * (mel - low) / max(high - low, 1e-6)).astype(np.uint8)).resize((SIDE, 140))
    bar = Image.fromarray((255 * weight_N[None]).astype(np.uint8)).resize((SIDE, 24), Image.Resampling.NEAREST)
    shown = Image.new("RGB", (SIDE, 168), "white")
    shown.paste(
        Image.composite(Image.new("RGB", bar.size, "#e0301e"), Image.new("RGB", bar.size, "white"), bar), (0, 0)
    )
    shown.paste(grey.convert("RGB"), (0, 28))
    return shown


def looked_at(trace: Trace, span: range) -> np.ndarray | None:
    """Mean attention of the answer on a span's tokens, the strongest as 1."""
    if trace.attention_AS is None or not len(span):
        return None
    weight_N = trace.attention_AS[:, span.start : span.stop].mean(dim=0).numpy()
    return weight_N / max(weight_N.max(), 1e-9)
