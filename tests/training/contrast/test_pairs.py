"""Rows of pairs from columns and from conversations; what is no pair is refused by its row and key."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from chorus_moe.training.contrast.pairs import load_pairs, pair_of
from chorus_moe.training.layouts import LayoutError

PICTURE = Image.new("L", (8, 8))
SOUND = {"array": np.zeros(100, dtype=np.float32), "sampling_rate": 16_000}
CHAT = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]},
    {"role": "assistant", "content": "a cat"},
]


@pytest.mark.parametrize(
    ("row", "columns", "names"),
    [
        ({"text": "a cat", "image": PICTURE}, None, ["text", "image"]),
        ({"caption": "a cat", "images": [PICTURE], "label": 3}, None, ["text", "image"]),
        ({"text": None, "image": PICTURE, "audio": SOUND}, None, ["image", "audio"]),
        ({"text": "a <image> cat", "audio": [SOUND]}, None, ["text", "audio"]),
        ({"sentence": "a cat", "photo": PICTURE}, {"text": "sentence", "images": "photo"}, ["text", "image"]),
        ({"messages": CHAT, "images": [PICTURE]}, None, ["text", "image"]),
        ({"messages": CHAT, "images": [PICTURE], "text": "no"}, {"text": "text"}, ["text", "image"]),
        ({"query": "what is it?", "response": "a cat", "image": PICTURE}, None, ["text", "image"]),
        ({"text": "a cat", "image": PICTURE, "audio": SOUND}, None, ["text", "image", "audio"]),
    ],
    ids=range(9),
)
def test_a_row_is_read_as_a_pair(row: dict[str, Any], columns: dict[str, str] | None, names: list[str]) -> None:
    pair = pair_of(row, columns)
    assert list(pair) == names
    assert pair.get("image", PICTURE) is PICTURE and pair.get("audio", SOUND) == SOUND
    assert pair.get("text") in {"a cat", "a <image> cat", None, "no"}
    # What was read once stays as it is: the collator reads the rows of a data set.
    assert pair_of(pair) == pair


@pytest.mark.parametrize(
    ("row", "columns", "message"),
    [
        ({"text": "a cat"}, None, "key 'text': a pair needs two of text, image, audio, found text"),
        ({"text": " ", "image": PICTURE}, None, "found image"),
        ({"label": 3}, None, r"found none; the row has \['label'\]"),
        ({"text": "a", "caption": "b", "image": PICTURE}, None, "'text' and 'caption' both hold a text"),
        ({"text": 3, "image": PICTURE}, None, "key 'text': expected a text, found 3"),
        ({"text": "a", "image": PICTURE}, {"text": "words"}, "key 'words': expected a text, found None"),
        ({"text": "a", "images": [PICTURE] * 2}, None, "key 'images': 2 images; a pair has one at most"),
        ({"text": "a", "videos": ["a.mp4"]}, None, "key 'videos': 1 videos"),
        ({"messages": CHAT}, None, "0 items for 1 image parts"),
        ({"messages": CHAT[:1], "images": [PICTURE]}, None, "key 'messages': a pair needs two .* found image"),
    ],
    ids=range(10),
)
def test_what_is_no_pair_is_refused(row: dict[str, Any], columns: dict[str, str] | None, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        pair_of(row, columns)


def write(folder: Path, rows: list[dict[str, Any]]) -> Path:
    PICTURE.save(folder / "a.png")
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_paths_are_resolved_below_the_data(tmp_path: Path) -> None:
    rows = load_pairs(write(tmp_path, [{"text": "a cat", "image": "a.png"}]))
    assert list(rows) == [{"text": "a cat", "image": str((tmp_path / "a.png").resolve())}]
    assert rows.modalities == ("text", "image")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a cat", "image": "b.png"}, "row 1, key 'image': no such file"),
        ({"text": "a cat", "image": "../b.png"}, "row 1, key 'image': .* lies outside"),
        ({"text": "a cat"}, "row 1, key 'text': a pair needs two"),
        ({"image": "a.png", "audio": "a.wav"}, "row 1, a pair of image and audio, the first row has text and image"),
    ],
)
def test_a_bad_row_is_named_before_training(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    path = write(tmp_path, [{"text": "a cat", "image": "a.png"}, row])
    with pytest.raises(ValueError, match=message):
        load_pairs(path)


def test_a_late_bad_row_holds_its_error(tmp_path: Path) -> None:
    good = {"text": "a cat", "image": "a.png"}
    rows = load_pairs(write(tmp_path, [good] * 20 + [{"text": "a dog", "image": None}]))
    assert "row 20, key 'text': a pair needs two" in str(rows[20]["error"])
    with pytest.raises(LayoutError, match="row 20"):
        pair_of(rows[20])
