"""The terms of the loss that a recipe asks for."""

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from chorus_moe.training.loading import ModelOrAdapter, base_model
from chorus_moe.training.objectives.arguments import ObjectiveArguments, weights_of
from chorus_moe.training.objectives.objective import Objective


def build_objectives(arguments: ObjectiveArguments, model: ModelOrAdapter) -> list[Objective]:
    """The objectives with a weight above zero; the loss of the labelled tokens is the model's own, see `weigh_tokens`.

    Raises:
        ValueError: as `weights_of`.
    """
    weights_of(arguments)
    return []


def weigh_tokens(model: ModelOrAdapter, weight: float) -> None:
    """Multiply the loss of the labelled tokens in training, and not the model's other losses (balance of experts and
    so on). Evaluation reports it unweighted."""
    if weight == 1.0:
        return
    inner: Any = base_model(model)
    inner.loss_function = WeighedLoss(inner, inner.loss_function, weight)


class WeighedLoss:
    """A loss function of a model, weighed while the model is in training."""

    def __init__(self, model: PreTrainedModel, function: Any, weight: float):
        self.model, self.function, self.weight = model, function, weight

    def __call__(self, *arguments: Any, **options: Any) -> Tensor:
        loss = self.function(*arguments, **options)
        return self.weight * loss if self.model.training else loss
