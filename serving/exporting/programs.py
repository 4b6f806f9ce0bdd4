"""Graphs of a model by `torch.export`, and as ONNX files that answer as the model does."""

import inspect
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.export import Dim, ExportedProgram

from chorus_moe.modeling.modeling_base import ChorusPreTrainedModel
from chorus_moe.processors.processing_chorus import ChorusProcessor
from chorus_moe.serving.exporting.experts import ONNX_TRANSLATIONS, exported_experts
from chorus_moe.serving.exporting.parts import Part, parts_of
from chorus_moe.training.saving import saved_whole

# Format -> suffix of its files.
FORMATS = {"onnx": ".onnx", "torch": ".pt2"}
# Both sum float32 in an order of their own: 2e-7 on a small model, more on a wide one. A wrong expert moves more.
TOLERANCE = 1e-4


def export_programs(model: ChorusPreTrainedModel) -> dict[str, ExportedProgram]:
    """`torch.export`'s graph of every part, by name: for AOTInductor, ExecuTorch and others that read them.

    Raises:
        ValueError: see `parts_of`.
    """
    with tracing(model) as parts:
        return {part.name: program_of(part) for part in parts}


@contextmanager
def tracing(model: ChorusPreTrainedModel) -> Iterator[list[Part]]:
    """The parts of a model, which within is as its graphs are to be."""
    parts = parts_of(model)
    was_training = model.training
    for part in parts:
        part.module.eval()
    try:
        with torch.no_grad():
            yield parts
    finally:
        model.train(was_training)


def program_of(part: Part) -> ExportedProgram:
    """A graph for every size that may change."""
    shapes = [dict.fromkeys(part.axes[name], Dim.AUTO) for name in part.inputs]
    return torch.export.export(part.module, tuple(part.inputs.values()), dynamic_shapes=nested(part, shapes))


def nested(part: Part, values: list[Any]) -> tuple[Any, ...]:
    """One value an input, as `torch.export` wants them: those of `*past` as one."""
    own = [p for p in inspect.signature(part.module.forward).parameters.values() if p.kind is not p.VAR_POSITIONAL]
    rest = values[len(own) :]
    return (*values[: len(own)], tuple(rest)) if rest else tuple(values)


def export_model(
    model: ChorusPreTrainedModel,
    processor: ChorusProcessor | None,
    folder: str | os.PathLike[str],
    format: str = "onnx",
) -> dict[str, float]:
    """Write a model as graphs, with its configuration and processor, into a folder.

    Args:
        model: float32, on the CPU, without adapters.
        format: `onnx`, or `torch` for `torch.export`'s archives.

    Returns:
        Part -> largest difference of onnxruntime's answer to an example from the model's; empty for `torch`.

    Raises:
        ValueError: an unknown format, a model that no graph can hold (see `parts_of`), or a part that onnxruntime
            answers otherwise.
    """
    if format not in FORMATS:
        raise ValueError(f"format={format!r}; choose from {', '.join(FORMATS)}")
    found = {}
    with saved_whole(folder) as aside:
        if format == "torch":
            for name, program in export_programs(model).items():
                torch.export.save(program, aside / f"{name}{FORMATS[format]}")
        else:
            with tracing(model) as parts, exported_experts(model):
                for part in parts:
                    found[part.name] = write_onnx(part, aside / f"{part.name}{FORMATS[format]}")
        model.config.save_pretrained(aside)
        if model.can_generate():
            model.generation_config.save_pretrained(aside)
        if processor is not None:
            processor.save_pretrained(aside)
    return found


def write_onnx(part: Part, path: Path) -> float:
    """Write a graph; returns the largest difference of onnxruntime's answer to its example from torch's.

    Raises:
        ValueError: it is above `TOLERANCE`.
    """
    import onnxruntime

    # First: what modules set once they are called, they must not set while they are traced.
    expected = part.module(*part.inputs.values())
    with warnings.catch_warnings():
        # Inputs of one size share its name, which is what the names are for.
        warnings.filterwarnings("ignore", message=".*will not be used, since it shares")
        program = torch.onnx.export(
            part.module,
            tuple(part.inputs.values()),
            dynamo=True,
            dynamic_shapes=nested(part, [part.axes[name] for name in part.inputs]),
            input_names=list(part.inputs),
            output_names=part.outputs,
            verbose=False,
            custom_translation_table=ONNX_TRANSLATIONS,
        )
    assert program is not None  # only the older exporter, which writes to a file itself, returns none
    program.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = session.run(part.outputs, {name: tensor.numpy() for name, tensor in part.inputs.items()})
    pairs = zip(found, expected if isinstance(expected, tuple) else (expected,), strict=True)
    worst = max(float((torch.from_numpy(theirs).double() - ours.double()).abs().max()) for theirs, ours in pairs)
    if not worst <= TOLERANCE:
        raise ValueError(f"{part.name}: onnxruntime's answer differs by {worst:.2g} from torch's, expected {TOLERANCE}")
    return worst
