import re

import pytest

from chorus_moe.processors import MediaError
from chorus_moe.processors.processing_messages import (
    WORD_JOINER,
    break_control_tokens,
    prepare_conversation,
    split_batch,
)

CONTROL = re.compile("<image>|</s>")


def prepare(content, media=None, role="user"):
    messages = [{"role": role, "content": content}]
    return prepare_conversation(messages, {"image": [], "audio": [], **(media or {})}, CONTROL, None, 2)


def test_a_typed_control_token_becomes_text_whole_or_in_halves():
    broken = f"<{WORD_JOINER}image>"
    assert break_control_tokens("a <image> b", CONTROL) == f"a {broken} b"
    assert prepare("<image>")[0]["content"] == broken
    halves = prepare([{"type": "text", "text": "<ima"}, "ge>", {"type": "image", "image": "x.png"}])[0]["content"]
    assert halves == [{"type": "text", "text": broken}, {"type": "image", "image": "x.png"}]
    assert prepare("x", role="user</s>")[0]["role"] == f"user<{WORD_JOINER}/s>"


def test_media_given_beside_the_conversation_fill_the_empty_parts_in_order():
    content = [{"type": "image"}, {"type": "image", "path": "b.png"}, {"type": "image"}]
    filled = prepare(content, {"image": ["a.png", "c.png"]})[0]["content"]
    assert [part["image"] for part in filled] == ["a.png", "b.png", "c.png"]
    assert content[0] == {"type": "image"}


@pytest.mark.parametrize(
    ("content", "media", "reason"),
    [
        ([{"type": "video", "video": "x.mp4"}], {}, "message 0: unknown content .*'video'"),
        ([{"type": "text"}], {}, "message 0: unknown content"),
        ([{"type": "image", "image": "a", "url": "b"}], {}, "several sources: image, url"),
        ([{"type": "image"}], {"image": ["a", "b"]}, "found 1 image parts without data for 2 items"),
        ("text", {"audio": ["a"]}, "found 0 audio parts without data for 1 items"),
    ],
)
def test_a_bad_message_names_its_sample(content, media, reason):
    with pytest.raises(MediaError, match=rf"sample 2.*{reason}"):
        prepare(content, media)


def test_one_conversation_and_a_batch_are_told_apart():
    message = {"role": "user", "content": "x"}
    assert split_batch([message]) == ([[message]], False)
    assert split_batch([[message], [message]]) == ([[message], [message]], True)
    with pytest.raises(MediaError, match="empty"):
        split_batch([])
