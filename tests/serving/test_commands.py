"""The program has every command once: of two with one name, typer runs the later in silence. All that run a model say
on which device and in what numbers, or what to ask for instead."""

from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.main import get_group

from chorus_moe.serving import commands
from chorus_moe.serving.commands import app, need, read_pairs
from chorus_moe.serving.exporting import programs
from chorus_moe.serving.exporting.programs import FORMATS

# They run no model: their `--device`, where they have one, is a kind to plan for.
WITHOUT_MODEL = {"recipes", "inspect", "plan"}


def test_no_two_commands_have_one_name() -> None:
    names = [command.name or str(command.callback.__name__).replace("_", "-") for command in app.registered_commands]
    names += [str(group.name) for group in app.registered_groups]
    assert len(names) > 15 and len(set(names)) == len(names), sorted(names)


def test_every_command_that_runs_a_model_takes_device_and_dtype_or_says_what_to_use() -> None:
    commands = dict(get_group(app).commands)
    federated = commands.pop("federated")
    assert isinstance(federated, typer.core.TyperGroup)
    lacks = {}
    for name, command in {**commands, **federated.commands}.items():
        # The reader of a recipe's options takes `--dtype`, and names `--use_cpu` where `--device` is asked for.
        passes_on = command.context_settings.get("allow_extra_args", False)
        missing = {"device", "dtype"} - {parameter.name for parameter in command.params}
        if missing and not passes_on and name not in WITHOUT_MODEL:
            lacks[name] = missing
    assert not lacks


def test_adapters_by_name() -> None:
    assert read_pairs(None) == read_pairs([]) == {}
    assert read_pairs(["a=x", "b=y=z"]) == {"a": "x", "b": "y=z"}


@pytest.mark.parametrize("value", ["", "a", "a=", "=x", "="])
def test_an_adapter_without_name_or_folder_is_refused(value: str) -> None:
    with pytest.raises(ValueError, match=f"--adapter '{value}': expected NAME=FOLDER"):
        read_pairs(["b=y", value])


def test_a_name_given_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="the name 'a' is given twice"):
        read_pairs(["a=x", "a=y"])


def test_what_an_extra_lacks_is_named() -> None:
    need("serve", "json", "torch")
    with pytest.raises(
        ImportError, match=r"`chorus-moe serve` needs no_such, nor_this: pip install 'chorus-moe\[serve\]'"
    ):
        need("serve", "json", "no_such", "nor_this")


def test_defaults_of_the_program_are_those_of_the_functions() -> None:
    pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
    from chorus_moe.serving.server import build_app, run_server

    asked = {parameter.name: parameter.default for parameter in dict(get_group(app).commands)["serve"].params}
    own = {**signature(build_app).parameters, **signature(run_server).parameters}
    assert asked["max_request_mb"] * 2**20 == own["max_request_bytes"].default
    for name in ("max_batch", "host", "port", "drain_seconds"):
        assert asked[name] == own[name].default, name


@pytest.mark.parametrize(("format", "said"), [("torch", ""), ("onnx", ", within 2.5e-06 of the model")])
def test_graphs_are_listed_with_their_size_and_how_near_they_are(
    format: str, said: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """As `export_model` would write them, which test_onnx_model.py and test_parts.py run."""

    def write(model: Any, processor: Any, out: Path, asked: str) -> dict[str, float]:
        assert asked == format and processor.tokenizer is not None
        out.mkdir()
        (out / f"decoder{FORMATS[asked]}").write_bytes(bytes(3 * 2**20 + 2**19))
        return {"decoder": 2.5e-6} if asked == "onnx" else {}

    monkeypatch.setattr(programs, "export_model", write)
    monkeypatch.setattr(commands, "need", lambda *names: None)
    assert not app(["export-graphs", str(folder), str(tmp_path / "out"), "--format", format], standalone_mode=False)
    assert capsys.readouterr().out == f"{tmp_path / 'out' / 'decoder'}{FORMATS[format]}: 3.5 MB{said}\n"
