"""Learning rates by part and by depth, as parameter groups of the optimizer that the Trainer has made."""

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn

from chorus_moe.surgery.parts import below_head, parameters_in
from chorus_moe.training.recipe import PartsArguments

LAYER = re.compile(r"language_model\.layers\.(\d+)\.")
EMBEDDINGS = "language_model.embed_tokens."


class Rates(NamedTuple):
    """Part -> learning rate, and the share of a layer's rate that the layer below it has."""

    by_part: Mapping[str, float]
    layer_decay: float = 1.0

    @classmethod
    def of(cls, parts: PartsArguments) -> "Rates | None":
        """What a recipe asks for; None for one rate."""
        by_part = parts.rates()
        return cls(by_part, parts.layer_decay) if by_part or parts.layer_decay != 1 else None

    def of_parameters(self, model: nn.Module, learning_rate: float) -> dict[int, float]:
        """`id` of each trained parameter -> its rate.

        Layer i of L learns at `layer_decay ** (L - 1 - i)` of the rate of its part, the embeddings at
        `layer_decay ** L`. Towers, connectors, the last norm and heads are of no layer: they have the rate as it is.

        Raises:
            ValueError: a part that the model does not have or that is not trained, or a decay outside (0, 1].
        """
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay={self.layer_decay} must be above 0 and at most 1")
        trained = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
        rates = dict.fromkeys(trained, learning_rate)
        for part, parameters in parameters_in(model, self.by_part, "learning_rates").items():
            found = [id(parameter) for parameter in parameters.values() if id(parameter) in rates]
            if not found:
                raise ValueError(f"learning_rates: nothing of {part!r} is trained")
            rates |= dict.fromkeys(found, self.by_part[part])
        count = model.config.get_text_config().num_hidden_layers  # type: ignore[union-attr,operator]
        return {key: rate * self.layer_decay ** _below_top(trained[key], count) for key, rate in rates.items()}


def _below_top(name: str, count: int) -> int:
    """How many layers of the decoder lie above a parameter, counted from the top one; 0 for one of no layer."""
    if layer := LAYER.search(name):
        return count - 1 - int(layer[1])
    return count if EMBEDDINGS in name else 0


def split_groups(optimizer: torch.optim.Optimizer, model: nn.Module, rates: Mapping[int, float]) -> None:
    """Split each group of a new optimizer into groups of one rate; all other settings stay those of the group.

    The groups keep the names of their parameters, so that a checkpoint shows which state belongs to which.
    """
    names = {id(parameter): below_head(name) for name, parameter in model.named_parameters()}
    groups = []
    for group in optimizer.param_groups:
        by_rate: dict[float, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            by_rate.setdefault(rates[id(parameter)], []).append(parameter)
        groups += [
            {**group, "params": parameters, "param_names": [names[id(p)] for p in parameters], "lr": rate}
            for rate, parameters in by_rate.items()
        ]
    optimizer.param_groups[:] = groups
