"""`chorus-moe plan`: the question that its options make."""

import json
from pathlib import Path
from typing import Any

import pytest

from chorus_moe.serving.commands import app
from chorus_moe.training import inspect_model
from chorus_moe.training.scale import plan as module
from chorus_moe.training.scale.plan_rates import read_rates


class Made:
    def to_dict(self) -> dict[str, Any]:
        return {"a": 1}

    def __str__(self) -> str:
        return "a table"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    seen: list[Any] = []
    monkeypatch.setattr(inspect_model, "read_config", lambda source: f"config of {source}")
    monkeypatch.setattr(module, "make_plan", lambda *given: seen.append(given) or Made())
    return seen


def run(*words: str) -> None:
    app(["plan", "model", "--gpus", "16", *words], standalone_mode=False)


def test_defaults_ask_for_three_layouts_of_whole_training(asked: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    run()
    ((config, question, best),) = asked
    rates = read_rates("h100", None)
    assert (config, best) == ("config of model", 3)
    assert question == module.Question(
        gpus=16, memory=round(rates.memory), rates=rates, per_node=8, sequence_length=4096, batch=0, micro_batch=1,
        train="whole", precision="mixed", mix=None,
    )  # fmt: skip
    said = capsys.readouterr()
    assert (said.out, said.err) == ("a table\n", "counting ...\n")


def test_every_option_reaches_the_question(
    asked: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rates.yaml").write_text("memory: 5000000000\n")
    words = {
        "--memory": "40GB", "--gpus-per-node": "4", "--device": "a100", "--sequence-length": "128", "--batch": "32",
        "--micro-batch": "2", "--train": "lora", "--precision": "float32", "--mix": "text=0.5,image=0.5",
        "--best": "1",
    }  # fmt: skip
    run(*(word for pair in words.items() for word in pair), "--json")
    ((_, question, best),) = asked
    assert question == module.Question(
        gpus=16, memory=40 * 10**9, rates=read_rates("a100", None), per_node=4, sequence_length=128, batch=32,
        micro_batch=2, train="lora", precision="float32", mix={"text": 0.5, "image": 0.5},
    )  # fmt: skip
    assert best == 1 and json.loads(capsys.readouterr().out) == {"a": 1}
    run("--rates", str(tmp_path / "rates.yaml"))
    assert asked[-1][1].memory == 5 * 10**9


@pytest.mark.parametrize("name", ["--gpus-per-node", "--sequence-length", "--batch", "--micro-batch", "--best"])
def test_numbers_below_one_are_refused(name: str) -> None:
    with pytest.raises(Exception, match="greater than or equal to 1"):
        run(name, "0")
