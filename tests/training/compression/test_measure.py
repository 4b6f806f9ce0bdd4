"""What is measured of a model and how it is shown: by hand, with a clock of our own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from chorus_moe import ChorusForConditionalGeneration, ChorusProcessor
from chorus_moe.training.compression import measure as module
from chorus_moe.training.compression.measure import (
    Measurement,
    markdown_of,
    measure,
    memory_of,
    speed_of,
    table_of,
    weight_bytes,
)
from chorus_moe.training.compression.steps import bytes_on_disk
from tests.training.conftest import QUESTION, make_rows

START = Measurement("start", 2_000, 4_000, 10.0, 0.5, 1.25, {"a": 0.5, "": 0.25}, {"text": 1.0})
SMALL = Measurement("1 quantize", 500, 1_500_000, 12.34, 0.505, 2.0, {"a": 1.0, "": 0.0}, {"text": 0.125})
BARE = Measurement("start", 2_000, 4_000, 10.0)


def test_memory_is_that_of_parameters_and_buffers_each_once() -> None:
    model = nn.Linear(3, 2)
    model.shared = model.weight
    model.narrow = nn.Parameter(torch.zeros(5, dtype=torch.bfloat16))
    model.register_buffer("table", torch.zeros(7, dtype=torch.int64))
    model.register_buffer("unsaved", torch.zeros(2, dtype=torch.uint8), persistent=False)
    assert memory_of(model) == 4 * (6 + 2) + 2 * 5 + 8 * 7 + 2


def test_weights_are_the_safetensors_of_the_folder_itself(tmp_path: Path) -> None:
    assert weight_bytes(tmp_path / "nothing") == 0
    for name, size in (("a.safetensors", 3), ("b.safetensors", 4), ("c.bin", 50), ("d.safetensors.index.json", 60)):
        (tmp_path / name).write_bytes(bytes(size))
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "e.safetensors").write_bytes(bytes(100))
    assert weight_bytes(tmp_path) == 7


@pytest.fixture
def answered(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Answers take 100, 1, 2, 3, 4 and 50 seconds."""
    calls: list[Any] = []
    clock = iter([0, 100, 0, 1, 0, 2, 0, 3, 0, 4, 0, 50])
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(module, "answer_rows", lambda *given, **options: calls.append((given, options)))
    return calls


def test_speed_is_a_median_without_the_first_answer(answered: list[Any]) -> None:
    prompt = {"messages": []}
    assert speed_of("model", "processor", prompt) == 32 / 3  # type: ignore[arg-type]
    assert len(answered) == 6
    assert answered[0] == (("model", "processor", [prompt]), {"max_new_tokens": 32, "min_new_tokens": 32})


@pytest.mark.parametrize("has_rows", [True, False])
@pytest.mark.parametrize("has_folder", [True, False])
def test_a_measurement_reads_folder_model_and_rows(
    has_rows: bool, has_folder: bool, model: ChorusForConditionalGeneration, processor: ChorusProcessor,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    asked: list[Any] = []

    class Result:
        def to_dict(self) -> dict[str, Any]:
            return {"accuracy": 0.75, "loss": 1.5} | ({"accuracy_by_task": {"a": 1.0}} if has_folder else {})

    def evaluate(*given: Any, **options: Any) -> Result:
        asked.append((given, options))
        return Result()

    monkeypatch.setattr(module, "evaluate_rows", evaluate)
    monkeypatch.setattr(module, "speed_of", lambda model, processor, prompt: asked.append(prompt) or 7.0)
    if has_folder:
        (tmp_path / "model.safetensors").write_bytes(bytes(11))
    rows: Any = make_rows(2) if has_rows else None
    given = {"batch_size": 3, "max_new_tokens": 4, "notes": ("n",)}
    found = measure("1 prune", tmp_path, model, processor, rows, **given)  # type: ignore[arg-type]
    assert (found.step, found.notes, found.tokens_per_second) == ("1 prune", ["n"], 7.0)
    assert found.bytes == (11 if has_folder else bytes_on_disk(model)) and found.memory == memory_of(model)
    if has_rows:
        assert (found.accuracy, found.loss, found.by_medium) == (0.75, 1.5, {})
        assert found.by_task == ({"a": 1.0} if has_folder else {})
        assert asked[0] == ((model, processor, rows), {"batch_size": 3, "max_new_tokens": 4, "progress": False})
        # The first row without its answer.
        assert [turn["role"] for turn in asked[1]["messages"]] == ["user"] and len(asked[1]["images"]) == 1
    else:
        assert (found.accuracy, found.loss, found.by_task, found.by_medium) == (None, None, {}, {})
        assert asked == [module.user_turn("What do you see and hear?")]
    assert found.to_dict()["notes"] == ["n"]
    assert QUESTION not in str(found)


def test_a_table_has_a_line_a_step_and_accuracy_by_kind_below() -> None:
    assert table_of([START, SMALL]).splitlines() == [
        f"{'step':<16}{'bytes':>14}{'share':>8}{'accuracy':>10}{'loss':>9}{'tokens/s':>10}{'memory':>10}",
        f"{'start':<16}{'2,000':>14}{'1.000':>8}{'50.0%':>10}{'1.2500':>9}{'10.0':>10}{'4.0 kB':>10}",
        f"{'1 quantize':<16}{'500':>14}{'0.250':>8}{'50.5%':>10}{'2.0000':>9}{'12.3':>10}{'1.5 MB':>10}",
        "",
        f"{'accuracy by task':<24}{'start':>14}{'1 quantize':>14}",
        f"{'a':<24}{'50.0%':>14}{'100.0%':>14}",
        f"{'(none)':<24}{'25.0%':>14}{'0.0%':>14}",
        "",
        f"{'accuracy by medium':<24}{'start':>14}{'1 quantize':>14}",
        f"{'text':<24}{'100.0%':>14}{'12.5%':>14}",
    ]


def test_a_table_without_rows_has_no_accuracy() -> None:
    (_, line) = table_of([BARE]).splitlines()
    assert line == f"{'start':<16}{'2,000':>14}{'1.000':>8}{'-':>10}{'-':>9}{'10.0':>10}{'4.0 kB':>10}"


def test_a_card_has_the_table_accuracy_by_kind_and_the_plan() -> None:
    assert markdown_of([START, SMALL], "steps: []\n\n") == [
        "## How it was made smaller",
        "",
        "| step | bytes | share | accuracy | tokens/s | memory |",
        "| --- | --- | --- | --- | --- | --- |",
        "| start | 2,000 | 1.000 | 50.0% | 10.0 | 4.0 kB |",
        "| 1 quantize | 500 | 0.250 | 50.5% | 12.3 | 1.5 MB |",
        "",
        "| accuracy | start | 1 quantize |",
        "| --- | --- | --- |",
        "| task a | 50.0% | 100.0% |",
        "| task (none) | 25.0% | 0.0% |",
        "| medium text | 100.0% | 12.5% |",
        "",
        "Plan:",
        "",
        "```yaml",
        "steps: []",
        "```",
        "",
    ]
    bare = markdown_of([BARE], "x")
    assert bare[4:8] == ["| start | 2,000 | 1.000 | - | 10.0 | 4.0 kB |", "", "Plan:", ""]
