"""The program `chorus-moe`: the commands of `training.cli`, and those that talk to a model.

Commands import what they need when they run, so that `--help` is quick.
"""

from typing import Annotated

import typer

from chorus_moe.training.cli import BaseName, DeviceName, DtypeName, ModelName, app, check_dtype, main, print_choice

__all__ = ["app", "main"]

AdapterNames = Annotated[
    list[str] | None, typer.Option("--adapter", help="NAME=FOLDER or Hub id of an adapter; may be repeated")
]


@app.command()
def serve(
    model: ModelName,
    adapter: AdapterNames = None,
    base: BaseName = None,
    host: Annotated[str, typer.Option(help="0.0.0.0 for clients on other machines")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 for any that is free")] = 8000,
    max_batch: Annotated[int, typer.Option(min=1, help="requests that are answered at once")] = 8,
    max_request_mb: Annotated[int, typer.Option(min=1, help="size of a request, files in base64 included")] = 64,
    drain_seconds: Annotated[int, typer.Option(min=0, help="time for begun answers after SIGTERM")] = 30,
    device: DeviceName = None,
    dtype: DtypeName = "auto",
) -> None:
    """Answer over the OpenAI chat API: text, images and sound, streamed or whole, adapters by name."""
    need("serve", "fastapi", "openai", "uvicorn")
    from chorus_moe.serving.server import build_app, run_server
    from chorus_moe.serving.voices import check_generates, load_voices
    from chorus_moe.training.loading import find_device

    check_dtype(dtype)
    voices, processor = load_voices(model, read_pairs(adapter), base=base, device=find_device(device), dtype=dtype)
    first = next(iter(voices.values()))
    check_generates(first.model)
    print_choice(model, first.model)
    web = build_app(voices, processor, max_batch=max_batch, max_request_bytes=max_request_mb * 2**20)
    run_server(web, host, port, drain_seconds)


def need(extra: str, *packages: str) -> None:
    """Raises: ImportError: a package of an extra is missing; says how to install it."""
    from importlib.util import find_spec

    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise ImportError(f"`chorus-moe {extra}` needs {', '.join(missing)}: pip install 'chorus-moe[{extra}]'")


def read_pairs(values: list[str] | None) -> dict[str, str]:
    """NAME=FOLDER options as a dict.

    Raises:
        ValueError: not of that form, or a name twice.
    """
    pairs: dict[str, str] = {}
    for value in values or []:
        name, equals, path = value.partition("=")
        if not (name and equals and path):
            raise ValueError(f"--adapter {value!r}: expected NAME=FOLDER")
        if name in pairs:
            raise ValueError(f"--adapter {value!r}: the name {name!r} is given twice")
        pairs[name] = path
    return pairs


if __name__ == "__main__":
    main()
