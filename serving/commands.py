"""The program `chorus-moe`: the commands of `training.cli`, and those that talk to a model.

Commands import what they need when they run, so that `--help` is quick.
"""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from chorus_moe.training.cli import (
    BaseName,
    DeviceName,
    DtypeName,
    ModelName,
    app,
    check_dtype,
    main,
    print_choice,
)
from chorus_moe.training.options import without
from chorus_moe.training.scale import launch_command, plan_command

__all__ = ["app", "launch_command", "main", "plan_command"]

GRAPHS = "graphs are traced on the CPU in float32; the runtime that reads them chooses its own"
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


@app.command()
def chat(
    model: ModelName,
    base: BaseName = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    compile: Annotated[bool, typer.Option("--compile", help="compile decoding first, which takes a while")] = False,
    device: DeviceName = None,
    dtype: DtypeName = "auto",
) -> None:
    """Talk to a model in the terminal; /image PATH and /audio PATH show it media, /help lists the rest."""
    from chorus_moe.serving.chat import HELP, Chat, terminal_lines, write_now
    from chorus_moe.serving.conversation import Conversation
    from chorus_moe.serving.voices import check_generates, load_voices
    from chorus_moe.training.loading import find_device

    check_dtype(dtype)
    voices, processor = load_voices(model, base=base, device=find_device(device), dtype=dtype)
    voice = next(iter(voices.values()))
    check_generates(voice.model)
    print_choice(model, voice.model)
    if compile:
        from chorus_moe.fastpaths.compiled_decoding import compile_decoding

        compile_decoding(voice.model)
        print("compiling ...", file=sys.stderr)
        # A few words, so that the first question does not wait.
        for _ in Conversation(voice, processor, max_new_tokens=4).ask("hello")[1]:
            pass
    print(HELP, file=sys.stderr)
    Chat(Conversation(voice, processor, max_new_tokens), write_now).run(terminal_lines())


@app.command()
def page(
    model: ModelName,
    adapter: AdapterNames = None,
    base: BaseName = None,
    host: Annotated[str, typer.Option(help="0.0.0.0 for browsers on other machines")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 7860,
    examples: Annotated[
        Path | None, typer.Option(help="rows in JSON lines, one click each", exists=True, dir_okay=False)
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    device: DeviceName = None,
    dtype: DtypeName = "auto",
) -> None:
    """Talk to a model in the browser, with camera and microphone, and see what its experts do; of a classifier see its
    labels, of an embedding model what is nearest."""
    need("page", "gradio")
    from chorus_moe.serving.page import Page, read_examples, run_page
    from chorus_moe.serving.page_heads import PAGES
    from chorus_moe.serving.voices import check_generates, load_voices, saved_kind
    from chorus_moe.training.loading import find_device

    check_dtype(dtype)
    kind = saved_kind(model, base)
    options: dict[str, Any] = {"base": base, "device": find_device(device), "dtype": dtype}
    if kind in PAGES:
        options["kind"] = kind
    voices, processor = load_voices(model, read_pairs(adapter), **options)
    voice = next(iter(voices.values()))
    print_choice(model, voice.model)
    layout: Any
    if kind in PAGES:
        layout = PAGES[kind](voices, processor)
    else:
        check_generates(voice.model)
        layout = Page(voices, processor, max_new_tokens)
    blocks = layout.build(read_examples(examples) if examples else ())
    print(f"http://{host}:{port}", file=sys.stderr)
    run_page(blocks, host, port)


@app.command()
def export_graphs(
    model: ModelName,
    out: Annotated[Path, typer.Argument(help="folder for the graphs, the configuration and the processor")],
    format: Annotated[str, typer.Option(help="onnx, or torch for torch.export's archives")] = "onnx",
    base: BaseName = None,
    device: Annotated[str | None, without("--device", GRAPHS)] = None,
    dtype: Annotated[str | None, without("--dtype", GRAPHS)] = None,
) -> None:
    """Write a model, adapters merged, as graphs for other runtimes, and compare onnxruntime's answers with its own."""
    if format == "onnx":
        need("export", "onnx", "onnxscript", "onnxruntime")
    from chorus_moe.serving.exporting.programs import FORMATS, export_model
    from chorus_moe.serving.voices import saved_kind
    from chorus_moe.surgery import fuse_experts
    from chorus_moe.training.loading import base_model, load_model

    loaded, processor = load_model(
        model, base=base, merge=True, kind=saved_kind(model, base), dtype="float32", device="cpu"
    )
    print_choice(model, loaded)
    if base_model(loaded).config.text_config.experts_layout != "fused":
        fuse_experts(base_model(loaded))
    found = export_model(base_model(loaded), processor, out, format)
    for path in sorted(out.glob(f"*{FORMATS[format]}")):
        checked = f", within {found[path.stem]:.1e} of the model" if found else ""
        print(f"{out / path.name}: {path.stat().st_size / 2**20:,.1f} MB{checked}")


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
