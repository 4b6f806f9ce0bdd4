"""How configurations and reports print: a configuration by what is not default, a report as a table in a notebook."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from html import escape
from itertools import groupby
from textwrap import wrap
from typing import Any, NamedTuple

from transformers import PreTrainedConfig

from chorus_moe.modeling.configuration_banks import ROUTERS, ExpertBankConfig
from chorus_moe.modeling.configuration_services import SERVICES

WIDTH = 116
MANY = 3
# Of every configuration, and no news; labels stand in `id2label`.
ASIDE = ("transformers_version", "label2id")
# What fields that are None in the class hold once it has read them, and nobody asked for.
IMPLIED: dict[str, Any] = {
    "id2label": {0: "LABEL_0", 1: "LABEL_1"},
    "rope_parameters": {"rope_theta": 10_000.0, "rope_type": "default"},
    "architectures": [],
}


def describe_config(config: PreTrainedConfig) -> str:
    """What differs from the defaults of the class, a paragraph for each part and each bank; `to_dict` has it all."""
    return "\n".join(_lines(type(config).__name__, config, 0))


def _lines(title: str, config: PreTrainedConfig, indent: int) -> list[str]:
    values = differing(config)
    parts = {name: value for name, value in values.items() if isinstance(value, PreTrainedConfig)}
    banks = values.pop("expert_banks", None) or {}
    lines = _paragraph(title, {name: value for name, value in values.items() if name not in parts}, indent)
    for name, settings in banks.items():
        lines += _paragraph(f"bank {name}", settings, indent + 2)
    for name, part in parts.items():
        # Which library's encoder it is, where the name of the field does not say it.
        lines += _lines(name if name != "backbone_config" else f"{part.model_type} encoder", part, indent + 2)
    return lines


def _paragraph(title: str, values: Mapping[str, Any], indent: int) -> list[str]:
    text = ", ".join(f"{name}={short(value)}" for name, value in values.items())
    margin = " " * indent
    return wrap(f"{title}: {text}", WIDTH, initial_indent=margin, subsequent_indent=margin + "  ")


def differing(config: PreTrainedConfig) -> dict[str, Any]:
    """Field -> value where it is not the default of the class; of banks, where it is not what the decoder says."""
    found = {}
    for field in fields(config):  # type: ignore[arg-type]  # transformers makes every configuration a dataclass
        value = getattr(config, field.name)
        is_default = value is None or value == field.default or value == IMPLIED.get(field.name)
        if not is_default and field.name not in ASIDE:
            found[field.name] = value
    if banks := found.get("expert_banks"):
        found["expert_banks"] = {name: _differing_bank(bank, config) for name, bank in banks.items()}
    return found


def _differing_bank(bank: Mapping[str, Any], config: PreTrainedConfig) -> dict[str, Any]:
    standard = {field.name: field.default for field in fields(ExpertBankConfig)}
    standard |= {
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "intermediate_size": config.moe_intermediate_size,
        "balance": ROUTERS.get(bank.get("router", "softmax"), "switch"),
    }
    return {name: value for name, value in bank.items() if value is not None and value != standard.get(name)}


def short(value: object) -> str:
    """A value on one line; what repeats in a list is counted."""
    if not isinstance(value, list):
        return str(value)
    runs = [(str(entry), len(list(group))) for entry, group in groupby(value)]
    pieces = [f"{count} x {text}" if count >= MANY else ", ".join([text] * count) for text, count in runs]
    return "[" + ", ".join(pieces) + "]"


class Html(str):
    """Text that a notebook shows as HTML."""

    def _repr_html_(self) -> str:
        return str(self)


class Table(NamedTuple):
    """A table as a notebook shows it: the first cell of a row is a name, the others are figures."""

    head: Sequence[str]
    rows: Sequence[Sequence[object]]

    def to_html(self) -> str:
        head = "".join(f"<th>{escape(str(name))}</th>" for name in self.head)
        body = ""
        for first, *rest in self.rows:
            cells = "".join(f"<td>{escape(figure(cell))}</td>" for cell in rest)
            body += f'<tr><td style="text-align:left">{escape(str(first))}</td>{cells}</tr>'
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def figure(value: object) -> str:
    """A number as tables show it, `-` for one that there is not."""
    if isinstance(value, float):
        return "-" if value != value else f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


SERVICES["describe_config"] = describe_config
