"""Weights in 8 or 4 bits, by group: `quantize(model, {"experts": "int4", "attention": "int8", "image": "none"})`.

Weights are rounded to the nearest whole number, without data. Stacked experts are weights like any other, where loaders
of other libraries pass them by. What was done stands in the configuration: `save_pretrained` and `from_pretrained` keep
it, see `quantization_loading`.
"""

from torch import nn

from chorus_moe.surgery.quantization_formats import (
    OPERATION,
    Groups,
    apply_formats,
    plan_formats,
    restore_weights,
)
from chorus_moe.surgery.quantization_loading import mark_quantized
from chorus_moe.surgery.quantization_report import bytes_report
from chorus_moe.surgery.report import OperationReport, count_parameters


def quantize(model: nn.Module, groups: Groups, *, verbose: bool = True) -> OperationReport:
    """Store the weights of some groups in fewer bits, in place, also below an adapter; prints the bytes of each group.

    Args:
        groups: group -> "int8", "int4", "none", or a mapping as [`WeightFormat`]. Groups are "experts", "attention",
            "cross_modal", "shared_experts", "dense", "connectors", "head", "embeddings", "towers", "vision_tower",
            "audio_tower", and each bank by its name, which stands for its experts. A format alone means all groups but
            towers. Routers, gates, norms and biases are never quantised.

    Returns:
        A report whose notes are the table.

    Raises:
        ValueError: a group that the model does not have or a format that nobody has, a weight that
            is quantised already, or rows that no group divides. Nothing has been changed then.
    """
    plan = plan_formats(model, groups)
    before = count_parameters(model)
    apply_formats(model, plan)
    mark_quantized(model)
    report = bytes_report(model)
    if verbose:
        print(report)
    report.warn()
    return OperationReport(
        operation=OPERATION,
        subject=f"{len(plan)} weights",
        parameters_before=before,
        parameters_after=count_parameters(model),
        notes=str(report).splitlines(),
    )


def dequantize(model: nn.Module) -> OperationReport:
    """Make floating-point weights of all that [`quantize`] made smaller, with the rounding that it brought; also below
    an adapter, which can be merged then.

    Raises:
        ValueError: nothing is quantised.
    """
    before, number = count_parameters(model), restore_weights(model)
    if not number:
        raise ValueError("dequantize: no weight of the model was quantised by quantize()")
    mark_quantized(model)
    return OperationReport(
        operation="dequantize",
        subject=f"{number} modules",
        parameters_before=before,
        parameters_after=count_parameters(model),
    )
