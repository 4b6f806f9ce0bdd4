"""The section `parallel` of a recipe: over which processes a model, its data and its experts are spread.

Processes are counted as data x fsdp x tensor. Experts take no processes of their own: `expert` of those that fsdp and
tensor together have hold different experts. Every rank of a tensor group sees the same rows; all others see their own.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# As a recipe writes them below `parallel:`. Names of fields are unique over all sections: the Trainer has an `fsdp`.
KEYS = {
    "data": "data_size",
    "fsdp": "fsdp_size",
    "tensor": "tensor_size",
    "expert": "expert_size",
    "context": "context_size",
    "zero": "zero_stage",
}


@dataclass
class ParallelArguments:
    """Sizes of the groups of processes. Other sizes than 1 want as many processes, from torchrun or accelerate."""

    data_size: int | None = field(
        default=None, metadata={"help": "copies of the model, each with its own rows; None: whatever is left"}
    )
    fsdp_size: int = field(default=1, metadata={"help": "processes that share one copy and its optimizer (FSDP2)"})
    tensor_size: int = field(default=1, metadata={"help": "processes that share each layer, and see the same rows"})
    expert_size: int = field(
        default=1, metadata={"help": "processes with experts of their own; divides fsdp x tensor, multiple of tensor"}
    )
    context_size: int = field(default=1, metadata={"help": "processes that share each sequence"})
    zero_stage: int = field(default=0, metadata={"help": "1 to 3: DeepSpeed's ZeRO shares optimizer, gradients, model"})


def field_names_of(content: Mapping[str, Any]) -> dict[str, Any]:
    """The section as a recipe writes it, under the names of the fields."""
    return {KEYS.get(name, name): value for name, value in content.items()}
