"""The commands: what they print, and errors in one line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
from PIL import Image
from typer.testing import CliRunner

from chorus_moe import ChorusForConditionalGeneration, ChorusProcessor
from chorus_moe.training import cli
from tests.training.test_data import PLAIN, SOUND, write_jsonl
from tests.training.test_train import recipe  # noqa: F401  a fixture

COMMANDS = {"train", "evaluate", "generate", "routing", "inspect", "doctor", "compose", "export", "demo"}


def invoke(*words: object) -> str:
    result = CliRunner().invoke(cli.app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def as_program(words: list[str], check: str) -> str:
    """Run the program in a process of its own, then `check`; the last line that this printed."""
    start = f"import sys; sys.argv = {['chorus-moe', *words]!r}; from chorus_moe.training.cli import app"
    code = f"{start}; app(standalone_mode=False); {check}"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.splitlines()[-1]


@pytest.fixture
def folder(model: ChorusForConditionalGeneration, processor: ChorusProcessor, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_the_program_lists_its_commands() -> None:
    program = Path(sys.executable).with_name("chorus-moe")
    done = subprocess.run([program, "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert all(name in done.stdout for name in COMMANDS)


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["inspect", "--help"]])
def test_help_imports_neither_torch_nor_transformers(words: list[str]) -> None:
    assert as_program(words, "print({'torch', 'transformers'} & sys.modules.keys())") == "set()"


def test_the_program_has_every_public_name() -> None:
    check = "import chorus_moe; print([name for name in chorus_moe.__all__ if not hasattr(chorus_moe, name)])"
    assert as_program(["--help"], check) == "[]"


def test_the_program_refuses_a_name_nobody_knows() -> None:
    check = "import chorus_moe; print(hasattr(chorus_moe, 'ChorusModl'), hasattr(chorus_moe, '__wrapped__'))"
    assert as_program(["--help"], check) == "False False"


def test_a_command_of_the_program_knows_the_auto_classes(folder: Path) -> None:
    words = ["generate", "--model", str(folder), "--text", "what is it?", "--max-new-tokens", "2"]
    check = "from transformers import AutoConfig; print(AutoConfig.for_model('chorus').model_type)"
    assert as_program(words, check) == "chorus"


def test_an_error_of_the_users_making_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "none.json"
    monkeypatch.setattr(sys, "argv", ["chorus-moe", "inspect", str(path)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == f"chorus-moe: FileNotFoundError: no configuration at '{path}'"


def test_inspect_prints_a_table_or_json(folder: Path, model: ChorusForConditionalGeneration) -> None:
    total = sum(parameter.numel() for parameter in model.parameters())
    assert f"{total:,}" in invoke("inspect", folder)
    assert json.loads(invoke("inspect", folder / "config.json", "--json"))["total"] == total


def test_evaluate_prints_accuracy_and_loss(folder: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "test.jsonl", [{"messages": PLAIN}] * 2)
    values = json.loads(invoke("evaluate", "--model", folder, "--data", data, "--max-new-tokens", 2, "--json"))
    assert values["num_rows"] == 2
    assert values["loss"] > 0


def test_generate_answers_pictures_and_sound(folder: Path, tmp_path: Path) -> None:
    Image.new("L", (20, 20)).save(tmp_path / "a.png")
    soundfile.write(tmp_path / "a.wav", SOUND, 16_000)
    media = ["--image", tmp_path / "a.png", "--audio", tmp_path / "a.wav"]
    printed = invoke("generate", "--model", folder, "--text", "what is it?", *media, "--max-new-tokens", 3)
    assert printed.endswith("\n")


def test_export_writes_code_and_card(folder: Path, tmp_path: Path) -> None:
    invoke("export", folder, tmp_path / "export")
    assert {"modeling_generation.py", "README.md", "config.json"} <= {p.name for p in (tmp_path / "export").iterdir()}


def test_train_takes_a_recipe_and_overrides(recipe: Path, tmp_path: Path) -> None:  # noqa: F811
    invoke("train", "--config", recipe, "--max_steps", "1", "--output_dir", tmp_path / "other")
    assert json.loads((tmp_path / "other" / "trainer_state.json").read_text())["global_step"] == 1


def test_train_refuses_an_option_nobody_knows(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(sys, "argv", ["chorus-moe", "train", "--config", str(recipe), "--learning_rte", "1"])
    with pytest.raises(SystemExit, match="did you mean '--learning_rate'"):
        cli.main()


def test_demo_hands_its_options_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from chorus_moe.training.demo import run as demo

    seen: list[list[str]] = []
    monkeypatch.setattr(demo, "main", lambda arguments: seen.append(list(arguments)))
    invoke("demo", "--out", "somewhere", "--seed", "3")
    assert seen == [["--out", "somewhere", "--seed", "3"]]
