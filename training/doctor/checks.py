"""The checks of the doctor, in the order in which they run."""

from collections.abc import Callable

from chorus_moe.training.doctor.adapters import adapters
from chorus_moe.training.doctor.files import batch_padding, chat_template, hub_export, processor, reload, tensors
from chorus_moe.training.doctor.finding import Finding
from chorus_moe.training.doctor.inputs import Patient
from chorus_moe.training.doctor.parity import batch_mates, cache, checkpointing, implementations, padding_side
from chorus_moe.training.doctor.signals import fast_paths, gradients, modalities
from chorus_moe.training.doctor.whole import whole_checkpoints

Check = Callable[[Patient], Finding]

# A check reads a patient and returns what it found. It leaves the weights alone; everything else is put back for it.
CHECKS: tuple[Check, ...] = (
    tensors,
    whole_checkpoints,
    processor,
    batch_padding,
    chat_template,
    cache,
    padding_side,
    batch_mates,
    implementations,
    fast_paths,
    modalities,
    gradients,
    checkpointing,
    adapters,
    reload,
    hub_export,
)
# These hold, for a while, as much again as the model: `checkpointing` its gradients, the others a copy of it;
# `hub_export` holds the copy in another process and, with an adapter, one more in this one.
COPYING: tuple[Check, ...] = (checkpointing, adapters, reload, hub_export)


def name_of(check: Check) -> str:
    return check.__name__.replace("_", "-")  # type: ignore[attr-defined]
