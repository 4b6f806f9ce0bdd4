"""The table, the JSON and the picture of routing, and where they end up."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from chorus_moe import ChorusForConditionalGeneration, ChorusProcessor
from chorus_moe.training.recipe import read_recipe
from chorus_moe.training.routing import report as routing_report
from chorus_moe.training.routing.pictures import draw_routing
from chorus_moe.training.routing.report import count_rows, routing_table, write_routing
from chorus_moe.training.routing.statistics import summarise
from chorus_moe.training.train import run_training
from tests.fake_hub import FakeHub
from tests.training.conftest import make_model
from tests.training.test_cli import folder, invoke  # noqa: F401  a fixture
from tests.training.test_data import PLAIN, write_jsonl
from tests.training.test_train import recipe  # noqa: F401  a fixture

Rows = list[dict[str, Any]]


def test_counts_do_not_depend_on_the_batch_size(
    model: ChorusForConditionalGeneration, processor: ChorusProcessor, rows: Rows
) -> None:
    one, many = (count_rows(model, processor, rows, batch_size=size) for size in (1, 4))
    assert [bank.choices_ME.tolist() for bank in one.all()] == [bank.choices_ME.tolist() for bank in many.all()]


def test_counting_leaves_the_mode_of_the_model(
    model: ChorusForConditionalGeneration, processor: ChorusProcessor, rows: Rows
) -> None:
    count_rows(model.train(), processor, rows[:1])
    assert model.training


def test_no_rows_are_refused(model: ChorusForConditionalGeneration, processor: ChorusProcessor) -> None:
    with pytest.raises(ValueError, match="there are no rows"):
        count_rows(model, processor, [])


def test_a_model_without_experts_is_refused(processor: ChorusProcessor, rows: Rows, config: Any) -> None:
    config.text_config.mlp_layer_types = ["dense"] * 3
    with pytest.raises(ValueError, match="no sparse layer"):
        count_rows(ChorusForConditionalGeneration(config), processor, rows)


def test_the_table_has_a_line_for_each_bank_of_each_layer(
    model: ChorusForConditionalGeneration, processor: ChorusProcessor, rows: Rows
) -> None:
    counters = count_rows(model, processor, rows)
    lines = routing_table(summarise(counters)).splitlines()
    names = [(str(layer), name) for layer, banks in counters.banks.items() for name in banks]
    assert [tuple(line.split()[:2]) for line in lines[1:-1]] == names
    assert f"{int(counters.banks[1]['common'].tokens_M.sum()):,}" in lines[2]
    assert len({len(line) for line in lines[:-1]}) == 1


def test_json_holds_the_exact_counts_and_no_nan(
    model: ChorusForConditionalGeneration, processor: ChorusProcessor, rows: Rows, tmp_path: Path
) -> None:
    counters = count_rows(model, processor, rows)
    assert write_routing(tmp_path, counters) == tmp_path / "routing.png"
    figures = json.loads((tmp_path / "routing.json").read_text(), parse_constant=pytest.fail)
    first = figures["counts"][0]
    assert (first["layer"], first["bank"]) == (1, "audio")
    assert first["choices"]["audio"] == counters.banks[1]["audio"].choices_ME[2].tolist()
    assert np.shape(figures["weight_shares"]["banks"]["common"]) == (2, 3, 4)


def test_without_matplotlib_there_is_json_and_no_picture(
    model: ChorusForConditionalGeneration,
    processor: ChorusProcessor,
    rows: Rows,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(routing_report, "can_draw", lambda: False)
    assert write_routing(tmp_path, count_rows(model, processor, rows)) is None
    assert [path.name for path in tmp_path.iterdir()] == ["routing.json"]


def test_a_large_model_makes_a_picture_of_bounded_size(tmp_path: Path) -> None:
    shares = {name: np.random.default_rng(0).random((48, 3, 128)) / 256 for name in ("common", "text")}
    draw_routing(tmp_path / "large.png", shares, range(48))
    with Image.open(tmp_path / "large.png") as picture:
        assert max(picture.size) < 3_000


def test_experts_that_a_layer_lacks_are_null_in_json_and_grey_in_the_picture(
    processor: ChorusProcessor, rows: Rows, tmp_path: Path
) -> None:
    model = make_model(processor.tokenizer, expert_banks={"text": {"num_experts": [2, 5]}, "common": {}}).eval()
    counters = count_rows(model, processor, rows)
    assert "/2" in routing_table(summarise(counters)) and "/5" in routing_table(summarise(counters))
    assert write_routing(tmp_path, counters) == tmp_path / "routing.png"
    figures = json.loads((tmp_path / "routing.json").read_text(), parse_constant=pytest.fail)
    first, second = figures["weight_shares"]["banks"]["text"]
    assert all(row[2:] == [None] * 3 and None not in row[:2] for row in first)
    assert not any(None in row for row in second)


def test_the_command_prints_the_table_and_writes_both_files(
    folder: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    data = write_jsonl(tmp_path / "test.jsonl", [{"messages": PLAIN}] * 3)
    printed = invoke("routing", "--model", folder, "--data", data, "--out", tmp_path / "out", "--limit", 2)
    assert "load entropy" in printed and "routing.png" in printed
    figures = json.loads((tmp_path / "out" / "routing.json").read_text())
    whole = invoke("routing", "--model", folder, "--data", data, "--out", tmp_path / "whole")
    assert whole != printed
    more = json.loads((tmp_path / "whole" / "routing.json").read_text())
    assert 3 * figures["counts"][1]["tokens"]["text"] == 2 * more["counts"][1]["tokens"]["text"] > 0


def test_a_run_puts_the_picture_on_its_card_and_on_the_hub(
    fake_hub: FakeHub,
    recipe: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    words = ["--push_to_hub", "true", "--hub_model_id", "tester/routed", "--max_steps", "1", "--save_strategy", "no"]
    run_training(read_recipe(recipe, words))
    assert "(routing.png)" in (tmp_path / "out" / "README.md").read_text()
    assert (tmp_path / "out" / "routing.png").is_file()
    from huggingface_hub import list_repo_files

    assert {"routing.png", "README.md"} <= set(list_repo_files("tester/routed"))
