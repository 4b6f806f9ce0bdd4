"""Conversations before they are rendered: media in their place, typed control tokens escaped.

A typed `<image>` must stay text. A word joiner (U+2060, invisible) is put after the first character of every special
token found in a role or a text, so that no tokenizer sees the token. It stays in the text the model reads.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from .processing_limits import TEXT, MediaPlace
from .processing_media import MEDIA

WORD_JOINER = "\u2060"
# What a message may say beside its content. transformers passes each of the second line under all three names.
REASONING = ("reasoning_content", "reasoning", "thinking")
SPOKEN = ("tool_calls", "function_call", "refusal", "documents", *REASONING)
# Keys that say of a turn whether it is learned, as in `training.layouts`.
LEARNED_KEYS = ("weight", "train", "training", "loss")
# Keys of media beside the content, as Ollama has them, and of parts.
MEDIA_KEYS = "image images image_url audio audios audio_url input_audio video videos files attachments".split()
# Roles are plain words. A message cannot forge a turn: turns end with the eos token, which is escaped in messages.
CHAT_TEMPLATE = """\
{%- macro render(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- else -%}
        {%- for part in content -%}
            {%- if part['type'] == 'image' -%}{{- '<image>' -}}
            {%- elif part['type'] == 'audio' -%}{{- '<audio>' -}}
            {%- else -%}{{- part['text'] -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{{- bos_token -}}
{%- for message in messages -%}
    {{- message['role'] + '\\n' -}}
    {%- if message['role'] == 'assistant' -%}
        {%- generation -%}
            {{- render(message['content'] | default('', true)) -}}
            {{- eos_token -}}
        {%- endgeneration -%}
    {%- else -%}
        {{- render(message['content'] | default('', true)) -}}
        {{- eos_token -}}
    {%- endif -%}
    {{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- 'assistant\\n' -}}
{%- endif -%}
"""


def default_chat_template(image_token: str, audio_token: str) -> str:
    """The Jinja template with this processor's media tokens; turns are `role`, newline, content, eos, newline."""
    return CHAT_TEMPLATE.replace("'<image>'", repr(image_token)).replace("'<audio>'", repr(audio_token))


def split_batch(conversation: object) -> tuple[list[list[dict]], bool]:
    """Conversations as a list, and whether the caller passed a batch."""
    # transformers' pipelines wrap conversations in an object.
    if hasattr(conversation, "messages"):
        return [conversation.messages], False
    if isinstance(conversation, dict):
        conversation = [conversation]
    if not isinstance(conversation, (Sequence, np.ndarray)) or isinstance(conversation, str):
        found = type(conversation).__name__
        raise TEXT.error(f"a conversation is a list of messages, found {found}")
    entries: list[Any] = list(conversation)
    if not entries:
        raise TEXT.error("the conversation is empty")
    if isinstance(entries[0], dict):
        return [entries], False
    return [list(getattr(entry, "messages", entry)) for entry in entries], True


def break_control_tokens(value: object, control_tokens: re.Pattern[str]) -> Any:
    """`value` with a word joiner inside every control token of all its strings, so that they are read as text."""
    if isinstance(value, str):
        return control_tokens.sub(lambda match: match.group()[0] + WORD_JOINER + match.group()[1:], value)
    if isinstance(value, dict):
        return {
            break_control_tokens(k, control_tokens): break_control_tokens(v, control_tokens) for k, v in value.items()
        }
    if isinstance(value, (list, tuple, np.ndarray)):
        return [break_control_tokens(item, control_tokens) for item in value]
    return value


def check_rendered(template: str, conversations: list[list[dict]], wants_mask: object = False, **given: Any) -> None:
    """Refuse what `template` does not write: `given` beside the conversations (tools, documents), and `SPOKEN` keys;
    with `wants_mask` also turns that are not to be learned, which marks and labels would cover.

    Raises:
        MediaError: names the sample, the message and the key.
    """
    written = {name for name in (*given, *SPOKEN) if re.search(rf"\b{name}\b", template)}
    written |= set(REASONING) if written & set(REASONING) else set()
    cure = "the chat template does not write it and it would be lost; pass a chat_template that does, or leave it out"
    for name, value in given.items():
        if value and name not in written:
            raise TEXT.error(f"{name}: {cure}")
    for sample, messages in enumerate(conversations):
        for number, message in enumerate(messages):
            if lost := [key for key in SPOKEN if message.get(key) and key not in written]:
                raise MediaPlace("text", sample=sample, message=number).error(f"{lost[0]}: {cure}")
            if wants_mask and (key := next((k for k in LEARNED_KEYS if message.get(k) not in (None, 1)), None)):
                raise MediaPlace("text", sample=sample, message=number).error(
                    f"{key}={message[key]!r}: only ChorusDataCollator leaves a turn out of labels and masks"
                )


def prepare_conversation(
    messages: list[dict],
    media: dict[str, list[Any]],
    control_tokens: re.Pattern[str],
    sampling_rate: int | None,
    sample: int,
) -> list[dict]:
    """A copy of `messages` whose media parts hold their data under the key of their type, texts escaped.

    Args:
        media: items for parts without data, per modality, used up in order.
        sampling_rate: Hz of arrays that bring none.

    Raises:
        MediaError: malformed message, unknown content type, or another number of items than of parts without data;
            without any items such parts stay empty, which is enough to render text.
    """
    # Copies: items are taken out as parts are met.
    queues = {modality: list(items) for modality, items in media.items()}
    wanted = dict.fromkeys(queues, 0)
    prepared = []
    for number, message in enumerate(messages):
        place = MediaPlace("text", sample=sample, message=number)
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise place.error(f"a message is a dict with 'role' and 'content', found {message!r:.80}")
        _refuse_media(message, "", place)
        content = message.get("content")
        if isinstance(content, str):
            content = break_control_tokens(content, control_tokens)
        elif content is not None:
            if not isinstance(content, (dict, list, tuple, np.ndarray)):
                raise place.error(f"content is a string or a list of parts, found {content!r:.80}")
            parts = _join_texts([content] if isinstance(content, dict) else list(content))
            content = [_prepare_part(part, queues, wanted, control_tokens, sampling_rate, place) for part in parts]
        # A role is written into the prompt like text, and so are tool calls: they are escaped like text.
        rest = {key: break_control_tokens(value, control_tokens) for key, value in message.items() if key != "content"}
        prepared.append({**rest, "content": content})
    for modality, items in media.items():
        # After all messages, so that the error can name both numbers.
        if items and wanted[modality] != len(items):
            raise MediaPlace(modality, sample=sample).error(
                f"found {wanted[modality]} {modality} parts without data for {len(items)} items passed beside the "
                "conversation"
            )
    return prepared


def _refuse_media(given: dict, kind: str | None, place: MediaPlace) -> None:
    for key, value in given.items():
        if key in MEDIA_KEYS and key != kind and value is not None and (not hasattr(value, "__len__") or len(value)):
            raise place.error(f"{key} beside {kind or 'the content'} would be lost; make it a part of the content")


def _join_texts(content: list[Any]) -> list[Any]:
    """Neighbouring texts become one, so that no control token can be typed in two halves."""
    joined: list[Any] = []
    was_text = False
    for part in content:
        part = {"type": "text", "text": part} if isinstance(part, str) else part
        is_text = isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
        if is_text and was_text:
            joined[-1] = {**joined[-1], "text": joined[-1]["text"] + part["text"]}
        else:
            joined.append(part)
        was_text = is_text
    return joined


def _prepare_part(
    part: Any, queues: dict, wanted: dict, control_tokens: re.Pattern[str], sampling_rate: int | None, place: MediaPlace
) -> dict:
    kind = part.get("type") if isinstance(part, dict) else None
    _refuse_media(part if kind else {}, kind, place)
    # The forms of OpenAI's API, which many datasets copy.
    if kind in ("image_url", "audio_url", "input_audio"):
        inner, key = part.get(kind), "base64" if kind == "input_audio" else "url"
        inner = inner.get("data" if key == "base64" else "url") if isinstance(inner, dict) else inner
        kind = "image" if kind == "image_url" else "audio"
        part = {"type": kind, key: inner}
    if kind == "text" and isinstance(part.get("text"), str):
        return {**part, "text": break_control_tokens(part["text"], control_tokens)}
    if kind not in MEDIA:
        raise place.error(
            f"unknown content {part!r:.80}; the types are text, image, audio, image_url, audio_url and input_audio"
        )
    given = [key for key in MEDIA[kind].keys if part.get(key) is not None]
    if len(given) > 1:
        place = replace(place, modality=kind)
        raise place.error(f"one {kind} part holds several sources: {', '.join(given)}")
    if given:
        item = part[given[0]]
        if given[0] == "base64":
            # As an address, which it may be already, so that one place decodes base64 within the limits.
            item = item if str(item).startswith("data:") else f"data:;base64,{item}"
    else:
        wanted[kind] += 1
        item = queues[kind].pop(0) if queues[kind] else None
    if kind == "audio" and isinstance(item, (np.ndarray, torch.Tensor, list, tuple)):
        rate = part.get("sampling_rate", sampling_rate)
        item = {"array": item, "sampling_rate": rate}
    return {"type": kind, kind: item}
