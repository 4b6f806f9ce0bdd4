"""A further term of the training loss, and how the Trainer adds several of them."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from chorus_moe.modeling.losses import share_of_batch
from chorus_moe.processors.processing_chorus import ChorusProcessor

FILE = "objectives.safetensors"


class Objective(nn.Module):
    """A term of the training loss: a subclass computes it in `forward(model, inputs, outputs)`, as a mean.

    Its own parameters are trained beside the model's, saved in each checkpoint and resumed; no saved model has them.

    Args:
        name: what logs call it.
        weight: what its loss is multiplied by.

    Raises:
        ValueError: a weight that is not finite or not positive.
    """

    # Whether its mean is over labelled tokens: then a micro-batch weighs by its labels, as the model's loss does. The
    # micro-batches of any other weigh alike.
    by_labels = False

    def __init__(self, name: str, weight: float = 1.0):
        super().__init__()
        if not 0 < weight < math.inf:
            raise ValueError(f"objective {name!r}: its weight must be positive and finite, found {weight}")
        self.name, self.weight = name, weight

    def check(self, model: nn.Module, processor: ChorusProcessor) -> None:
        """Raise a ValueError, before the first step, if this model cannot be trained so."""

    def forward_options(self) -> dict[str, Any]:
        """Keyword arguments that the model's forward needs, such as `output_hidden_states`."""
        return {}


class ObjectiveTerms(nn.ModuleList):
    """The objectives of a run."""

    def __init__(self, objectives: Sequence[Objective] = ()):
        super().__init__(objectives)
        # As this list, and typed: iterating over modules gives modules.
        self.objectives = tuple(objectives)
        names = [objective.name for objective in objectives]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"two objectives are called {twice!r}")
        self._sums: dict[str, Tensor | float] = {}
        self._counts: dict[str, int] = {}

    def forward_options(self) -> dict[str, Any]:
        return {key: value for objective in self.objectives for key, value in objective.forward_options().items()}

    def loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        outputs: object,
        share: float,
        num_items_in_batch: Tensor | int | None,
        ranks: int,
    ) -> Tensor:
        """The weighted sum of all terms.

        Args:
            share: of this micro-batch in the step.
            num_items_in_batch: labels of the whole step, by which the model's loss is divided; None divides by its own.
            ranks: by how many the Trainer multiplies a loss that was divided by the labels of all ranks.
        """
        total: Tensor | float = 0.0
        for objective in self.objectives:
            loss = objective(model, inputs, outputs)
            self._sums[objective.name] = self._sums.get(objective.name, 0.0) + loss.detach()
            self._counts[objective.name] = self._counts.get(objective.name, 0) + 1
            scale: Tensor | float
            if objective.by_labels and num_items_in_batch is not None:
                scale = share_of_batch(inputs["labels"], num_items_in_batch) * ranks
            else:
                scale = share
            total = total + objective.weight * scale * loss
        assert isinstance(total, Tensor)  # the caller has at least one
        return total

    def take_means(self) -> dict[str, float]:
        """The mean of each term over the micro-batches of this rank since the last call."""
        means = {name: float(value) / self._counts[name] for name, value in self._sums.items()}
        self._sums, self._counts = {}, {}
        return means

    def settle_gradients(self, max_norm: float) -> float:
        """Do for these parameters what wrapper and Trainer do for the model's: average over ranks, and clip.

        Returns:
            The norm of their gradients before clipping.
        """
        parameters = list(self.parameters())
        if dist.is_initialized() and dist.get_world_size() > 1:
            for parameter in parameters:
                if parameter.grad is None:
                    # All ranks must take part.
                    parameter.grad = torch.zeros_like(parameter)
                dist.all_reduce(parameter.grad)
                parameter.grad /= dist.get_world_size()
        return float(nn.utils.clip_grad_norm_(parameters, max_norm if max_norm > 0 else math.inf))

    def save(self, checkpoint: str) -> None:
        state = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        if state:
            save_file(state, Path(checkpoint) / FILE)

    def load(self, checkpoint: str) -> None:
        """Continue with the parameters of a checkpoint.

        Raises:
            ValueError: it has none, or those of other objectives.
        """
        wanted, path = self.state_dict(), Path(checkpoint) / FILE
        found = load_file(path) if path.is_file() else {}
        if wanted.keys() != found.keys():
            different = sorted(wanted.keys() ^ found.keys())
            raise ValueError(
                f"{checkpoint} was written with other objectives: {len(found)} tensors, this run has {len(wanted)}; "
                f"the first difference is {different[0]!r}"
            )
        if wanted:
            self.load_state_dict(found)


class ClearGradients(TrainerCallback):
    """The Trainer clears the gradients of its model alone."""

    def __init__(self, terms: ObjectiveTerms):
        self.terms = terms

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.terms.zero_grad()
