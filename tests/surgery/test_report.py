"""What operations report, how weights are counted, and which models they refuse."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from chorus_moe.fastpaths.quantized_weights import quantized, store_quantized
from chorus_moe.modeling.configuration_text import ChorusTextConfig
from chorus_moe.surgery.report import OperationReport, checked, count_parameters, numbers_in, refuse_adapters

REPORT = OperationReport(
    operation="prune",
    subject="text",
    parameters_before=12_000,
    parameters_after=9_500,
    experts={"text": {1: (8, 6), 3: (8, 4)}, "common": {0: (4, 3)}},
    notes=["a < b", "c"],
    trainable_before=1_000,
    trainable_after=0,
)


def test_a_report_prints_what_changed() -> None:
    assert str(REPORT).splitlines() == [
        "prune text: 12,000 -> 9,500 parameters (-2,500)",
        "  trainable: 1,000 -> 0 parameters",
        "  experts of text: layer 1: 8 -> 6, layer 3: 8 -> 4",
        "  experts of common: layer 0: 4 -> 3",
        "  a < b",
        "  c",
    ]
    grown = OperationReport(operation="add", subject="x", parameters_before=1_000, parameters_after=3_000)
    assert str(grown) == "add x: 1,000 -> 3,000 parameters (+2,000)"
    assert (grown.experts, grown.notes, grown.trainable_before, grown.trainable_after) == ({}, [], None, None)
    same = OperationReport(
        operation="freeze", subject="", parameters_before=1, parameters_after=1, trainable_before=0, trainable_after=1
    )
    assert str(same) == "freeze : 1 -> 1 parameters (+0)\n  trainable: 0 -> 1 parameters"


def test_a_report_is_a_dictionary() -> None:
    assert REPORT.to_dict()["experts"] == {"text": {1: (8, 6), 3: (8, 4)}, "common": {0: (4, 3)}}
    assert OperationReport(**REPORT.to_dict()) == REPORT


def test_a_notebook_shows_a_table_and_notes() -> None:
    html = REPORT._repr_html_()
    for row in (
        ("prune text", "before", "after"),
        ("parameters", "12,000", "9,500"),
        ("trainable parameters", "1,000", "0"),
        ("experts of text, layer 1", "8", "6"),
        ("experts of text, layer 3", "8", "4"),
        ("experts of common, layer 0", "4", "3"),
    ):
        mark = "th" if row[0] == "prune text" else "td"
        cells = f"</{mark}><{mark}>".join(row)
        assert f">{cells}</{mark}></tr>" in html, row
    assert html.endswith("</table><ul><li>a &lt; b</li><li>c</li></ul>")
    plain = OperationReport(operation="add", subject="", parameters_before=1, parameters_after=2)._repr_html_()
    assert "trainable" not in plain and plain.endswith("</table>") and "<th>add</th>" in plain


@pytest.mark.parametrize(("before", "after"), [(None, 5), (5, None)])
def test_trained_parameters_are_printed_only_if_both_are_known(before: int | None, after: int | None) -> None:
    report = OperationReport(
        operation="x", subject="y", parameters_before=1, parameters_after=1, trainable_before=before,
        trainable_after=after,
    )  # fmt: skip
    assert "trainable" not in str(report) and "trainable" not in report._repr_html_()


def test_bytes_hold_two_weights_and_empty_ones_say_how_many_they_stand_for() -> None:
    assert numbers_in(torch.zeros(3, 4)) == numbers_in(torch.zeros(3, 4, dtype=torch.int8)) == 12
    assert numbers_in(torch.zeros(3, 4, dtype=torch.uint8)) == 24
    empty = nn.Parameter(torch.zeros(0))
    empty.ds_numel = 30  # type: ignore[attr-defined]
    assert numbers_in(empty) == 30
    model = nn.Linear(3, 2)
    model.shared = model.weight
    model.register_buffer("table", torch.zeros(100))
    assert count_parameters(model) == 8


def test_errors_of_configurations_are_those_of_the_operation() -> None:
    assert checked("add", lambda: 3) == 3
    with pytest.raises(ValueError, match="^add: ChorusTextConfig: num_hidden_layers=0 is outside") as caught:
        checked("add", lambda: ChorusTextConfig(num_hidden_layers=0))
    assert "Validation error" not in str(caught.value)
    with pytest.raises(ValueError, match="^add: plainly$"):
        checked("add", lambda: _fail("plainly"))
    with pytest.raises(TypeError, match="^plainly$"):
        checked("add", lambda: _fail("plainly", TypeError))


def _fail(text: str, kind: type[Exception] = ValueError) -> int:
    raise kind(text)


def marked(count: int, mark: str = "lora_A") -> nn.Module:
    model = nn.ModuleDict({f"m{i}": nn.Identity() for i in range(count)})
    for module in model.values():
        setattr(module, mark, SimpleNamespace())
    return model


@pytest.mark.parametrize("mark", ["lora_A", "lora_embedding_A", "base_layer"])
def test_adapters_are_refused_whatever_their_kind(mark: str) -> None:
    with pytest.raises(ValueError, match=r"^prune: 1 modules carry adapters \(m0\); merge them"):
        refuse_adapters(marked(1, mark), "prune")


@pytest.mark.parametrize(("count", "said"), [(3, r"\(m0, m1, m2\);"), (4, r"\(m0, m1, m2 and 1 more\);")])
def test_three_of_the_adapted_modules_are_named(count: int, said: str) -> None:
    with pytest.raises(ValueError, match=f"{count} modules carry adapters {said}"):
        refuse_adapters(marked(count), "prune", may_be_quantized=True)


def stored(count: int) -> nn.Module:
    model = nn.ModuleDict({f"m{i}": nn.Linear(4, 4) for i in range(count)})
    for module in model.values():
        store_quantized(module, {"weight": quantized(module.weight, 8, 4, True)})
    return model


def test_quantised_weights_are_refused_where_an_operation_would_take_them_for_numbers() -> None:
    for count, more in ((1, ""), (2, " and 1 more"), (3, " and 2 more")):
        said = rf"^prune: m0.weight{more} are quantised; call dequantize\(model\) first, and quantize again$"
        with pytest.raises(ValueError, match=said):
            refuse_adapters(stored(count), "prune")
    refuse_adapters(stored(1), "prune", may_be_quantized=True)
    refuse_adapters(nn.Linear(2, 2), "prune")
    other = nn.Linear(4, 4)
    parametrize.register_parametrization(other, "weight", nn.Identity())
    refuse_adapters(other, "prune")
