"""Answers do not depend on batch mates and need no media."""

from typing import Any

from chorus_moe import ChorusForConditionalGeneration, ChorusProcessor
from chorus_moe.training.answers import answer_rows, user_turn
from chorus_moe.training.evaluate import split_answer
from tests.training.conftest import make_row


def test_answers_are_the_same_alone_and_in_a_batch(
    model: ChorusForConditionalGeneration, processor: ChorusProcessor, rows: list[dict[str, Any]]
) -> None:
    prompts = [split_answer(row, 0)[0] for row in rows[:3]] + [user_turn("what is it?")]
    together = answer_rows(model, processor, prompts, max_new_tokens=5)
    alone = [answer_rows(model, processor, [prompt], max_new_tokens=5)[0] for prompt in prompts]
    assert together == alone
    assert len(together) == 4


def test_a_turn_shows_media_before_the_text() -> None:
    image, sound = make_row(0)["images"][0], make_row(1)["audio"][0]
    row = user_turn("which?", [image], [sound])
    assert [part["type"] for part in row["messages"][0]["content"]] == ["image", "audio", "text"]
    assert (row["images"], row["audio"]) == ([image], [sound])
