"""How configurations and reports print."""

import re
from html import unescape

from chorus_moe import ChorusConfig, ChorusForConditionalGeneration
from chorus_moe.surgery import close_bank, parameter_report
from chorus_moe.surgery.printing import Table
from tests.conftest import tiny_config


def cells(html: str) -> list[list[str]]:
    """The rows of HTML tables, as text."""
    rows = re.findall(r"<tr>(.*?)</tr>", html)
    return [[unescape(cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)] for row in rows]


def test_a_configuration_prints_what_is_not_default_within_thirty_lines() -> None:
    layers = ["dense"] * 9 + ["sparse"] + ["dense"] * 20
    banks = {"common": {"router": "sigmoid", "num_experts": 16}, "image": {"layers": [9]}}
    text = {"num_hidden_layers": 30, "mlp_layer_types": layers, "expert_banks": banks, "router_z_loss_coef": 0.125}
    config = tiny_config(cross_modal_layers=[29], **text)
    shown = str(config)
    assert len(shown.splitlines()) <= 30 < len(config.to_json_string().splitlines())
    for value in ("router_z_loss_coef=0.125", "[9 x dense, sparse, 20 x dense]", "image_token_id=3", "num_mel_bins=16"):
        assert value in " ".join(shown.split()), value
    (common,) = (line for line in shown.splitlines() if "bank common" in line)
    assert "num_experts=16" in common and "router=sigmoid" in common and "expert_depth" not in common
    # Unless it is said otherwise.
    rope = {"rope_type": "default", "rope_theta": 9_999.0}
    assert "rope_parameters" not in shown and "9999" in str(tiny_config(rope_parameters=rope))
    assert "rms_norm_eps" not in shown and "rms_norm_eps=0.5" in str(tiny_config(rms_norm_eps=0.5))
    assert str(ChorusConfig.from_dict(config.to_dict())) == shown


def test_reports_are_tables_in_a_notebook() -> None:
    model = ChorusForConditionalGeneration(tiny_config())
    report = parameter_report(model)
    assert ["total", f"{report.total:,}"] in cells(report._repr_html_())
    for name, bank in report.banks.items():
        assert [name, f"{bank['total']:,}", f"{bank['active']:,}"] in cells(report._repr_html_())
    closed = close_bank(model, "image")
    rows = cells(closed._repr_html_())
    assert rows[0] == [f"close_bank {closed.subject}", "before", "after"]
    assert rows[1] == ["parameters", f"{closed.parameters_before:,}", f"{closed.parameters_after:,}"]
    assert all(note in unescape(closed._repr_html_()) for note in closed.notes)


def test_what_users_named_is_escaped() -> None:
    html = Table(("name", "share"), [("<b>", float("nan")), ("x", 0.25)]).to_html()
    assert "<b>" not in html and cells(html)[1:] == [["<b>", "-"], ["x", "0.250"]]
