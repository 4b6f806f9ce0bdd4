"""What a private run refuses, by name and with the reason.

The promise is about one row. It holds if a row reaches the weights through its own clipped gradient alone. Each row has
a forward and a backward of its own, so a loss that is a mean over a batch (of tokens, of the load of experts, of router
logits), a capacity counted over a batch, and the padding of batch mates become those of the row. What is refused here
has no such form, or reads the rows by another way.
"""

from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from chorus_moe.modeling.modeling_generation import ChorusForConditionalGeneration
from chorus_moe.training.contrast.setup import is_contrastive
from chorus_moe.training.loading import base_model
from chorus_moe.training.privacy.arguments import check_arguments
from chorus_moe.training.recipe import Recipe
from chorus_moe.training.routing.balance import biased_routers

# Beginnings of optimizers' names -> why they cannot stand behind the noise.
OPTIMIZERS = {
    "schedule_free": "it trains other weights than it saves, and would be asked for them behind the noise in vain",
    "lomo": "it takes its step within the backward of a row, before any noise",
    "adalomo": "it takes its step within the backward of a row, before any noise",
    "galore_adamw_layerwise": "it takes its step within the backward of a row, before any noise",
    "galore_adamw_8bit_layerwise": "it takes its step within the backward of a row, before any noise",
    "galore_adafactor_layerwise": "it takes its step within the backward of a row, before any noise",
    "apollo_adamw_layerwise": "it takes its step within the backward of a row, before any noise",
}


def check_private_recipe(recipe: Recipe) -> None:
    """Refuse what a recipe asks for beside privacy and cannot have.

    Raises:
        ValueError: naming the setting, with the reason.
        ImportError: Opacus is not installed.
    """
    if not recipe.privacy.use_privacy:
        given = sorted(recipe.given & vars(recipe.privacy).keys())
        if given and "use_privacy" not in given:
            raise ValueError(f"privacy.{given[0]} without privacy: write a privacy section, or --use_privacy true")
        return
    check_arguments(recipe.privacy)
    refused = {
        "data.streaming": (recipe.data.streaming, "each update draws from all rows, whose number must be known"),
        "tasks": (
            recipe.tasks.use_tasks,
            "rows are drawn by their task and losses are balanced over a batch; the accountant counts on rows that are "
            "drawn alike and alone",
        ),
        "routing.router_reward_banks": (
            bool(recipe.routing.router_reward_banks),
            "it runs the model a second time on a batch, as the baseline of its reward; it was not made for one row",
        ),
        "guards.norm_ratio": (
            recipe.guards.norm_ratio is not None,
            "whether a step is skipped would tell of its rows; clipping bounds each row already",
        ),
        "model.head: contrastive": (is_contrastive(recipe), "a pair is told from the other pairs of its batch"),
        "model.config without model.tokenizer": (
            recipe.model.config is not None and recipe.model.tokenizer is None,
            "the tokenizer would be trained on the rows, and its vocabulary is published as it is: give a tokenizer",
        ),
    }
    for name, (is_asked, reason) in refused.items():
        if is_asked:
            raise ValueError(f"privacy beside {name}: {reason}")
    if find_spec("opacus") is None:
        raise ImportError("privacy: opacus is not installed; pip install 'chorus-moe[privacy]'")


def check_private_run(trainer: Trainer) -> None:
    """Refuse a model, or arguments of the Trainer, with which a row reaches the weights by another way.

    Raises:
        ValueError: naming it, with the reason.
    """
    _check_training(trainer)
    _check_model(trainer.model)


def _check_training(trainer: Trainer) -> None:
    arguments = trainer.args
    rows = arguments.train_batch_size * arguments.gradient_accumulation_steps
    try:
        num_rows = len(trainer.train_dataset)
    except TypeError:
        raise ValueError(
            "privacy: the training data have no length, and the share of the rows that an update takes decides what "
            "it spends; use data with a length"
        ) from None
    if rows > num_rows:
        raise ValueError(f"privacy: an update of {rows} rows on average cannot be drawn from {num_rows} rows")
    if not arguments.max_grad_norm > 0:
        raise ValueError(
            f"privacy: max_grad_norm={arguments.max_grad_norm} is the norm to which each row's gradient is clipped; "
            "without one there is no bound on what a row does"
        )
    if arguments.world_size > 1 or arguments.n_gpu > 1 or trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        raise ValueError(
            f"privacy: {arguments.world_size} processes with {arguments.n_gpu} devices each: rows are drawn and noise "
            "is added in one process on one device; start one, with CUDA_VISIBLE_DEVICES=0 where there are several"
        )
    refused = {
        "fp16": "its loss scale multiplies the gradients that are clipped; use bf16, or neither",
        "auto_find_batch_size": "the share of rows that an update takes would change on the way",
    }
    for name, reason in refused.items():
        if getattr(arguments, name):
            raise ValueError(f"privacy beside training.{name}: {reason}")
    optimizer = str(getattr(arguments.optim, "value", arguments.optim))
    for start, reason in OPTIMIZERS.items():
        if optimizer.startswith(start):
            raise ValueError(f"privacy beside training.optim={optimizer}: {reason}; use adamw_torch or sgd")
    if trainer.compute_loss_func is not None:
        raise ValueError("privacy beside compute_loss_func: a loss of your own may couple rows; give it to the model")


def _check_model(model: nn.Module) -> None:
    base: Any = base_model(model)
    if not isinstance(base, ChorusForConditionalGeneration):
        raise ValueError(f"privacy: {type(base).__name__} is not supported, train a ChorusForConditionalGeneration")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            raise ValueError(
                f"privacy: {name} is trained in {parameter.dtype}, in which small gradients would round away under the "
                "noise; load the model in float32 (bf16=true still computes in bfloat16)"
            )
    was_training = model.training
    model.train()
    counting = [n for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    model.train(was_training)
    if counting:
        raise ValueError(
            f"privacy: {counting[0]} is a batch norm that is trained, as are {len(counting) - 1} others: it normalises "
            "with the mean of a batch, and keeps a running mean of the rows without noise. Freeze the tower (batch "
            "norms then keep their statistics), train it by a LoRA, or choose a tower without batch norm"
        )
    for layer, banks in biased_routers(model).items():
        for name, router in banks.items():
            if any(parameter.requires_grad for parameter in router.parameters()):
                raise ValueError(
                    f"privacy: expert bank {name!r} of layer {layer} has balance='bias', and its router is trained: "
                    "the bias follows counts of the rows' tokens without noise. Freeze the routers, or give the bank "
                    "balance='switch'"
                )
    text = base.config.text_config
    if text.alignment_loss_coef > 0 and text.alignment == "contrastive":
        raise ValueError(
            f"privacy: alignment_loss_coef={text.alignment_loss_coef} with alignment='contrastive' tells the images of "
            "a batch apart, so each row would depend on the others; choose another alignment, or 0"
        )
