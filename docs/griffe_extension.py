"""What griffe does not read by itself: constructors of configurations, links, two parameters with one description."""

import dataclasses
import inspect
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import griffe

# [`name`] in a docstring, as transformers writes it, and `::: path.of.name` on a reference page.
REFERENCE = re.compile(r"\[`(\w+)`\](?!\[)")
# `first, second: description` with its further lines, which are indented deeper.
SHARED = re.compile(r"^( +)([a-z]\w*)((?:, [a-z]\w*)+)(: .*(?:\n\1 +.*)*)", flags=re.MULTILINE)
DOCUMENTED = re.compile(r"^::: ([\w.]+)", flags=re.MULTILINE)
PAGES = sorted((Path(__file__).parent / "reference").glob("*.md"))
PATHS = {path.split(".")[-1]: path for page in PAGES for path in DOCUMENTED.findall(page.read_text(encoding="utf-8"))}


class ChorusExtension(griffe.Extension):
    """Fields of configurations come from the imported classes: griffe does not know their decorator."""

    def on_class_members(self, *, cls: griffe.Class, **_: Any) -> None:
        if not cls.module.name.startswith("configuration_"):
            return
        configuration = getattr(import_module(cls.module.path), cls.name)
        if dataclasses.is_dataclass(configuration):
            cls.set_member("__init__", constructor(cls, configuration))

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = SHARED.sub(one_by_one, REFERENCE.sub(linked, obj.docstring.value))


def constructor(cls: griffe.Class, configuration: type) -> griffe.Function:
    # Its own, and the inherited ones that it describes.
    names = {*configuration.__annotations__, *re.findall(r"^ +(\w+): ", configuration.__doc__ or "", re.MULTILINE)}
    own = [field for field in dataclasses.fields(configuration) if field.name in names]
    self_ = griffe.Parameter("self", kind=griffe.ParameterKind.positional_or_keyword)
    return griffe.Function("__init__", parent=cls, parameters=griffe.Parameters(self_, *map(parameter, own)))


def parameter(field: dataclasses.Field) -> griffe.Parameter:
    default = None if field.default is dataclasses.MISSING else repr(field.default)
    if field.default_factory is not dataclasses.MISSING:
        default = f"{field.default_factory.__name__}()"
    annotation = re.sub(r"\b(?:\w+\.)+(?=\w)", "", inspect.formatannotation(field.type))
    return griffe.Parameter(field.name, annotation=annotation, kind=griffe.ParameterKind.keyword_only, default=default)


def linked(match: re.Match[str]) -> str:
    """A link to the name on its reference page, or the plain name."""
    path = PATHS.get(match[1])
    return f"`{match[1]}`" if path is None else f"[`{match[1]}`][{path}]"


def one_by_one(match: re.Match[str]) -> str:
    """The description at the first name; the others refer to it."""
    indent, first, others, description = match.groups()
    return f"{indent}{first}{description}" + "".join(
        f"\n{indent}{name}: see `{first}`." for name in others.split(", ")[1:]
    )
