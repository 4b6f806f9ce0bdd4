"""The section `quantization` of a recipe: weights in fewer bits below a LoRA."""

import json
from dataclasses import dataclass, field

from torch import nn

from chorus_moe.surgery import quantize
from chorus_moe.surgery.quantization_formats import FORMATS, NONE, Groups


@dataclass
class QuantizationArguments:
    """What is quantised once the model is loaded."""

    quantize: str | None = field(
        default=None,
        metadata={"help": f"{' or '.join(FORMATS)}, or group -> format, a mapping in YAML or JSON text"},
    )

    @property
    def groups(self) -> Groups | None:
        """As `quantize` takes them; None for nothing."""
        try:
            return None if self.quantize in (None, NONE) else json.loads(self.quantize)
        except json.JSONDecodeError:
            return self.quantize


def quantize_below(model: nn.Module, arguments: QuantizationArguments, verbose: bool = True) -> None:
    """Quantise what is below a new adapter, as the section says. Errors as in `quantize`."""
    # In this order PEFT names the adapter's tensors as on weights that are not quantised, onto which it goes as well.
    if arguments.groups is not None:
        quantize(model, arguments.groups, verbose=verbose)
