"""`chorus-moe launch`: what it hands over, and what it writes."""

from pathlib import Path
from typing import Any

import pytest

from chorus_moe.serving.commands import app
from chorus_moe.training.scale import launch as module
from chorus_moe.training.scale.launch import Launch


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    seen: list[Any] = []
    monkeypatch.setattr(module, "start", lambda launch, starter: seen.append(("start", launch, starter)) or exit(3))
    monkeypatch.setattr(
        module, "launch_file", lambda launch, starter: seen.append(("file", launch, starter)) or ("run.sh", "text\n")
    )
    return seen


def run(*words: str) -> None:
    app(["launch", *words], standalone_mode=False)


def test_defaults_start_eight_devices_of_this_machine(asked: list[Any]) -> None:
    with pytest.raises(SystemExit):
        run("multimodal")
    assert asked == [("start", Launch("multimodal", 1, 8, [], "H100", None), "torchrun")]


def test_options_and_overrides_reach_the_starter(asked: list[Any]) -> None:
    words = ["--nodes", "2", "--gpus-per-node", "4", "--with", "skypilot", "--accelerator", "A100", "--bucket", "b"]
    with pytest.raises(SystemExit):
        run("multimodal", *words, "--learning_rate", "1e-4")
    expected = Launch("multimodal", 2, 4, ["--learning_rate", "1e-4"], "A100", "b")
    assert asked == [("start", expected, "skypilot")]


def test_a_dry_run_prints_or_writes_the_file(
    asked: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("multimodal", "--dry-run")
    assert capsys.readouterr().out == "text\n"
    folder = tmp_path / "a" / "b"
    run("multimodal", "--dry-run", "--out", str(folder))
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", f"wrote {folder / 'run.sh'}\n")
    assert (folder / "run.sh").read_text() == "text\n" and {kind for kind, *_ in asked} == {"file"}
    # Again, into a folder that is there.
    (folder / "run.sh").write_text("old")
    run("multimodal", "--dry-run", "--out", str(folder))
    assert (folder / "run.sh").read_text() == "text\n"


@pytest.mark.parametrize("words", [["--nodes", "0"], ["--gpus-per-node", "0"]])
def test_no_device_is_refused(words: list[str]) -> None:
    with pytest.raises(Exception, match="greater than or equal to 1"):
        run("multimodal", *words)
