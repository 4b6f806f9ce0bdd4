"""Pieces of a growing text against the text that is decoded at once."""

import pytest

from chorus_moe.serving.growing_text import GrowingText


def decode(tokens: list[int]) -> str:
    return bytes(tokens).decode("utf-8", errors="replace")


@pytest.mark.parametrize("text", ["four", "façade", "日本 🎈 ok", "🎈"])
def test_pieces_are_the_text_and_hold_no_half_character(text: str) -> None:
    growing = GrowingText(decode)
    pieces = [growing.add(byte) for byte in text.encode()]
    assert "".join(pieces) == text and growing.rest() == ""
    assert "\ufffd" not in "".join(pieces)
    assert len([piece for piece in pieces if piece]) == len(text)


def test_bytes_that_stay_no_character_are_shown_at_the_end_or_with_the_next() -> None:
    growing = GrowingText(decode)
    assert [growing.add(byte) for byte in (65, 0xF0)] == ["A", ""]
    assert growing.rest() == "\ufffd" and growing.rest() == ""
    growing = GrowingText(decode)
    assert [growing.add(byte) for byte in (0xF0, 66)] == ["", "\ufffdB"]


def test_what_was_shown_is_not_taken_back() -> None:
    growing = GrowingText(lambda tokens: {1: "a b", 2: "ab", 3: "a bc"}[len(tokens)])
    assert [growing.add(0) for _ in range(3)] == ["a b", "", "c"]
