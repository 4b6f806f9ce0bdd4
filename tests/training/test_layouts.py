"""Rows of other projects become the row that one would write by hand; what would be lost is refused by name."""

from typing import Any

import numpy as np
import pytest

from chorus_moe.training.layouts import LayoutError, convert, explain, is_learned, standard_row

PLAIN = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "four"}]
SYSTEM = {"role": "system", "content": "be brief"}
IMAGE, AUDIO = {"type": "image"}, {"type": "audio"}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def turns(*content: Any) -> list[dict[str, Any]]:
    """A question made of parts, and the answer."""
    return [{"role": "user", "content": list(content)}, PLAIN[1]]


def row(messages: Any, images: Any = (), audio: Any = (), **rest: Any) -> dict[str, Any]:
    return {"messages": messages, "images": list(images), "audio": list(audio), **rest}


SHARE = [{"from": "human", "value": "<image>\nhi <audio>"}, {"from": "gpt", "value": "four"}]
# Name -> the row of a project, and ours.
KNOWN: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ours": (row(turns(IMAGE, text("hi")), ["a"]), row(turns(IMAGE, text("hi")), ["a"])),
    "typed marker": (row(turns(IMAGE, text("<image> hi")), ["a"]), row(turns(IMAGE, text("<image> hi")), ["a"])),
    "openai": ({"messages": [SYSTEM, *PLAIN]}, row([SYSTEM, *PLAIN])),
    "llava": (
        {"id": 7, "image": "a.png", "conversations": [{"from": "human", "value": "<image>\nhi"}, SHARE[1]]},
        row(turns(IMAGE, text("\nhi")), ["a.png"], id=7),
    ),
    "llama-factory sharegpt": (
        {"conversations": SHARE, "system": "be brief", "images": ["a"], "audios": ["b"], "tools": ""},
        row([SYSTEM, *turns(IMAGE, text("\nhi "), AUDIO)], ["a"], ["b"]),
    ),
    "llama-factory alpaca": (
        {"instruction": "add", "input": "1 2", "output": "3", "history": [["hi", "four"]], "system": "be brief"},
        row([SYSTEM, *PLAIN, {"role": "user", "content": "add\n1 2"}, {"role": "assistant", "content": "3"}]),
    ),
    "alpaca": ({"instruction": "hi", "input": "", "output": "four"}, row(PLAIN)),
    "ms-swift messages": (
        {"messages": [{"role": "user", "content": "<image><image>hi"}, PLAIN[1]], "images": ["a", "b"]},
        row(turns(IMAGE, IMAGE, text("hi")), ["a", "b"]),
    ),
    "ms-swift query": (
        {"query": "hi<audio>", "response": "four", "audios": ["b"]},
        row(turns(text("hi"), AUDIO), (), ["b"]),
    ),
    "ms-swift history": ({"query": "hi", "response": "four", "history": [["hi", "four"]]}, row([*PLAIN, *PLAIN])),
    "trl texts": ({"prompt": "hi", "completion": "four"}, row(PLAIN)),
    "trl turns": ({"prompt": [SYSTEM, PLAIN[0]], "completion": [PLAIN[1]]}, row([SYSTEM, *PLAIN])),
    "trl images without marker": (
        {"messages": PLAIN, "images": ["a", "b"]},
        row(turns(IMAGE, IMAGE, text("hi")), ["a", "b"]),
    ),
    "one in front, one marked": (
        {"messages": [{"role": "user", "content": "<audio>hi"}, PLAIN[1]], "images": "a", "audio": ["b"]},
        row(turns(IMAGE, AUDIO, text("hi")), ["a"], ["b"]),
    ),
    "one picture": (row(turns(IMAGE), "x") | {"images": "a.png"}, row(turns(IMAGE), ["a.png"])),
    "speakers with weights": (
        {"conversations": [{"from": "user", "value": "hi"}, {"from": "assistant", "value": "four", "weight": 0}]},
        row([PLAIN[0], {**PLAIN[1], "weight": 0}]),
    ),
}


@pytest.mark.parametrize("name", KNOWN)
def test_a_row_of_another_project_is_read_as_ours(name: str) -> None:
    theirs, ours = KNOWN[name]
    found = standard_row(theirs)
    assert found == ours
    # Whoever reads rows again, as the collator does after a data set, changes nothing.
    assert standard_row(found) == ours


def test_arrays_of_numpy_are_lists_and_pictures_stay_arrays() -> None:
    picture = np.zeros((4, 5, 3), np.uint8)
    turns_of_numpy = np.array(
        [{"role": np.str_("user"), "content": np.array([IMAGE], dtype=object)}, PLAIN[1]], dtype=object
    )
    for images in (picture, np.stack([picture]), np.array([picture, None], dtype=object)[:1]):
        found = standard_row({"messages": turns_of_numpy, "images": images})
        assert found["messages"] == turns(IMAGE)
        assert [image.shape for image in found["images"]] == [(4, 5, 3)]


def test_columns_of_any_name_are_given_by_a_mapping() -> None:
    theirs = {"dialogue": PLAIN, "photo": "a"}
    assert standard_row(theirs, {"messages": "dialogue", "images": "photo"}) == row(turns(IMAGE, text("hi")), ["a"])
    with pytest.raises(
        LayoutError, match=r"key 'talk': data.columns takes it for 'messages', the row has \['dialogue'"
    ):
        standard_row(theirs, {"messages": "talk"})


def test_markers_can_be_text() -> None:
    theirs = {"messages": [{"role": "user", "content": "what does <audio> do?"}, PLAIN[1]]}
    found = standard_row(theirs, markers="text")
    assert found == row(turns(text("what does <audio> do?")))
    assert standard_row(found) == found


REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"messages": [{"role": "user", "content": "<image>hi"}, PLAIN[1]]},
        "'images': 0 items for 0 image parts and 1 <image>",
    ),
    ({"messages": [{"role": "user", "content": "<audio>hi"}, PLAIN[1]], "audio": ["a", "b"]}, "2 items .* 1 <audio>"),
    ({"messages": [{"role": "user", "content": "<video>hi"}, PLAIN[1]]}, "'videos': 0 items .* 1 <video>"),
    ({"messages": PLAIN, "videos": ["a"]}, "'videos': 1 videos, which no Chorus model takes"),
    ({"messages": PLAIN, "image": "a", "images": ["b"]}, "'images' and 'image' both hold images"),
    ({"messages": PLAIN, "tools": "[{}]"}, "key 'tools'"),
    ({"messages": [SYSTEM, *PLAIN], "system": "be long"}, "key 'system': the turns begin with a system turn"),
    ({"messages": [PLAIN[1]], "images": ["a"]}, "in front of a user's turn, and there is none"),
    ({"conversations": [{"from": "function_call", "value": "{}"}]}, "turn 0: unknown speaker 'function_call'"),
    ({"conversations": "hi"}, "key 'conversations': expected a list of turns, found 'hi'"),
    ({"prompt": "hi", "chosen": "a", "rejected": "b"}, "key 'chosen': pairs .* DPOTrainer"),
    ({"prompt": "hi"}, "key 'prompt': a prompt without a `completion`"),
    ({"text": "hi"}, "key 'text': plain text has no turns"),
    ({"dialogue": PLAIN}, r"found None; the row has \['dialogue'\]"),
    ({"prompt": "hi", "completion": [PLAIN[1]]}, "'prompt' and 'completion': .* found str and list"),
]


@pytest.mark.parametrize(("theirs", "message"), REFUSED)
def test_what_would_be_lost_is_refused_by_its_key(theirs: dict[str, Any], message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        standard_row(theirs)


def test_a_line_says_what_was_recognised() -> None:
    assert convert(row(turns(IMAGE), ["a"])).notes == []
    line = explain([KNOWN["llava"][0], KNOWN["trl images without marker"][0], {"text": "hi"}])
    assert set(line.split("; ")) == {
        "ShareGPT conversations",
        "column 'image' is 'images'",
        "not used: id",
        "<image> in the text is the place of a medium",
        "media without a marker stand in front of the user's first turn",
    }


@pytest.mark.parametrize(
    ("turn", "expected"), [({}, True), ({"weight": 1}, True), ({"weight": 0}, False), ({"training": False}, False)]
)
def test_a_turn_is_learned_or_not(turn: dict[str, Any], expected: bool) -> None:
    assert is_learned(turn) is expected
    assert is_learned({"weight": None, **turn}) is expected
    assert not is_learned({"train": False}) and not is_learned({"loss": False}) and is_learned({"train": True})
    with pytest.raises(LayoutError, match=r"weight=0.5 of a turn"):
        is_learned({"weight": 0.5})
    with pytest.raises(LayoutError, match=r"train_detail=\[\] of a turn; write weight: 0"):
        is_learned({"train_detail": [], "train": True})


DOCUMENTS: list[tuple[dict[str, Any], Any]] = [
    ({"text": "a b"}, "a b"),
    ({"text": "a <image> b", "images": ["i"]}, ["a ", "image", " b"]),
    ({"text": "a", "image": "i", "audio": ["c"]}, ["image", "audio", "a"]),
    ({"images": ["i", "j"]}, ["image", "image"]),
    ({"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}], "images": ["i"]},
     ["image", "a"]),
]  # fmt: skip


@pytest.mark.parametrize(("row", "content"), DOCUMENTS)
def test_a_row_without_an_answer_is_a_document(row: dict[str, Any], content: Any) -> None:
    (turn,) = standard_row(row, documents=True)["messages"]
    found = turn["content"]
    if isinstance(found, list):
        found = [part.get("text", part["type"]) for part in found]
    assert turn["role"] == "document" and found == content


def test_a_row_with_an_answer_stays_a_conversation() -> None:
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    assert standard_row(row, documents=True) == standard_row(row)
    with pytest.raises(LayoutError, match="2 turns and none of them the assistant's; a document is one turn"):
        standard_row({"messages": [{"role": "user", "content": "a"}] * 2}, documents=True)
