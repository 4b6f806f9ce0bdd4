"""A stranger's chat template that would take all time or memory is stopped, and those that people use are not."""

import runpy
import sys
import tracemalloc
from typing import Any

import pytest
from jinja2.exceptions import TemplateSyntaxError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers.utils import chat_template_utils

from chorus_moe.processors import ChorusProcessor, MediaError
from chorus_moe.processors.processing_chat import ChatProcessor
from chorus_moe.surgery import template_limits
from chorus_moe.surgery.processor import processor_from_config
from chorus_moe.surgery.template_limits import MAX_CHARS, MAX_STEPS, check_operators, limited_template
from chorus_moe.surgery.tokenizer import build_tokenizer
from tests.processors.conftest import CORPUS, model_config

PLAIN = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
LONG = f"makes a text of over {MAX_CHARS} characters"
FORTY = "{% for i in range(40) %}"
END = "{% endfor %}"


@pytest.fixture(scope="module")
def processor() -> ChorusProcessor:
    return processor_from_config(model_config(), build_tokenizer(CORPUS, vocab_size=320))


def asked(processor: ChorusProcessor, template: str, content: str = "x") -> str:
    messages = [{"role": "user", "content": content}]
    return processor.apply_chat_template(messages, chat_template=template)


def test_the_limits_hold_wherever_the_package_is_imported() -> None:
    assert ChatProcessor.template_limits is limited_template


def test_a_template_without_an_end_is_stopped_and_a_long_one_is_not() -> None:
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    template = ImmutableSandboxedEnvironment().from_string(endless)
    with pytest.raises(MediaError, match="ran over 1000000 lines"), limited_template(endless):
        template.render()
    with limited_template(PLAIN):
        text = ImmutableSandboxedEnvironment().from_string(PLAIN).render(messages=[{"content": "x"}] * 50_000)
    assert text == "x" * 50_000
    assert sys.gettrace() is None


@pytest.mark.parametrize("code", ["{{ i | string | upper }}", "{{ i ~ i }}", "{{ [i] | first }}", "{{ '%d' % i }}"])
def test_calls_of_jinja_give_no_line_back(
    processor: ChorusProcessor, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template_limits, "MAX_STEPS", 500)
    with pytest.raises(MediaError, match="ran over 500 lines"):
        asked(processor, "{% for i in range(1000) %}" + code + "{% endfor %}")


def test_a_template_may_run_a_million_lines_a_conversation(monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_STEPS == 1_000_000
    monkeypatch.setattr(template_limits, "MAX_STEPS", 10)
    lines = compile("\n".join(["x = 1"] * 9), "<template>", "exec")
    # Nine lines, and the return.
    with limited_template("", 1):
        exec(lines)
    with limited_template("", 2):
        exec(lines), exec(compile("\n".join(["x = 1"] * 8), "<template>", "exec"))
    # One conversation where no number is given.
    with pytest.raises(MediaError, match="^the chat template ran over 10 lines$"), limited_template():
        exec(compile("\n".join(["x = 1"] * 12), "<template>", "exec"))
    # Other code is not counted, and what traced before goes on.
    with limited_template("", 1):
        exec(compile("\n".join(["x = 1"] * 50), "<other>", "exec"))
    assert sys.gettrace() is None


@pytest.mark.parametrize(
    "code",
    ["{{ 9**9**9 }}", "{%- set x = 2 ** n %}", "{{ 'a' * 1000000000 }}", "{{ '**' ~ 2**9 }}", "{{ {'a': {}} or 2**9}}"],
)
def test_a_template_of_powers_is_refused_before_it_runs(processor: ChorusProcessor, code: str) -> None:
    with pytest.raises(MediaError, match=r"the chat template computes with powers or huge numbers: (\*\*|10000000)"):
        asked(processor, f"{{{{ 1 }}}}\n{code}")


@pytest.mark.parametrize(
    "code",
    ["**bold** {{ 1 }}", "{{ '**' }} ** {{ 2 * 3 }}", '{{ "a ** b" }}', r"{{ 'it\'s **' }}",
     "{% if 1 %}** 20261129{% endif %}", "{{ {'a': 1}['a'] }} ** {{ '20261129' }}"],
)  # fmt: skip
def test_stars_and_numbers_in_the_text_of_a_template_are_text(processor: ChorusProcessor, code: str) -> None:
    assert any(mark in asked(processor, code) for mark in ("**", "6"))


# Each doubles a text, or multiplies two long ones, in one of the ways that a template has.
DOUBLING = {
    "~": "{% set ns.x = ns.x ~ ns.x %}",
    "+": "{% set ns.x = ns.x + ns.x %}",
    "a list": "{% set ns.x = [ns.x, ns.x] | join %}",
    "a list of lists": "{% set ns.y = ns.y + ns.y %}",
    "a short product": "{% set ns.x = ns.x * 2 %}",
    "a format": "{% set ns.x = '%s%s' % (ns.x, ns.x) %}",
    "the filter format": "{% set ns.x = '%s%s' | format(ns.x, ns.x) %}",
    "the method format": "{% set ns.x = '{}{}'.format(ns.x, ns.x) %}",
    "the filter replace": "{% set ns.x = ns.x | replace('a', 'aa') %}",
    "the method replace": "{% set ns.x = ns.x.replace('a', 'aa') %}",
    "the method join": "{% set ns.x = ns.x.join(['a', 'a', 'a']) %}",
    "a block": "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}",
    "a macro": "{% set ns.x = twice(ns.x) %}",
    "a filter of a filter": "{% set ns.x = ns.x | indent(2) ~ ns.x %}",
}


@pytest.mark.parametrize("way", DOUBLING)
def test_a_text_that_doubles_is_stopped_in_memory(processor: ChorusProcessor, way: str) -> None:
    start = "{% macro twice(x) %}{{ x }}{{ x }}{% endmacro %}{% set ns = namespace(x='aaaa', y=['a']) %}"
    tracemalloc.start(1)
    try:
        with pytest.raises(MediaError, match=f"the chat template ({LONG}|ran over)"):
            asked(processor, start + FORTY + DOUBLING[way] + END)
        assert tracemalloc.get_traced_memory()[1] < 16 * MAX_CHARS
    finally:
        tracemalloc.stop()
    assert sys.gettrace() is None


@pytest.mark.parametrize(
    "code",
    [
        "{{ 'x'.center(9999999 + 9999999) }}",
        "{{ 'x' | center(9999999 + 9999999) }}",
        "{{ 'x'.zfill(9999999 + 9999999) }}",
        "{{ 'x'.rjust(9999999 + 9999999) }}",
        "{{ ('x\n' * 99) | indent(999999) }}",
        "{{ range(99999) | map('string') | join('a thousand letters, about, and more, and a few' ~ messages) }}",
        "{{ range(99999) | join(' ' * 999) }}",
        "{{ messages[0].content | replace('a', ' ' * 999) }}",
        "{{ '{:>99999999}'.format(1) }}",
        "{{ '{:>{w}}'.format(1, w=99) }}",
        "{{ '%99999999d' | format(1) }}",
        "{{ lipsum(n=9999999, html=False) }}",
        "{% for i in range(99999) %}{{ messages[0].content }}{% endfor %}",
    ],
)
def test_one_call_that_makes_too_much_is_stopped_before_it(processor: ChorusProcessor, code: str) -> None:
    with pytest.raises(MediaError, match=f"the chat template ({LONG}|ran over)"):
        asked(processor, "{% if messages %}" + code + "{% endif %}", "a" * 20_000)


@pytest.mark.parametrize(
    "code", ["{{ x * n }}", "{{ 'a' * 99 * 99 }}", "{{ n * 'a'|upper }}", "{{ 'a' % 2 * n }}", "{{ 'a' * 999999 }}"]
)
def test_a_product_of_two_unknown_values_is_refused(code: str) -> None:
    with pytest.raises(MediaError, match="multiplies what may be long"):
        check_operators(code)


@pytest.mark.parametrize("code", ["{{ '%9999999d' % 1 }}", "{{ '%*d' % (n, 1) }}", "{{ '%-0*d' % (n, 1) }}"])
def test_a_format_of_any_width_is_refused(code: str) -> None:
    with pytest.raises(MediaError, match="formats to a huge width"):
        check_operators(code)


@pytest.mark.parametrize(
    "code",
    [
        "{{ ('%' ~ '999999999d') % 1 }}",
        "{{ ('%' + '999999999d') % 1 }}",
        "{% set wide = '%%%s' % '999999999' %}{{ (wide ~ 'd') % 1 }}",
        "{% set wide = ['%', '*d'] | join %}{{ wide % (9999999, 1) }}",
        "{% macro shown(x) %}{{ x % {'a': 1} }}{% endmacro %}{{ shown('%(a)' ~ '999999999d') }}",
        "{{ messages[0].content % 1 }}",
    ],
)
def test_a_wide_format_that_a_template_builds_is_stopped(processor: ChorusProcessor, code: str) -> None:
    check_operators(code)
    tracemalloc.start(1)
    try:
        with pytest.raises(MediaError, match=f"the chat template {LONG}"):
            asked(processor, code, "%999999999d")
        assert tracemalloc.get_traced_memory()[1] < MAX_CHARS
    finally:
        tracemalloc.stop()


def test_formats_are_watched_in_templates_that_were_compiled_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever imports the package late has compiled templates by then."""
    monkeypatch.setattr(ChatProcessor, "template_limits", ChatProcessor.template_limits)
    monkeypatch.setattr(chat_template_utils, "ImmutableSandboxedEnvironment", ImmutableSandboxedEnvironment)
    chat_template_utils._compile_jinja_template.cache_clear()
    template = "{{ ('%' ~ width ~ 'd') % 1 }}"

    def shown(width: int) -> str:
        return chat_template_utils.render_jinja_template([[]], chat_template=template, width=width)[0][0]

    assert shown(3) == "  1"
    limited = runpy.run_path(template_limits.__file__)["limited_template"]
    assert shown(3) == "  1"
    with pytest.raises(MediaError, match=LONG), limited(template):
        shown(99_999_999)


@pytest.mark.parametrize(
    ("code", "written"),
    [
        ("{{ ('%' ~ '3d') % 1 }}{{ 7 % 4 }}{{ 7.5 % 4 }}{{ (messages | length) % 2 }}", "  133.51"),
        ("{{ '  ' * (messages | length + 1) }}|", "    |"),
        ("{{ 3 * (1 + 1) }}", "6"),
        ("{{ (messages | length) * 2 }}", "2"),
        ("{{ '-' * 80 }}", "-" * 80),
        ("{{ dict(*[[('a', 5)]])['a'] }}", "5"),
        ("{{ 'it is **%s**, %d%%' % ('good', 5) }}", "it is **good**, 5%"),
        ("{{ '%05.1f' | format(2.5) }}", "002.5"),
        ("{{ '{:>4}{}'.format(7, 'a') }}", "   7a"),
        ("{{ loop is defined }}{% for m in messages %}{{ loop.index0 % 2 }}{% endfor %}", "False0"),
        ("{{ messages[0].content | replace('x', 'y') | trim | upper | indent(2, true) | tojson }}", '"  Y"'),
        ("{{ ['a', 'b'] | map('upper') | join(', ') }}{{ ', '.join(['a', 'b']) }}", "A, Ba, b"),
        ("{{ 1764460 | string | length }}", "7"),
    ],
)
def test_what_templates_do_every_day_is_let_through(processor: ChorusProcessor, code: str, written: str) -> None:
    assert asked(processor, code) == written


def test_a_long_conversation_passes(processor: ChorusProcessor) -> None:
    """A hundred turns of 20,000 characters, twice around each filter that templates use."""
    template = (
        "{% for message in messages %}{% set content = message.content | trim %}"
        "{% if '</think>' in content %}{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
        "{{ '<|' ~ message.role ~ '|>' + content.replace('a ', 'b ') | replace('b ', 'a ') }}{% endfor %}"
    )
    content = "a word </think>" + "a word " * 3_000
    messages: list[dict[str, Any]] = [{"role": "user", "content": content}] * 100
    text = processor.apply_chat_template(messages, chat_template=template)
    assert text == ("<|user|>" + "a word " * 2_999 + "a word") * 100


def test_a_template_that_cannot_be_read_says_so(processor: ChorusProcessor) -> None:
    with pytest.raises(TemplateSyntaxError, match="Expected an expression"):
        asked(processor, "{% if %}")
