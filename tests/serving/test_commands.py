"""The program has every command once: of two with one name, typer runs the later in silence."""

from chorus_moe.serving.commands import app


def test_no_two_commands_have_one_name() -> None:
    names = [command.name or str(command.callback.__name__).replace("_", "-") for command in app.registered_commands]
    names += [str(group.name) for group in app.registered_groups]
    assert len(names) > 15 and len(set(names)) == len(names), sorted(names)
