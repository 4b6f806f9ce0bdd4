"""The program has every command once: of two with one name, typer runs the later in silence. All that run a model say
on which device and in what numbers, or what to ask for instead."""

import typer
from typer.main import get_group

from chorus_moe.serving.commands import app

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
