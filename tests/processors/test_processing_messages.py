import re

import numpy as np
import pytest

from chorus_moe.processors import MediaError
from chorus_moe.processors.processing_messages import (
    WORD_JOINER,
    break_control_tokens,
    check_rendered,
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


def test_a_content_or_a_conversation_may_be_one_dict():
    part = {"type": "image", "image": "x.png"}
    assert prepare(part) == prepare([part])
    message = {"role": "user", "content": "x"}
    assert split_batch(message) == ([[message]], False)
    with pytest.raises(MediaError, match=r"sample 2, message 0: content is a string or a list of parts, found 3"):
        prepare(3)


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ({"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "image", "image": "a.png"}),
        ({"type": "audio_url", "audio_url": {"url": "a.wav"}}, {"type": "audio", "audio": "a.wav"}),
        ({"type": "audio_url", "audio_url": "a.wav"}, {"type": "audio", "audio": "a.wav"}),
        ({"type": "input_audio", "input_audio": {"data": "AAA=", "format": "mp3"}},
         {"type": "audio", "audio": "data:;base64,AAA="}),
    ],
)  # fmt: skip
def test_parts_of_other_apis_are_read(part, expected):
    assert prepare([part])[0]["content"] == [expected]


def test_control_tokens_are_text_in_tool_calls_and_thoughts_too():
    calls = [{"function": {"name": "f", "arguments": {"x<image>": "<image>", "n": 3}}}]
    message = {"role": "assistant", "content": "", "tool_calls": calls, "reasoning_content": "a</s>"}
    (found,) = prepare_conversation([message], {"image": [], "audio": []}, CONTROL, None, 0)
    broken = f"<{WORD_JOINER}image>"
    assert found["tool_calls"] == [{"function": {"name": "f", "arguments": {"x" + broken: broken, "n": 3}}}]
    assert found["reasoning_content"] == f"a<{WORD_JOINER}/s>"
    assert message["tool_calls"][0]["function"]["arguments"]["n"] == 3
    # Rows in numpy's format.
    (array,) = prepare_conversation(
        [{**message, "tool_calls": np.array(calls * 2)}], {"image": [], "audio": []}, CONTROL, None, 0
    )
    assert array["tool_calls"] == found["tool_calls"] * 2


PLAIN = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.mark.parametrize(
    "key", ["tool_calls", "function_call", "refusal", "reasoning_content", "reasoning", "thinking"]
)
def test_what_a_template_does_not_write_is_refused_by_name(key):
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": None, key: ["y"]}]
    with pytest.raises(MediaError, match=f"sample 1, message 1: {key}: the chat template does not write it"):
        check_rendered(PLAIN + "{{ enable_thinking }}", [[], messages])
    check_rendered(PLAIN + "{{ message." + key + " }}", [[], messages])
    # Tables fill the columns of other rows with None.
    check_rendered(PLAIN, [[{"role": "user", "content": "x", key: None}]])


@pytest.mark.parametrize("key", ["image", "images", "audio", "videos", "attachments"])
def test_media_beside_the_content_are_refused(key):
    with pytest.raises(MediaError, match=f"sample 0, message 0: {key} beside the content would be lost"):
        prepare_conversation([{"role": "user", "content": "x", key: np.ones(2)}], {}, CONTROL, None, 0)
    # Tables fill the columns of other rows with nothing.
    for nothing in (None, [], "", np.empty(0)):
        prepare_conversation([{"role": "user", "content": "x", key: nothing}], {}, CONTROL, None, 0)


@pytest.mark.parametrize(
    ("part", "lost"),
    [
        ({"type": "image", "image": "a.png", "audio": np.ones(3)}, "audio"),
        ({"type": "text", "text": "x", "image": "a.png"}, "image"),
        ({"type": "audio", "path": "a.wav", "image_url": "a.png"}, "image_url"),
        ({"type": "image_url", "image_url": {"url": "a.png"}, "input_audio": {"data": "AA"}}, "input_audio"),
    ],
)
def test_a_part_holds_one_medium(part, lost):
    with pytest.raises(MediaError, match=f"message 0: {lost} beside {part['type']} would be lost"):
        prepare([part])
    prepare([{**part, lost: None}])


@pytest.mark.parametrize("name", ["tools", "documents"])
def test_tools_and_documents_are_written_or_refused(name):
    with pytest.raises(MediaError, match=f"{name}: the chat template does not write it"):
        check_rendered(PLAIN, [[]], **{name: [{"name": "f"}]})
    check_rendered(PLAIN, [[]], **{name: None})
    check_rendered("{{ " + name + " }}", [[]], **{name: [{"name": "f"}]})


@pytest.mark.parametrize("given", ["what is it?", 5, None])
def test_what_is_no_list_of_messages_is_refused_by_its_type(given):
    with pytest.raises(MediaError, match=f"a conversation is a list of messages, found {type(given).__name__}"):
        split_batch(given)


@pytest.mark.parametrize("key", ["weight", "train", "training", "loss"])
@pytest.mark.parametrize("asked", [{"return_labels": True}, {"return_assistant_tokens_mask": True}])
def test_a_turn_that_is_not_to_be_learned_gets_no_labels_in_silence(processor, key, asked):
    def turns(value):
        return [{"role": "user", "content": "sum"}, {"role": "assistant", "content": "no", key: value}]

    options = {"tokenize": True, "return_dict": True, **asked}
    for value in (0, False, 0.5):
        with pytest.raises(MediaError, match=rf"sample 1, message 1: {key}={value!r}: only ChorusDataCollator leaves"):
            processor.apply_chat_template([turns(1), turns(value)], **options)
        # Without labels the key says nothing.
        processor.apply_chat_template([turns(1), turns(value)], tokenize=True, return_dict=True)
    for value in (1, True, None):
        assert processor.apply_chat_template(turns(value), **options)
