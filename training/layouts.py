"""Rows in the layouts of other projects as rows of ours: `messages`, `images` and `audio`.

Recognised are OpenAI's and TRL's `messages`, TRL's `prompt` and `completion`, the `conversations` of ShareGPT and
LLaVA, the `instruction`, `input`, `output`, `history` and `system` of Alpaca and LLaMA-Factory, and ms-swift's `query`
and `response`; media in columns of other names, and their places as `<image>` and `<audio>` in the text.

Unusual here:
- only a content that is a string has markers: in a list of parts the parts say where media are, and a text is a text;
- what cannot be converted without loss is an error that names the key: nothing of a row is dropped in silence.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from chorus_moe.processors.processing_media import MEDIA

# Our column -> the names that other projects give it, ours first.
MEDIA_COLUMNS = {
    "images": ("images", "image"),
    "audio": ("audio", "audios"),
    "videos": ("videos", "video"),
}
COLUMN_OF = {name: medium.column for name, medium in MEDIA.items()} | {"video": "videos"}
MARKER = re.compile("<(image|audio|video)>")
MARKER_RULES = ("media", "text")
# What other projects call the speakers.
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "system": "system",
    "observation": "tool",
    "tool": "tool",
}
# Columns of the layouts -> what the layout is called. The first whose columns a row has all of is taken.
LAYOUTS = {
    ("messages",): "messages",
    ("conversations",): "ShareGPT conversations",
    ("prompt", "completion"): "prompt and completion (TRL)",
    ("instruction", "output"): "instruction and output (Alpaca, LLaMA-Factory)",
    ("query", "response"): "query and response (ms-swift)",
}
# Columns that the layouts above bring along.
ALONG = ("system", "history", "input", "tools")
# What a row is an example of, as in "parity" (see `tasks/`); it stays with the row.
TASK = "task"
# The role of a turn that is a whole row: its parts are written without words of a chat around them, and all its text is
# learned, and its end.
DOCUMENT = "document"
AS_DOCUMENTS = "or learn all of it with data.documents=true"
REFUSED = {
    "chosen": "pairs of a better and a worse answer are for TRL's DPOTrainer, not for supervised training",
    "text": "plain text has no turns, so nothing says what is to be learned; write it as `messages`, " + AS_DOCUMENTS,
    "input_ids": "token ids, as `cache-features` writes them, are for training; give the rows that they were made of",
    "prompt": "a prompt without a `completion` holds no answer to learn",
}


class LayoutError(ValueError):
    """A row that cannot be read as one of ours; the message begins with the key."""


class Converted(NamedTuple):
    """A row of ours, and what was recognised in words."""

    row: dict[str, Any]
    notes: list[str]


def standard_row(
    row: Mapping[str, Any],
    columns: Mapping[str, str] | None = None,
    markers: str = "media",
    documents: bool = False,
) -> dict[str, Any]:
    """The row with `messages`, `images` and `audio`; one that is ours already stays as it is.

    Raises:
        LayoutError: what cannot be converted without loss, by its key.
    """
    return convert(row, columns, markers, documents).row


def convert(
    row: Mapping[str, Any],
    columns: Mapping[str, str] | None = None,
    markers: str = "media",
    documents: bool = False,
) -> Converted:
    """`standard_row`, with what was recognised.

    Args:
        columns: our name of a column -> its name in the row.
        markers: what `<image>` and `<audio>` in a string are: the places of "media", or "text".
        documents: rows of `text`, of media alone, and of one turn that is not the assistant's are documents.
    """
    if isinstance(row.get("error"), LayoutError):
        raise row["error"]
    if markers not in MARKER_RULES:
        raise ValueError(f"media_markers={markers!r}; choose from {list(MARKER_RULES)}")
    values = {name: _plain(value) for name, value in _renamed(row, columns or {}).items()}
    if documents:
        values = _with_turn(values)
    layout = next((names for names in LAYOUTS if all(values.get(name) is not None for name in names)), None)
    if layout is None:
        refused = next((name for name in REFUSED if values.get(name) is not None), None)
        if refused is not None:
            raise LayoutError(f"key {refused!r}: {REFUSED[refused]}")
        raise LayoutError(
            f"key 'messages': expected a list of turns, found None; the row has {sorted(row)}. A column of another "
            "name is given by data.columns, as in {messages: dialogue}"
        )
    notes = [LAYOUTS[layout]] if layout != ("messages",) else []
    if values.get("tools"):
        raise LayoutError("key 'tools': definitions of tools are not rendered, so calls of them cannot be learned")
    messages = _with_system(_turns(values, layout), values.get("system"))
    if documents:
        messages = _as_document(messages, notes)
    media = {column: _media(values, column, notes) for column in MEDIA_COLUMNS}
    if media["videos"]:
        raise LayoutError(f"key 'videos': {len(media['videos'])} videos, which no Chorus model takes")
    messages = _placed(messages, media, markers, notes)
    taken = {*layout, *ALONG, *(name for names in MEDIA_COLUMNS.values() for name in names)}
    rest = {name: value for name, value in values.items() if name not in taken}
    if unused := sorted(rest.keys() - {TASK}):
        notes.append(f"not used: {', '.join(unused)}")
    del media["videos"]
    return Converted({**rest, "messages": messages, **media}, notes)


def explain(
    rows: Iterable[Mapping[str, Any]],
    columns: Mapping[str, str] | None = None,
    markers: str = "media",
    documents: bool = False,
) -> str:
    """What was recognised in some rows, in a line; empty for rows of ours."""
    notes: dict[str, None] = {}
    for row in rows:
        try:
            notes |= dict.fromkeys(convert(row, columns, markers, documents).notes)
        # Named, with its number, by whoever reads the rows.
        except LayoutError:
            continue
    return "; ".join(notes)


def _renamed(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    for ours, theirs in columns.items():
        if theirs not in row:
            raise LayoutError(f"key {theirs!r}: data.columns takes it for {ours!r}, the row has {sorted(row)}")
    from_elsewhere = set(columns.values())
    kept = {name: value for name, value in row.items() if name not in from_elsewhere and name not in columns}
    return kept | {ours: row[theirs] for ours, theirs in columns.items()}


def _plain(value: Any) -> Any:
    """Lists instead of the arrays of objects that a table in numpy format holds; arrays of numbers stay."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "OUS":
        value = value.tolist()
    if isinstance(value, np.generic) and value.dtype.kind in "US":
        return value.item()
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


def _turns(values: Mapping[str, Any], layout: tuple[str, ...]) -> list[Any]:
    """The turns of a row, each with `role` and `content`."""
    if layout in (("messages",), ("conversations",)):
        turns = values[layout[0]]
        if not isinstance(turns, list):
            raise LayoutError(f"key {layout[0]!r}: expected a list of turns, found {turns!r:.60}")
        return [_turn(turn, layout[0], number) for number, turn in enumerate(turns)]
    question, answer = values[layout[0]], values[layout[1]]
    if isinstance(question, list) and isinstance(answer, list):
        return [*question, *answer]
    if not isinstance(question, str) or not isinstance(answer, str):
        kinds = f"{type(question).__name__} and {type(answer).__name__}"
        raise LayoutError(
            f"keys {layout[0]!r} and {layout[1]!r}: expected two texts, or two lists of turns, found {kinds}"
        )
    # Alpaca puts what an instruction is about into a column of its own.
    question = "\n".join(filter(None, (question, values.get("input"))))
    pairs = [*(values.get("history") or []), (question, answer)]
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for pair in pairs for role, text in zip(roles, pair, strict=True)]


def _turn(turn: Any, key: str, number: int) -> Any:
    """A turn with `role` and `content` in place of ShareGPT's `from` and `value`."""
    if not isinstance(turn, Mapping) or turn.get("from") is None:
        return turn
    rest = {name: value for name, value in turn.items() if name not in ("from", "value", "role", "content")}
    if turn["from"] not in ROLES:
        raise LayoutError(f"key {key!r}, turn {number}: unknown speaker {turn['from']!r}; known are {', '.join(ROLES)}")
    return {**rest, "role": ROLES[turn["from"]], "content": turn.get("value")}


def _with_turn(values: dict[str, Any]) -> dict[str, Any]:
    """A row of `text`, or of media alone, with a turn that holds it."""
    if any(all(values.get(name) is not None for name in names) for names in LAYOUTS):
        return values
    rest, text = {name: value for name, value in values.items() if name != "text"}, values.get("text")
    if text is None and not any(rest.get(name) is not None for names in MEDIA_COLUMNS.values() for name in names):
        return values
    return {**rest, "messages": [{"role": DOCUMENT, "content": text or ""}]}


def _as_document(turns: list[Any], notes: list[str]) -> list[Any]:
    """The one turn of a row as a document; rows with an answer stay as they are."""
    roles = [turn.get("role") for turn in turns if isinstance(turn, Mapping)]
    if "assistant" in roles or not roles:
        return turns
    if len(turns) > 1:
        raise LayoutError(
            f"key 'messages': {len(turns)} turns and none of them the assistant's; a document is one turn, whose parts "
            "are in their order"
        )
    notes.append("rows without an answer are documents, all of whose text is learned")
    return [{**turns[0], "role": DOCUMENT}]


def _with_system(turns: list[Any], system: Any) -> list[Any]:
    if not system:
        return turns
    if turns and isinstance(turns[0], Mapping) and turns[0].get("role") == "system":
        raise LayoutError("key 'system': the turns begin with a system turn already")
    return [{"role": "system", "content": system}, *turns]


def _media(values: Mapping[str, Any], column: str, notes: list[str]) -> list[Any]:
    """The items of a column, whatever its name is and whether it holds one or a list."""
    found = [name for name in MEDIA_COLUMNS[column] if values.get(name) is not None and len_of(values[name])]
    if len(found) > 1:
        raise LayoutError(f"keys {found[0]!r} and {found[1]!r} both hold {column}")
    if not found:
        return []
    items = values[found[0]]
    if found[0] != column:
        notes.append(f"column {found[0]!r} is {column!r}")
    if isinstance(items, np.ndarray):
        # Pictures of one size, or clips of one length, are stacked by numpy.
        items = list(items) if items.ndim == (4 if column == "images" else 2) else [items]
    return list(items) if isinstance(items, list | tuple) else [items]


def len_of(value: object) -> int:
    """Items of a column that may hold a single one."""
    return len(value) if isinstance(value, list | tuple) else 1


def _placed(messages: list[Any], media: Mapping[str, Sequence[Any]], rule: str, notes: list[str]) -> list[Any]:
    """The messages with a part for each item that a marker stands for."""
    contents = [turn.get("content") for turn in messages if isinstance(turn, Mapping)]
    parts = [
        part.get("type") for content in contents if isinstance(content, list) for part in content if _is_bare(part)
    ]
    texts = [content for content in contents if isinstance(content, str)]
    marked = [name for text in texts for name in MARKER.findall(text)] if rule == "media" else []
    is_plain = not any(isinstance(content, list) for content in contents)
    kinds, in_front = set(), []
    for kind, column in COLUMN_OF.items():
        items, places, markers = len(media[column]), parts.count(kind), marked.count(kind)
        # Every item has a part: a marker is something that somebody typed.
        if items == places and (items or not markers):
            continue
        if markers and items == places + markers:
            kinds.add(kind)
        elif items and not markers and not places and is_plain:
            in_front += [{"type": kind}] * items
        # Without markers it is a mistake in our own layout, which `find_problem` and the processor describe.
        elif markers:
            raise LayoutError(
                f"key {column!r}: {items} items for {places} {kind} parts and {markers} <{kind}> in the text of "
                "'messages'. Where such a marker is only text, set data.media_markers to text"
            )
    if kinds:
        notes.append(f"{' and '.join(f'<{kind}>' for kind in sorted(kinds))} in the text is the place of a medium")
        messages = [_split(turn, kinds) for turn in messages]
    if in_front:
        return _in_front(messages, in_front, notes)
    return messages if rule == "media" else [_as_parts(turn) for turn in messages]


def _is_bare(part: Any) -> bool:
    """Whether a part takes its medium from a column. Arrow fills missing keys with None."""
    # `sampling_rate` describes data without being any.
    return isinstance(part, Mapping) and all(
        value is None for key, value in part.items() if key not in ("type", "sampling_rate")
    )


def _split(turn: Any, kinds: set[str]) -> Any:
    """The turn with a part for each marker of these kinds; the text around it keeps every character."""
    if not isinstance(turn, Mapping) or not isinstance(turn.get("content"), str):
        return turn
    pieces = re.split(f"<({'|'.join(sorted(kinds))})>", turn["content"])
    if len(pieces) == 1:
        return turn
    # Every other piece is the name of a marker.
    content = [{"type": piece} if index % 2 else {"type": "text", "text": piece} for index, piece in enumerate(pieces)]
    return {**turn, "content": [part for part in content if part.get("text") != ""]}


def _in_front(messages: list[Any], parts: list[dict[str, str]], notes: list[str]) -> list[Any]:
    """The messages with parts in front of the user's first turn, as TRL and ms-swift place media without a marker."""
    first = next(
        (i for i, turn in enumerate(messages) if isinstance(turn, Mapping) and turn.get("role") in ("user", DOCUMENT)),
        None,
    )
    if first is None:
        raise LayoutError("key 'messages': media without a marker stand in front of a user's turn, and there is none")
    whose = "document's text" if messages[first]["role"] == DOCUMENT else "user's first turn"
    notes.append(f"media without a marker stand in front of the {whose}")
    content = messages[first]["content"]
    texts = content if isinstance(content, list) else [{"type": "text", "text": content}] if content else []
    return [*messages[:first], {**messages[first], "content": [*parts, *texts]}, *messages[first + 1 :]]


def _as_parts(turn: Any) -> Any:
    """The turn with its text as a part, in which no marker is looked for again."""
    if not isinstance(turn, Mapping) or not isinstance(turn.get("content"), str) or not MARKER.search(turn["content"]):
        return turn
    return {**turn, "content": [{"type": "text", "text": turn["content"]}]}


# Key of a turn -> what projects write there for a turn that is read and not learned: OpenAI, axolotl, ms-swift.
LEARNED_KEYS = ("weight", "train", "training", "loss")
# Keys that mean the opposite, or a share of a turn.
OTHER_LEARNED_KEYS = ("mask", "masked", "train_detail", "trainable", "loss_mask", "loss_scale", "loss_weight")


def is_learned(turn: Mapping[str, Any]) -> bool:
    """Whether a turn of the assistant is to be learned: not with `weight: 0`, `train: false` or `loss: false`.

    Raises:
        LayoutError: a weight between, or a key of which that is not known.
    """
    if other := [key for key in OTHER_LEARNED_KEYS if turn.get(key) is not None]:
        raise LayoutError(f"{other[0]}={turn[other[0]]!r} of a turn; write weight: 0 for a turn that is not learned")
    given = {key: turn[key] for key in LEARNED_KEYS if turn.get(key) is not None}
    for key, value in given.items():
        if value not in (0, 1):
            raise LayoutError(f"{key}={value!r} of a turn; a turn is learned (1, true) or not (0, false)")
    return all(given.values())
