"""Messages: every form that is taken, every one that is refused, and the limits of a template at both ends."""

import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from chorus_moe.processors import MediaError, processing_messages
from chorus_moe.processors.processing_messages import (
    WORD_JOINER,
    break_control_tokens,
    check_rendered,
    default_chat_template,
    prepare_conversation,
    split_batch,
)

CONTROL = re.compile("<image>|</s>")
SAY: dict[str, Any] = {"role": "user", "content": "x"}


def prepare(content: Any, rate: int | None = None, media: dict | None = None, **message: Any) -> Any:
    given = [{"role": "user", "content": content, **message}]
    return prepare_conversation(given, {"image": [], "audio": []} | (media or {}), CONTROL, rate, 2)[0]


def test_a_batch_is_what_holds_no_message_itself():
    wrapped = SimpleNamespace(messages=[SAY])
    assert split_batch(wrapped) == ([[SAY]], False)
    assert split_batch((SAY, SAY)) == ([[SAY, SAY]], False)
    assert split_batch([wrapped, [SAY]]) == ([[SAY], [SAY]], True)
    assert split_batch(np.array([SAY], dtype=object)) == ([[SAY]], False)
    for given, reason in (("x", "found str"), (5, "found int"), ([], "the conversation is empty")):
        with pytest.raises(MediaError, match=f"{reason}$") as caught:
            split_batch(given)
        assert caught.value.modality == "text"


def test_a_token_is_broken_in_every_string_of_a_value():
    broken = f"<{WORD_JOINER}/s>"
    given = {"a </s>": ["</s>", ("</s>", 5), np.array(["</s>"])], "b": None, "c": 1.5}
    expected = {f"a {broken}": [broken, [broken, 5], [broken]], "b": None, "c": 1.5}
    assert break_control_tokens(given, CONTROL) == expected


@pytest.mark.parametrize("message", [5, {"content": "x"}, {"role": 3, "content": "x"}, "text"])
def test_a_message_has_a_role(message: Any):
    with pytest.raises(MediaError, match="^sample 2, message 1: a message is a dict with 'role' and 'content', found"):
        prepare_conversation([SAY, message], {}, CONTROL, None, 2)
    with pytest.raises(MediaError, match="message 0: content is a string or a list of parts, found 5$"):
        prepare(5)


@pytest.mark.parametrize(
    ("own", "of_call", "expected"), [(None, None, None), (None, 8_000, 8_000), (4_000, 8_000, 4_000)]
)
@pytest.mark.parametrize("kind", [np.asarray, torch.tensor, list, tuple])
def test_samples_have_the_rate_of_their_part_or_of_the_call(kind: Any, own: Any, of_call: Any, expected: Any):
    part = {"type": "audio", "audio": kind([0.1, 0.2])} | ({} if own is None else {"sampling_rate": own})
    found = prepare([part], of_call)["content"][0]["audio"]
    assert set(found) == {"array", "sampling_rate"} and found["sampling_rate"] == expected
    # A file brings its own, and a picture has none.
    assert prepare([{"type": "audio", "path": "a.wav"}], 8_000)["content"] == [{"type": "audio", "audio": "a.wav"}]
    array = np.zeros((2, 2))
    assert prepare([{"type": "image", "image": array}], 8_000)["content"][0]["image"] is array


def test_texts_that_touch_are_one_and_keep_what_stands_beside_them():
    parts = [{"type": "text", "text": "a", "mark": 1}, "b", {"type": "image", "image": "i"}, "c", "d"]
    texts = [part.get("text") for part in prepare(parts)["content"]]
    assert texts == ["ab", None, "cd"] and prepare(parts)["content"][0]["mark"] == 1
    with pytest.raises(MediaError, match="unknown content"):
        prepare([{"type": "text", "text": 5}])


@pytest.mark.parametrize("key", ["url", "path", "base64", "bytes"])
def test_a_part_holds_its_medium_under_one_of_several_keys(key: str):
    for kind in ("image", "audio"):
        expected = "data:;base64,AA" if key == "base64" else "AA"
        assert prepare([{"type": kind, key: "AA"}])["content"] == [{"type": kind, kind: expected}]
        with pytest.raises(MediaError, match=f"one {kind} part holds several sources: {kind}, {key}$") as caught:
            prepare([{"type": kind, kind: "x", key: "AA"}])
        assert caught.value.modality == kind


def test_items_beside_a_conversation_are_as_many_as_parts_without_data():
    slot = {"type": "image"}
    assert prepare([slot])["content"] == [{"type": "image", "image": None}]
    for items, found in ((["a"], 2), (["a", "b", "c"], 2)):
        with pytest.raises(
            MediaError, match=f"^sample 2: found {found} image parts without data for {len(items)} items"
        ):
            prepare([slot, slot], media={"image": items})
    queue = ["a", "b"]
    prepare([slot, slot], media={"image": queue})
    assert queue == ["a", "b"]


def test_media_beside_the_content_are_lost_unless_there_are_none():
    for key in processing_messages.MEDIA_KEYS:
        for value in ("x", ["x"], 5):
            with pytest.raises(MediaError, match=f"message 0: {key} beside the content would be lost"):
                prepare("x", **{key: value})
        for nothing in (None, [], "", ()):
            prepare("x", **{key: nothing})


@pytest.mark.parametrize("key", ["tool_calls", "function_call", "refusal", "documents"])
def test_what_a_message_says_besides_is_written_by_a_template_that_names_it(key: str):
    told = [[SAY], [SAY, SAY | {key: [1]}]]
    check_rendered(f"{{{{ message.{key} }}}}", told)
    check_rendered("", [[SAY | {key: None}], [SAY | {key: []}]])
    for template in ("", f"{{{{ message.{key}s }}}}", f"my_{key}"):
        with pytest.raises(MediaError, match=f"^sample 1, message 1: {key}: the chat template does not write it"):
            check_rendered(template, told)


@pytest.mark.parametrize("written", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize("given", ["reasoning_content", "reasoning", "thinking"])
def test_a_template_that_writes_one_name_of_thoughts_writes_all(written: str, given: str):
    check_rendered(f"{{{{ message.{written} }}}}", [[SAY | {given: "hm"}]])
    with pytest.raises(MediaError, match=f"{given}: the chat template does not write it"):
        check_rendered("{{ message.content }}", [[SAY | {given: "hm"}]])


@pytest.mark.parametrize("value", [0, False, 0.5, 2])
@pytest.mark.parametrize("key", ["weight", "train", "training", "loss"])
def test_a_turn_that_is_not_learned_has_no_labels(key: str, value: Any):
    told = [[SAY], [SAY | {key: 1}, SAY | {key: value}]]
    check_rendered("", told)
    check_rendered("", [[SAY | {key: 1}, SAY | {key: True}, SAY | {key: None}]], True)
    with pytest.raises(MediaError, match=rf"^sample 1, message 1: {key}={value!r}: only ChorusDataCollator"):
        check_rendered("", told, True)


def test_a_template_writes_the_tokens_of_its_processor():
    found = default_chat_template("<i>", "<a>")
    assert "'<i>'" in found and "'<a>'" in found and "<image>" not in found and "<audio>" not in found
