"""The program has every command once: of two with one name, typer runs the later in silence. All that run a model say
on which device and in what numbers, or what to ask for instead."""

from inspect import signature

import pytest
import typer
from typer.main import get_group

from chorus_moe.serving.commands import app, need, read_pairs

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
