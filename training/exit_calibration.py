"""Thresholds of a classifier's exits, found on held-out rows.

What is promised: on these rows, the accuracy with the thresholds is at most `max_accuracy_drop` below the accuracy of
all layers. On other rows that is an estimate, as good as the rows are many and alike: half a point of accuracy cannot
be told from nothing by fewer than some hundred of them.

Shape suffixes: N rows, X exits.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from chorus_moe.modeling.early_exit import confidence
from chorus_moe.training.loading import device_of

# Thresholds are looked for among so many quantiles of the confidences.
CANDIDATES = 100


@dataclass(frozen=True)
class ExitCalibration:
    """What was found, on the rows it was found on.

    Args:
        thresholds: one an exit, shallow first.
        accuracy, full_accuracy: with the thresholds, and of all layers.
        left_after: number of layers -> share of the rows that left there, the whole depth included.
    """

    thresholds: list[float]
    accuracy: float
    full_accuracy: float
    left_after: dict[int, float]

    @property
    def mean_layers(self) -> float:
        return sum(layers * share for layers, share in self.left_after.items())


@dataclass(frozen=True)
class ExitAnswers:
    """What every exit, and last the head, says of rows.

    Args:
        layers: after how many layers each of them stands, shallow first.
        confidence_NX: of the exits and of the head.
        is_right_NX: whether the answer is the label.
    """

    layers: list[int]
    confidence_NX: Tensor
    is_right_NX: Tensor

    @classmethod
    @torch.no_grad()
    def ask(cls, model: Any, batches: Iterable[Mapping[str, Any]]) -> "ExitAnswers":
        """Answer all batches at every exit.

        Raises:
            ValueError: a model without exits, batches without labels, or none at all.
        """
        text = model.config.text_config
        if not text.exit_layers:
            raise ValueError("the model has no exits: set text_config.exit_layers and train it")
        device, was_training = device_of(model), model.training
        model.eval()
        sure, right = [], []
        for batch in batches:
            if batch.get("labels") is None:
                raise ValueError("a batch without labels says nothing about accuracy")
            inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
            labels = inputs.pop("labels")
            outputs = model(**inputs, output_exit_logits=True)
            logits_NXL = torch.stack([*outputs.exit_logits, outputs.logits], dim=1)
            sure.append(confidence(logits_NXL).cpu())
            right.append((logits_NXL.argmax(dim=-1) == labels[:, None]).cpu())
        model.train(was_training)
        if not sure:
            raise ValueError("there are no rows to calibrate the exits on")
        return cls([*sorted(text.exit_layers), text.num_hidden_layers], torch.cat(sure), torch.cat(right))

    def exits_taken(self, thresholds: list[float]) -> Tensor:
        """`(N,)`: the column of the exit where each row leaves, or of the head."""
        leaves_NX = self.confidence_NX > torch.tensor([*thresholds, -1.0])
        return leaves_NX.int().argmax(dim=1)

    def accuracy(self, thresholds: list[float]) -> float:
        return self.is_right_NX.gather(1, self.exits_taken(thresholds)[:, None]).float().mean().item()

    def mean_layers(self, thresholds: list[float]) -> float:
        return torch.tensor(self.layers)[self.exits_taken(thresholds)].float().mean().item()

    def candidates(self) -> list[float]:
        """Thresholds worth a try, falling: between confidences that were seen, so that rounding moves no row."""
        values = self.confidence_NX[:, :-1].flatten().unique()
        between = (values[1:] + values[:-1]) / 2
        picked = between[torch.linspace(0, max(len(between) - 1, 0), CANDIDATES).long()] if len(between) else values
        return sorted({*picked.tolist(), 0.0}, reverse=True)


def find_thresholds(answers: ExitAnswers, max_accuracy_drop: float) -> list[float]:
    """The thresholds that save most layers of those tried.

    First one threshold for all exits, lowered from 1 until the first that costs too much: what lies below that is not
    tried, for accuracy regained there is luck. Then each exit's own, shallow first, as far down as the rest allows.
    """
    least = answers.accuracy([1.0] * (len(answers.layers) - 1)) - max_accuracy_drop - 1e-9
    thresholds = [1.0] * (len(answers.layers) - 1)
    candidates = answers.candidates()
    for value in candidates:
        if answers.accuracy([value] * len(thresholds)) < least:
            break
        thresholds = [value] * len(thresholds)
    for column in range(len(thresholds)):
        for value in (v for v in candidates if v < thresholds[column]):
            tried = [*thresholds[:column], value, *thresholds[column + 1 :]]
            if answers.accuracy(tried) < least:
                break
            thresholds = tried
    return thresholds


def calibrate_exits(
    model: Any, batches: Iterable[Mapping[str, Any]], max_accuracy_drop: float = 0.005
) -> ExitCalibration:
    """Find the exits' thresholds on held-out rows and write them into `model.config.exit_thresholds`.

    Args:
        model: [`ChorusForSequenceClassification`] with trained exits.
        batches: inputs of the model with `labels` `(B,)`, such as a `DataLoader`; of rows it was not trained on.
        max_accuracy_drop: how much accuracy may fall on these rows, between 0 and 1.

    Raises:
        ValueError: a drop outside 0..1; no exits, no rows, or rows without labels.
    """
    if not 0 <= max_accuracy_drop <= 1:
        raise ValueError(f"max_accuracy_drop={max_accuracy_drop} is outside 0..1")
    answers = ExitAnswers.ask(model, batches)
    thresholds = find_thresholds(answers, max_accuracy_drop)
    taken = answers.exits_taken(thresholds)
    model.config.exit_thresholds = thresholds
    return ExitCalibration(
        thresholds,
        answers.accuracy(thresholds),
        answers.is_right_NX[:, -1].float().mean().item(),
        {layers: (taken == column).float().mean().item() for column, layers in enumerate(answers.layers)},
    )
