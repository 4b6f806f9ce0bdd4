"""Label smoothing inside the model, where our own losses are added, instead of in the Trainer, where they are lost.

The stock Trainer takes the labels out of the batch for `label_smoothing_factor`: the model then computes no loss at
all, and its balance, z-, alignment, skip and exit losses go with it. It refuses such a step.
"""

from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from transformers import Trainer

from chorus_moe.modeling.modeling_generation import ChorusForConditionalGeneration
from chorus_moe.training.loading import base_model


def smooth_labels(trainer: Trainer) -> Trainer:
    """Let the model smooth the labels by `label_smoothing_factor` of the trainer's arguments; returns the trainer.

    Loss and evaluation loss are those of transformers' `LabelSmoother`, plus the model's own terms in training.
    `chorus-moe train` does this by itself.

    Raises:
        ValueError: a model that predicts no tokens and no classes.
    """
    epsilon, model = trainer.args.label_smoothing_factor, base_model(trainer.model)
    if not epsilon:
        return trainer
    if isinstance(model, ChorusForConditionalGeneration):
        loss: Any = token_loss
    elif getattr(model.config, "problem_type", None) in (None, "single_label_classification") and hasattr(
        model, "score"
    ):
        loss = class_loss
    else:
        raise ValueError(
            f"label_smoothing_factor={epsilon}: {type(model).__name__} with problem_type="
            f"{getattr(model.config, 'problem_type', None)!r} predicts no single token or class to be smoothed"
        )
    trainer.label_smoother = None
    model.loss_function = partial(loss, epsilon=epsilon)
    return trainer


def token_loss(
    logits: Tensor, labels: Tensor, *, epsilon: float, num_items_in_batch: Tensor | int | None = None, **_: Any
) -> Tensor:
    """Smoothed cross-entropy of the next tokens: a sum over labels, divided by their number in the whole step.

    Args:
        logits: `(B, S, V)`; position i predicts label i + 1.
        labels: `(B, S)`, -100 where nothing is learned.
    """
    target = labels[:, 1:].to(logits.device)
    count = (target != -100).sum() if num_items_in_batch is None else num_items_in_batch
    total = F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), target.flatten(), reduction="sum", label_smoothing=epsilon
    )
    return total / (count.to(total.device) if isinstance(count, Tensor) else count)


def class_loss(pooled_logits: Tensor, labels: Tensor, *, epsilon: float, **_: Any) -> Tensor:
    """Smoothed cross-entropy of `(B, C)` logits and `(B,)` classes, a mean over samples."""
    return F.cross_entropy(pooled_logits.float(), labels.to(pooled_logits.device), label_smoothing=epsilon)
