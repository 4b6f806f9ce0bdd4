"""What a stranger's chat template may cost: lines that run, and characters that they touch or make.

transformers renders templates in Jinja's sandbox, which bounds what they reach and neither their time nor their memory.
Registered with the processors by `import chorus_moe`; a processor that shipped as code with its model does without,
since who runs it trusts the code of that repository.

Unusual here:
- a line costs one step, and one more for every `CHARS_PER_STEP` characters that it, or a filter below it, holds;
- operators cannot be watched while they run: products are read beforehand, and one factor must be short and written;
- what Python code of Jinja makes (`~`, filters, methods of strings) is reckoned before it is made, and so is `%`, which
  the sandbox is told to call by a function: a template may have built the format.
"""

import math
import re
import sys
from collections.abc import Iterator, Sized
from contextlib import contextmanager
from functools import lru_cache
from types import FrameType
from typing import Any

from jinja2 import Environment
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers.utils import chat_template_utils

from chorus_moe.processors.processing_chat import ChatProcessor
from chorus_moe.processors.processing_limits import TEXT

# For one conversation; a message takes about ten.
MAX_STEPS = 1_000_000
CHARS_PER_STEP = 1_024
# In one value.
MAX_CHARS = 2**24
# In one list: Jinja's own limit of a `range`.
MAX_ITEMS = 100_000
# Filters and methods that fill up to a width.
WIDENING = ("center", "ljust", "rjust", "zfill", "expandtabs", "indent", "batch", "slice")
# A width of seven digits, or one that stands elsewhere.
WIDE_FORMAT = re.compile(r"\d{7}|%[^a-zA-Z%]{0,8}\*|\{[^{}]*\{")


class WatchedFormats(ImmutableSandboxedEnvironment):
    """The sandbox of transformers; `%` calls `call_binop`, also where both sides are constants."""

    intercepted_binops = frozenset("%")


class TooMuch(BaseException):
    """Not an `Exception`: Jinja's compiler catches those, and Python stops to watch after the first."""


@lru_cache(maxsize=64)
def check_operators(template: str) -> None:
    """Refuse powers, huge numbers, products of two unknown values and wide formats: one line of them takes all memory.

    Raises:
        MediaError: names what was found.
    """
    block: list[tuple[str, str]] = []
    for _, kind, text in Environment().lex(template):
        block = [] if kind.endswith("_begin") else [*block, (kind, text)] if kind != "whitespace" else block
        if kind.endswith("_end"):
            _check_block([("operator", "("), *block, ("operator", ")")])


def _check_block(block: list[tuple[str, str]]) -> None:
    for kind, text in block:
        if (kind, text) == ("operator", "**") or (kind in ("integer", "float") and re.search(r"\d{8}", text)):
            raise TEXT.error(f"the chat template computes with powers or huge numbers: {text}")
    products = 0
    for place, (kind, text) in enumerate(block):
        if text == "%" and block[place - 1][0] == "string" and WIDE_FORMAT.search(block[place - 1][1]):
            raise TEXT.error(f"the chat template formats to a huge width: {block[place - 1][1]}")
        # After a bracket or a comma it hands over the items of a list.
        if kind == "operator" and text == "*" and block[place - 1][1] not in ("(", ","):
            products += 1
            before, after = block[place - 2 : place], block[place + 1 : place + 3]
            is_short = (_is_short(before[1]) and before[0][1] not in ("*", "/", "//", "%")) or (
                _is_short(after[0]) and after[1][1] not in ("|", ".", "[", "(")
            )
            # Jinja computes constants when it compiles a template, and writes them into its code.
            is_long = any(kind == "integer" and len(text) > 5 for kind, text in (before[1], after[0]))
            if products > 1 or is_long or not is_short:
                raise TEXT.error(
                    "the chat template multiplies what may be long; one factor must be a number up to 100 or a text of "
                    "a few letters, in one product an expression"
                )


def _is_short(token: tuple[str, str]) -> bool:
    kind, text = token
    return (kind == "integer" and int(text.replace("_", ""), 0) <= 100) or (kind == "string" and len(text) <= 18)


def _size(value: object) -> int:
    """Characters of a text, of all texts in a list, or entries."""
    if isinstance(value, (list, tuple)):
        if len(value) > MAX_ITEMS:
            return MAX_CHARS + 1
        return sum(len(item) if isinstance(item, str) else 1 for item in value)
    return len(value) if isinstance(value, (str, dict)) else 0


def _made(name: str, values: list[Any]) -> int:
    """Characters that a filter, or a method of strings, may make of its values, the text first."""
    text, *rest = values
    words, numbers = [x for x in rest if isinstance(x, str)], [x for x in rest if isinstance(x, int)]
    if name == "replace" and isinstance(text, str) and len(words) > 1:
        return len(text) + text.count(words[0]) * len(words[1])
    if name == "join":
        # As a filter the items come first, as a method what stands between them.
        between, items = (text, rest[0]) if isinstance(text, str) and rest else ((words or [""])[0], text)
        return _size(items) + len(between) * (len(items) if isinstance(items, Sized) else MAX_ITEMS)
    if name in ("format", "wrapper", "call_binop") and isinstance(text, str) and WIDE_FORMAT.search(text):
        return MAX_CHARS + 1
    if name == "generate_lorem_ipsum":
        # Paragraphs of so many words.
        return 10 * math.prod(max(x, 1) for x in values if isinstance(x, int))
    if name in WIDENING:
        lines = 1 + (text.count("\n") + text.count("\t") if isinstance(text, str) else 0)
        return _size(text) + lines * max([*numbers, *map(len, words), 0])
    return max(map(_size, values))


def _reckoned(frame: FrameType) -> int:
    """Characters that a function of Jinja is about to make."""
    name, values = frame.f_code.co_name.removeprefix("do_").removeprefix("sync_do_"), dict(frame.f_locals)
    values.pop("eval_ctx", None)
    callee: Any = values.get("_SandboxedEnvironment__obj")
    if isinstance(getattr(callee, "__self__", None), str):
        return _made(callee.__name__, [callee.__self__, *values["args"], *values["kwargs"].values()])
    if name == "wrapper":
        return _made(name, [values.get("f_self"), *values.values()])
    if name == "call_binop":
        return _made(name, [values["left"], values["right"]])
    # Functions of Jinja's compiler call other things so.
    args, kwargs = values.pop("args", ()), values.pop("kwargs", {})
    given = [*(args if isinstance(args, tuple) else ()), *(kwargs.values() if isinstance(kwargs, dict) else ())]
    return _made(name, [*values.values(), *given]) if values or given else 0


@contextmanager
def limited_template(template: str = "", num_conversations: int = 1) -> Iterator[None]:
    """Within, a Jinja template that costs more than `MAX_STEPS` a conversation raises `MediaError`. Under a debugger,
    which traces itself, only its operators are read."""
    check_operators(template)
    left = MAX_STEPS * num_conversations

    def pay(size: int, steps: int = 0) -> None:
        nonlocal left
        if size > MAX_CHARS:
            raise TooMuch(
                f"the chat template makes a text of over {MAX_CHARS} characters or a list of over {MAX_ITEMS}"
            )
        left -= steps + size // CHARS_PER_STEP
        if left < 0:
            raise TooMuch(f"the chat template ran over {MAX_STEPS} lines")

    def in_template(frame: FrameType, event: str, argument: Any) -> Any:
        # Lists are checked where they are made.
        sizes = [len(value) for value in frame.f_locals.values() if isinstance(value, str)]
        pay(max([*sizes, _size(argument) if event == "return" else 0]), 1)
        return in_template

    def in_jinja(frame: FrameType, event: str, argument: Any) -> Any:
        pay(_size(argument) if event == "return" else 0)
        return in_jinja

    def watch(frame: FrameType, event: str, argument: Any) -> Any:
        name = frame.f_code.co_filename
        if name == "<template>":
            return in_template
        if "jinja2" not in name:
            return None
        pay(_reckoned(frame))
        frame.f_trace_lines = False
        return in_jinja

    previous = sys.gettrace()
    if previous is None:
        sys.settrace(watch)
    try:
        yield
    except TooMuch as stopped:
        raise TEXT.error(str(stopped)) from None
    finally:
        sys.settrace(previous)


chat_template_utils.ImmutableSandboxedEnvironment = WatchedFormats  # type: ignore[misc]
# What was compiled before holds the operator itself.
chat_template_utils._compile_jinja_template.cache_clear()
ChatProcessor.template_limits = staticmethod(limited_template)
