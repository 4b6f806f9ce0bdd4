"""The terms of the loss that a recipe asks for."""

from functools import partial
from typing import Any

from torch import Tensor, nn

from chorus_moe.training.loading import ModelOrAdapter, base_model
from chorus_moe.training.objectives.arguments import ObjectiveArguments, weights_of
from chorus_moe.training.objectives.contrast import Contrast
from chorus_moe.training.objectives.masked import MaskedFeatures
from chorus_moe.training.objectives.objective import Objective


def build_objectives(arguments: ObjectiveArguments, model: ModelOrAdapter) -> list[Objective]:
    """The objectives with a weight above zero; the loss of the labelled tokens is the model's own, see `weigh_tokens`.

    Raises:
        ValueError: as `weights_of`; a term that this model cannot learn.
    """
    weights_of(arguments)
    given = {"image": arguments.masked_image_weight, "audio": arguments.masked_audio_weight}
    share = arguments.mask_share
    terms: list[Objective] = [
        MaskedFeatures(modality, model, share, weight) for modality, weight in given.items() if weight > 0
    ]
    return terms + ([Contrast(model, arguments.contrast_weight)] if arguments.contrast_weight > 0 else [])


def weigh_tokens(model: ModelOrAdapter, weight: float) -> None:
    """Multiply the loss of the labelled tokens in training, and not the model's other losses (balance of experts and
    so on). Evaluation reports it unweighted."""
    if weight == 1.0:
        return
    inner: Any = base_model(model)
    inner.loss_function = partial(_weighed, inner, inner.loss_function, weight)


def _weighed(model: nn.Module, loss_function: Any, weight: float, *arguments: Any, **options: Any) -> Tensor:
    loss = loss_function(*arguments, **options)
    return weight * loss if model.training else loss
