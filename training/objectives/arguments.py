"""The section `objectives` of a recipe."""

import math
from dataclasses import dataclass, field


@dataclass
class ObjectiveArguments:
    """What is learned besides the labelled tokens, and how the terms are weighed, see `objectives/terms.py`."""

    next_token_weight: float = field(default=1.0, metadata={"help": "weight of the loss of the labelled tokens"})
    masked_image_weight: float = field(
        default=0.0, metadata={"help": "weight of predicting what the vision tower says of hidden image tokens"}
    )
    masked_audio_weight: float = field(
        default=0.0, metadata={"help": "weight of predicting what the audio tower says of hidden audio tokens"}
    )
    mask_share: float = field(
        default=0.5, metadata={"help": "share of the image or audio tokens of each row that is hidden"}
    )
    contrast_weight: float = field(
        default=0.0, metadata={"help": "weight of telling which text, image and sound belong to one row"}
    )
    contrastive_loss: str | None = field(
        default=None,
        metadata={"help": "infonce (CLIP) or sigmoid (SigLIP), of head: contrastive; None: the model's own"},
    )
    contrastive_temperature: float | None = field(
        default=None, metadata={"help": "where the temperature of head: contrastive starts; None: the model's own"}
    )


def weights_of(arguments: ObjectiveArguments) -> dict[str, float]:
    """Weight of each term by the name of its field.

    Raises:
        ValueError: a weight that is negative or not finite, or all of them are zero; a share outside 0..1.
    """
    if not 0 < arguments.mask_share < 1:
        raise ValueError(f"objectives.mask_share must lie between 0 and 1, found {arguments.mask_share}")
    weights = {name: value for name, value in vars(arguments).items() if name.endswith("_weight")}
    for name, value in weights.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"objectives.{name} must be 0 or more and finite, found {value}")
    if not any(weights.values()):
        raise ValueError(f"objectives: nothing is learned: {', '.join(f'{name}=0' for name in weights)}")
    return weights
