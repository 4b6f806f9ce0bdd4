"""Rows are read until every term of the loss has what it needs, and no further."""

from typing import Any

import pytest

from chorus_moe.training.objectives.arguments import ObjectiveArguments
from chorus_moe.training.objectives.served import check_served, media_of

TEXT: dict[str, Any] = {"messages": [{"role": "user", "content": "text"}]}
IMAGE: dict[str, Any] = {"images": ["a.png"], "messages": []}
SOUND: dict[str, Any] = {"audio": ["a.wav"], "messages": []}


def turn(*parts: Any) -> dict[str, Any]:
    return {"messages": ["no mapping", {"role": "user"}, {"role": "document", "content": list(parts)}]}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (TEXT, set()),
        ({"images": [], "audio": None, "messages": []}, set()),
        (IMAGE, {"image"}),
        (SOUND, {"audio"}),
        (IMAGE | SOUND, {"image", "audio"}),
        (turn({"type": "image", "path": "a"}), {"image"}),
        (turn({"type": "image_url", "image_url": "a"}), {"image"}),
        (turn({"type": "input_image"}), {"image"}),
        (turn({"type": "audio"}), {"audio"}),
        (turn({"type": "audio_url"}), {"audio"}),
        (turn({"type": "input_audio"}), {"audio"}),
        (turn({"type": "text", "text": "image"}, "image", {"type": "video"}, {}), set()),
        (turn({"type": "text"}, {"type": "audio"}, {"type": "image"}), {"image", "audio"}),
        (IMAGE | turn({"type": "audio"}), {"image", "audio"}),
    ],
)
def test_media_lie_in_columns_and_in_parts(row: dict[str, Any], expected: set[str]) -> None:
    assert media_of(row) == expected


@pytest.mark.parametrize(
    ("weights", "rows", "read"),
    [
        # Nothing to look for: no row is read.
        ({}, [TEXT, IMAGE], 0),
        ({"masked_image_weight": 1.0}, [TEXT, SOUND, IMAGE, TEXT], 3),
        ({"masked_audio_weight": 1.0}, [TEXT, SOUND, IMAGE, TEXT], 2),
        ({"masked_image_weight": 1.0, "masked_audio_weight": 0.5}, [IMAGE, IMAGE, SOUND, TEXT], 3),
        ({"contrast_weight": 1.0}, [TEXT, SOUND, IMAGE], 2),
    ],
)
def test_rows_are_read_until_all_terms_are_served(weights: dict[str, float], rows: list[Any], read: int) -> None:
    seen: list[Any] = []
    check_served(ObjectiveArguments(**weights), (seen.append(row) or row for row in rows), "the rows")  # type: ignore[func-returns-value, arg-type]
    assert seen == rows[:read]


@pytest.mark.parametrize(
    ("weights", "rows", "message"),
    [
        ({"masked_image_weight": 0.25}, [TEXT, SOUND], "objectives.masked_image_weight=0.25: none of R has image to"),
        ({"masked_audio_weight": 0.5}, [IMAGE], "objectives.masked_audio_weight=0.5: none of R has audio to learn"),
        ({"masked_image_weight": 1.0, "masked_audio_weight": 2.0}, [IMAGE], "masked_audio_weight=2.0: none"),
        ({"masked_image_weight": 1.0, "masked_audio_weight": 2.0}, [], "masked_image_weight=1.0: none"),
        ({"contrast_weight": 0.1}, [TEXT], "objectives.contrast_weight=0.1: none of R has an image or sound"),
        ({"contrast_weight": 0.1, "masked_audio_weight": 2.0}, [IMAGE], "masked_audio_weight=2.0: none"),
    ],
)
def test_a_term_that_no_row_serves_is_named_with_its_weight(
    weights: dict[str, float], rows: list[Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_served(ObjectiveArguments(**weights), rows, "R")  # type: ignore[arg-type]
