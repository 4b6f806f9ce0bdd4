"""The text parent's chat template, extended: media in their place, the assistant's words marked for training.

Unusual here:
- the parent's template is not edited but run: messages are flattened to strings before it, and its text is cut into
  marked and unmarked pieces after it, so default system prompt, tools and thinking stay as the parent's;
- nothing is assumed of a template: the extended one is shown conversations, and must write what the parent's writes.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from chorus_moe.surgery.template_limits import limited_template

GENERATION_TAG = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")
# Words that no template writes by itself.
ASK, ANSWER, RULE, THOUGHT = "xqask", "xqanswer", "xqrule", "xqthought"
TOOL = {"type": "function", "function": {"name": "xqtool", "description": "d", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "xqtool", "arguments": {}}}

# Lists of parts become strings. No white space is left between the tags, and none is taken from the parent's template.
FLATTEN = """\
{%- set chorus = namespace(messages=[]) -%}
{%- for message in messages -%}
    {%- if message['content'] is string or not message['content'] -%}
        {%- set chorus.messages = chorus.messages + [message] -%}
    {%- else -%}
        {%- set chorus.text = '' -%}
        {%- for part in message['content'] -%}
            {%- if part['type'] == 'image' -%}{%- set chorus.text = chorus.text + IMAGE -%}
            {%- elif part['type'] == 'audio' -%}{%- set chorus.text = chorus.text + AUDIO -%}
            {%- else -%}{%- set chorus.text = chorus.text + part['text'] -%}
            {%- endif -%}
        {%- endfor -%}
        {%- set chorus.messages = chorus.messages + [dict(message, content=chorus.text)] -%}
    {%- endif -%}
{%- endfor -%}
{%- set messages = chorus.messages -%}
"""
# An assistant's turn is what lies between HEADER and the first END after it.
MARK = """\
{%- for piece in chorus_chat.split(HEADER) -%}
    {%- if not loop.first -%}
        {{- HEADER -}}
        {%- set stop = piece.find(END) + END | length -%}
        {%- if END in piece -%}
            {%- generation -%}{{- piece[:stop] -}}{%- endgeneration -%}
            {%- set piece = piece[stop:] -%}
        {%- endif -%}
    {%- endif -%}
    {{- piece -}}
{%- endfor -%}
"""
# Where HEADER is plain words, a message that holds them would be read as a turn, by the model as well as here.
REFUSE = """\
{%- for message in messages -%}
    {%- if message['content'] is string and HEADER.strip() in message['content'] -%}
        {{- raise_exception('a message holds ' + HEADER.strip() + ', which begins the turns of the assistant') -}}
    {%- endif -%}
{%- endfor -%}
"""

Message = dict[str, Any]


def extended_template(tokenizer: PreTrainedTokenizerBase, media: Mapping[str, str]) -> tuple[str | None, str]:
    """The parent's chat template with media parts and marks, and a line for the report.

    Args:
        tokenizer: the text parent's.
        media: modality -> placeholder.

    Returns:
        None as the template where there is none or it cannot be extended; the line says why.
    """
    given, rest = tokenizer.chat_template, ""
    if isinstance(given, dict):
        rest = f"; its other templates ({', '.join(sorted(set(given) - {'default'}))}) are left out" * (len(given) > 1)
        given = given.get("default")
    if not given:
        return (
            None,
            f"chat template: the text parent has none, so turns are plain (role, line, text, end of text){rest}",
        )
    try:
        with limited_template(given, 2):
            template = _extended(given, tokenizer, media)
    except Exception as error:  # noqa: BLE001  a template is other people's program and can raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return None, (
            f"chat template: the text parent's could not be kept ({reason}), so turns are plain and its system prompt, "
            f"tools and thinking are gone: prompts must be written anew{rest}"
        )
    return template, f"chat template: the text parent's, with media parts and marks of the assistant's words{rest}"


def _extended(given: str, tokenizer: PreTrainedTokenizerBase, media: Mapping[str, str]) -> str:
    parent = GENERATION_TAG.sub("", given).removesuffix("\n")
    special = set(tokenizer.all_special_tokens)
    special |= {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    headers, end = _turn(parent, tokenizer, special)
    for last, header in enumerate(headers, start=1):
        names = {"IMAGE": media["image"], "AUDIO": media["audio"], "HEADER": header, "END": end}
        refuse = "" if any(token in header for token in special) else REFUSE
        before, after = _filled(FLATTEN + refuse, names), _filled(MARK, names)
        template = f"{before}{{%- set chorus_chat %}}{parent}{{% endset %}}{after}"
        try:
            _check_same(parent, template, tokenizer, media)
            return template
        except ValueError:
            if last == len(headers):
                raise
    raise ValueError("the turns of its assistant have no header, or no token at their end")


def _filled(text: str, names: Mapping[str, str]) -> str:
    # As literals of Jinja, which reads the escapes of JSON.
    return re.sub(rf"\b({'|'.join(names)})\b", lambda match: json.dumps(names[match[0]]), text)


def _turn(parent: str, tokenizer: PreTrainedTokenizerBase, special: set[str]) -> tuple[list[str], str]:
    """What may begin an assistant's turn, the likeliest first, and what ends it."""
    ask, answer = {"role": "user", "content": ASK}, {"role": "assistant", "content": ANSWER}
    shown = [([ask], True), ([ask, answer], False), ([ask, answer, ask], False)]
    # What follows the question. A prompt may go on with a thought, where a turn of the past does not.
    prompt, told, past = (
        _render(parent, tokenizer, messages, add_generation_prompt=flag)[0].partition(ASK)[2]
        for messages, flag in shown
    )
    common = os.path.commonprefix([prompt, told, past])
    found = [match.span() for token in special for match in re.finditer(re.escape(token), common)]
    # From a token on, the shortest first, which holds least of the turn before; then plain words behind the last token.
    cuts = sorted((start for start, _ in found), reverse=True) + [max((stop for _, stop in found), default=0)]
    headers = [common[cut:] for cut in cuts if common[cut:].strip()]
    rest = told.partition(ANSWER)[2]
    ends = [rest.index(token) + len(token) for token in special if token in rest]
    return (headers, rest[: min(ends)]) if ends else ([], "")


def _check_same(parent: str, template: str, tokenizer: PreTrainedTokenizerBase, media: Mapping[str, str]) -> None:
    """The extended template writes what the parent's writes, media as their tokens, and marks exactly the answers."""
    answered = False
    for messages, options in _conversations(parent):
        try:
            expected, _ = _render(parent, tokenizer, messages, **options)
        except Exception:  # noqa: BLE001  many templates refuse a role or an order; then there is nothing to compare
            continue
        found, spans = _render(template, tokenizer, messages, **options)
        if found != expected:
            raise ValueError("extended, it writes another text")
        spoken = [message for message in messages if message["role"] == "assistant"]
        answered |= bool(spoken)
        _check_marks([found[start:stop] for start, stop in spans], spoken)
    if not answered:
        raise ValueError("it refuses a user's turn and its answer")
    parts = [{"type": "image"}, {"type": "text", "text": ASK}, {"type": "audio"}]
    flat = media["image"] + ASK + media["audio"]
    found, expected = (
        _render(text, tokenizer, [{"role": "user", "content": content}])[0]
        for text, content in ((template, parts), (parent, flat))
    )
    if found != expected or flat not in found:
        raise ValueError("it does not write images and sound in their place")


def _check_marks(marked: Sequence[str], spoken: Sequence[Message]) -> None:
    same = len(marked) == len(spoken) and all(
        message["content"] in text and ASK not in text and RULE not in text
        for text, message in zip(marked, spoken, strict=False)
    )
    if not same:
        raise ValueError("the assistant's words cannot be told from others")


def _conversations(template: str) -> Iterator[tuple[list[Message], dict[str, Any]]]:
    """Conversations that show what a template does, and options that it knows."""
    user, system = {"role": "user", "content": ASK}, {"role": "system", "content": RULE}
    first, second = ({"role": "assistant", "content": ANSWER + number} for number in ("1", "2"))
    plain: list[list[Message]] = [
        [user],
        [user, first],
        [system, user],
        [user, first, user],
        [system, user, first, user, second],
    ]
    options: list[Message] = [{}, {"add_generation_prompt": True}]
    if "tools" in template:
        options.append({"tools": [TOOL]})
    if "enable_thinking" in template:
        options += [{"add_generation_prompt": True, "enable_thinking": flag} for flag in (False, True)]
    if "reasoning_content" in template:
        plain.append([user, {**first, "reasoning_content": THOUGHT}])
    if "tool_calls" in template:
        result = {"role": "tool", "name": "xqtool", "content": "xqresult"}
        plain.append([user, {"role": "assistant", "content": "", "tool_calls": [CALL]}, result, first])
    yield from ((messages, chosen) for messages in plain for chosen in options)


def _render(
    template: str, tokenizer: PreTrainedTokenizerBase, messages: list[Message], **options: Any
) -> tuple[str, list[tuple[int, int]]]:
    """Text, and where the marked pieces lie."""
    texts, spans = render_jinja_template(
        conversations=[messages],
        chat_template=template,
        return_assistant_tokens_mask=bool(GENERATION_TAG.search(template)),
        **tokenizer.special_tokens_map,
        **options,
    )
    return texts[0], spans[0] if spans else []
