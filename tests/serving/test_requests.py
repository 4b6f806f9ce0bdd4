"""What a request may hold, at the ends of each range."""

from typing import Any

import pytest

from chorus_moe.processors.processing_limits import MediaError
from chorus_moe.serving.requests import NOTHING, REFUSED, check_message, check_part, check_request

ASKED: dict[str, Any] = {"messages": [{"role": "user", "content": "?"}]}


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0}, {"temperature": 2.0}, {"top_p": 0.0}, {"top_p": 1}, {"frequency_penalty": -0.9},
        {"frequency_penalty": 2}, {"max_tokens": 1}, {"max_completion_tokens": 1}, {"seed": 0}, {"seed": -(2**63)},
        {"seed": 2**64 - 1}, {"stream": True}, {"stream": False}, {"stream": None},
        {"chat_template_kwargs": {"enable_thinking": None}},
        {"chat_template_kwargs": {"enable_thinking": False}}, {"chat_template_kwargs": None}, {"temperature": None},
    ],
    ids=str,
)  # fmt: skip
def test_ends_of_a_range_are_in_it(fields: dict[str, Any]) -> None:
    check_request(ASKED | fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -0.01}, "temperature=-0.01: expected a number from 0 to 2"),
        ({"temperature": 2.01}, "temperature=2.01"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_p": 1.01}, "top_p=1.01: expected a number from 0 to 1"),
        ({"top_p": "1"}, "top_p='1'"),
        ({"frequency_penalty": -1}, "frequency_penalty=-1: expected a number from -0.9 to 2"),
        ({"max_tokens": 0}, "max_tokens=0: expected a whole number of tokens from 1 on"),
        ({"max_tokens": True}, "max_tokens=True"),
        ({"max_completion_tokens": 1.5}, "max_completion_tokens=1.5"),
        ({"temperature": True}, "temperature=True"),
        ({"top_p": False}, "top_p=False"),
        ({"stream": "false"}, "stream='false': expected true or false"),
        ({"chat_template_kwargs": {"enable_thinking": 0}}, "enable_thinking=0: expected true or false"),
        ({"seed": 0.5}, "seed=0.5: expected a whole number"),
        ({"seed": True}, "seed=True"),
        ({"seed": 2**64}, "seed=18446744073709551616: expected a whole number of at most 64 bits"),
        ({"seed": -(2**63) - 1}, "seed=-9223372036854775809"),
        ({"chat_template_kwargs": ["enable_thinking"]}, r"chat_template_kwargs: \['enable_thinking'\]"),
        ({"chat_template_kwargs": {"tools": 1, "images": 2}}, r"chat_template_kwargs: \['images', 'tools'\]"),
        ({"messages": []}, "messages: expected a list of at least one message"),
        ({"messages": {}}, "messages: expected a list"),
    ],
)
def test_beyond_a_range_is_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_request(ASKED | fields)


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_meaning_here_is_refused_where_it_asks_for_something(name: str) -> None:
    for nothing in NOTHING:
        check_request(ASKED | {name: nothing})
    with pytest.raises(ValueError, match=f"{name}=yes: not supported here"):
        check_request(ASKED | {name: "yes"})


@pytest.mark.parametrize("content", [None, "", "?", []])
def test_contents_of_a_message(content: object) -> None:
    check_message({"role": "assistant", "content": content}, 0)


@pytest.mark.parametrize("message", ["hello", {"content": "?"}, {"role": 1, "content": "?"}])
def test_a_message_is_an_object_with_a_role(message: object) -> None:
    with pytest.raises(MediaError, match="message 3: expected an object with a role"):
        check_message(message, 3)


@pytest.mark.parametrize(
    "part",
    [
        {"type": "text", "text": "?"},
        {"type": "image_url", "image_url": "data:image/png;base64,AA=="},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}},
        {"type": "audio_url", "audio_url": {"url": "data:audio/wav;base64,AA=="}},
        {"type": "input_audio", "input_audio": {"data": "AA==", "format": "wav"}},
    ],
)
def test_parts_of_a_message(part: dict[str, Any]) -> None:
    check_part(part, "message 0, part 0")


@pytest.mark.parametrize(
    ("part", "message", "modality"),
    [
        ("text", "message 0, part 1: unknown type None", "text"),
        (
            {"type": "video_url"},
            "'video_url'; choose from text, image_url, audio_url, input_audio",
            "text",
        ),
        ({"type": "text", "text": 3}, "text holds no text", "text"),
        ({"type": "input_audio", "input_audio": {"format": "wav"}}, "input_audio holds no data", "text"),
        ({"type": "image_url", "image_url": "http://a/b.png"}, "nothing is fetched.*found 'http://a/b.png'", "image"),
        ({"type": "audio_url", "audio_url": {"url": "/etc/hosts"}}, "nothing is fetched", "audio"),
    ],
)
def test_a_part_that_cannot_be_used_is_named_by_its_number(part: object, message: str, modality: str) -> None:
    with pytest.raises(MediaError, match=message) as caught:
        check_part(part, "message 0, part 1")
    assert caught.value.modality == modality
