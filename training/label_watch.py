"""A look at the first batches of a training run: are there trained experts that no label reaches?

`import chorus_moe` registers it, and the generative model calls it for each batch with labels.
"""

from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor
from transformers.utils import logging

from chorus_moe.modeling.configuration_modalities import MODALITY_IDS
from chorus_moe.modeling.configuration_services import SERVICES
from chorus_moe.modeling.modeling_chorus import with_virtual_tokens
from chorus_moe.modeling.modeling_generation import ChorusForConditionalGeneration

logger = logging.get_logger(__name__)
# Batches that are looked at; a look waits for a GPU.
WATCHED_BATCHES = 8


@dataclass
class _Seen:
    """Batches so far, modalities whose tokens were in them, and those whose positions predict a label."""

    batches: int = 0
    modalities: set[int] = field(default_factory=set)
    read: set[int] = field(default_factory=set)


_SEEN: WeakKeyDictionary[ChorusForConditionalGeneration, _Seen] = WeakKeyDictionary()


def watch_labels(
    model: ChorusForConditionalGeneration,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    modality_BS: Tensor | None,
    labels: Tensor,
) -> None:
    """Warn once, after the first batches in training, about trained experts that no label has reached."""
    seen = _SEEN.setdefault(model, _Seen())
    if seen.batches >= WATCHED_BATCHES:
        return
    seen.batches += 1
    if modality_BS is None:
        modality_BS = model.model.modality_ids(input_ids, inputs_embeds)
    # The position before a label predicts it. Right behind an image that is a position of the image.
    modality_BS = with_virtual_tokens(modality_BS, labels[..., None])
    seen.modalities.update(modality_BS.unique().tolist())
    seen.read.update(modality_BS[:, :-1][labels[:, 1:] != -100].unique().tolist())
    layer, unread = unreached_banks(model)
    open_to = {n: {MODALITY_IDS[m] for m in model.model.language_model.banks[n].modalities} for n in unread}
    names = [n for n, ids in open_to.items() if ids & seen.modalities and not ids & seen.read]
    if names and seen.batches == WATCHED_BATCHES:
        logger.warning_once(
            f"expert banks {names} of layer {layer}: no later layer reads image and audio positions and no label "
            f"followed one in {WATCHED_BATCHES} batches, so these experts get no gradient and training them is "
            f"time spent for nothing. Give the banks `layers` without {layer} in the configuration, or keep their "
            "experts in it frozen"
        )


def unreached_banks(model: ChorusForConditionalGeneration) -> tuple[int, list[str]]:
    """The last layer, and its banks that have trained experts (or a LoRA on them) but take no text."""
    # Attention of a later layer carries what image experts add to text; behind the last layer there is none.
    layer = model.config.text_config.num_hidden_layers - 1
    banks: dict[str, Any] = getattr(model.model.language_model.layers[layer].mlp, "banks", {})
    return layer, [
        name
        for name, bank in banks.items()
        if "text" not in bank.modalities and any(p.requires_grad for stack in bank.stacks for p in stack.parameters())
    ]


SERVICES["watch_labels"] = watch_labels
