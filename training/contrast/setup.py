"""What a recipe with `model.head: contrastive` trains, on which rows, and what it cannot ask for."""

import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForMultimodalLM, PreTrainedModel

from chorus_moe.modeling.configuration_banks import check_name
from chorus_moe.modeling.losses import CONTRASTIVE_LOSSES
from chorus_moe.modeling.modeling_generation import ChorusForConditionalGeneration
from chorus_moe.modeling.modeling_heads import ChorusForContrastive
from chorus_moe.processors.processing_chorus import ChorusProcessor
from chorus_moe.training.collator import ChorusDataCollator, MoreColumns
from chorus_moe.training.contrast.collator import PairCollator
from chorus_moe.training.contrast.pairs import load_pairs
from chorus_moe.training.data import RowDataset, load_rows
from chorus_moe.training.features.collate import FeatureCollator
from chorus_moe.training.loading import is_remote
from chorus_moe.training.objectives.arguments import ObjectiveArguments
from chorus_moe.training.recipe import Recipe

HEADS = ("generation", "contrastive")
# The scale of the scores, which is one over the temperature, is clipped at 100.
LEAST_TEMPERATURE = 0.01


def is_contrastive(recipe: Recipe) -> bool:
    return recipe.model.head == "contrastive"


def reader_of(recipe: Recipe) -> Callable[..., RowDataset]:
    """`load_rows`, or `load_pairs` for the contrastive head."""
    return load_pairs if is_contrastive(recipe) else load_rows


def collator_of(recipe: Recipe, processor: ChorusProcessor, more: Sequence[MoreColumns] = ()) -> ChorusDataCollator:
    kind: type[ChorusDataCollator] = PairCollator if is_contrastive(recipe) else FeatureCollator
    return kind(
        processor,
        max_length=recipe.data.max_length,
        on_bad_media=recipe.data.on_bad_media,
        max_bad_samples=recipe.data.max_bad_samples,
        more=more,
    )


def pretrained(recipe: Recipe, **options: Any) -> PreTrainedModel:
    """The model that the recipe starts from, with the head to train and its loss."""
    if not is_contrastive(recipe):
        return AutoModelForMultimodalLM.from_pretrained(recipe.model.model_name_or_path, **options)
    return ChorusForContrastive.from_pretrained(recipe.model.model_name_or_path, **loss_of(recipe), **options)


def loss_of(recipe: Recipe) -> dict[str, str]:
    """The field of the configuration that the recipe sets, if it does."""
    asked = recipe.objectives.contrastive_loss
    return {} if asked is None else {"contrastive_loss": asked}


def kind_of(recipe: Recipe) -> type[ChorusForConditionalGeneration] | type[ChorusForContrastive]:
    """The class of a new model."""
    return ChorusForContrastive if is_contrastive(recipe) else ChorusForConditionalGeneration


def set_temperature(model: nn.Module, arguments: ObjectiveArguments) -> None:
    """Start from the temperature of the recipe, if it has one; it is learned from there."""
    if arguments.contrastive_temperature is not None:
        with torch.no_grad():
            model.get_parameter("logit_scale").fill_(-math.log(arguments.contrastive_temperature))


def check_head(recipe: Recipe) -> None:
    """Refuse what does not go with the head of a recipe.

    Raises:
        ValueError: an unknown head or loss, a temperature that is not positive, a setting of the other head, a batch
            of one pair, or a new head that would not be trained.
    """
    model, arguments, objectives = recipe.model, recipe.training, recipe.objectives
    check_name("model", "head", model.head, HEADS)
    asked = {name: value for name, value in vars(objectives).items() if name.startswith("contrastive_")}
    if not is_contrastive(recipe):
        if given := [name for name, value in asked.items() if value is not None]:
            raise ValueError(f"objectives.{given[0]} is for model.head: contrastive, found {model.head!r}")
        if objectives.contrast_weight > 0:
            _check_batch(recipe, f"objectives.contrast_weight={objectives.contrast_weight}")
        _check_tokens(model.model_name_or_path)
        return
    if objectives.contrastive_loss is not None:
        check_name("objectives", "contrastive_loss", objectives.contrastive_loss, CONTRASTIVE_LOSSES)
    temperature = objectives.contrastive_temperature
    if temperature is not None and not LEAST_TEMPERATURE <= temperature < math.inf:
        raise ValueError(
            f"objectives.contrastive_temperature must be positive, {LEAST_TEMPERATURE} or more, found {temperature}"
        )
    other = {f"objectives.{n}": v for n, v in vars(objectives).items() if n not in asked and v != _default(n)}
    of_tokens = {
        "routing.router_reward_banks": recipe.routing.router_reward_banks,
        "guards.keep_skills": recipe.guards.keep_skills,
        "training.label_smoothing_factor": arguments.label_smoothing_factor,
        "distillation.teachers": recipe.distillation.teachers,
        "tasks": recipe.tasks.use_tasks,
        **other,
    }
    if wrong := [name for name, value in of_tokens.items() if value or name in other]:
        raise ValueError(f"{wrong[0]} is about labelled tokens, which model.head: contrastive does not have")
    _check_batch(recipe, "model.head: contrastive")
    _check_new_head(recipe)


def _check_batch(recipe: Recipe, asked: str) -> None:
    if recipe.training.per_device_train_batch_size * recipe.training.world_size < 2:
        raise ValueError(
            f"{asked} tells each pair from the others of its batch, and per_device_train_batch_size=1 "
            "has no other; micro-batches of gradient accumulation do not see each other"
        )


def _check_new_head(recipe: Recipe) -> None:
    given, train = recipe.model, recipe.parts.train
    if given.model_name_or_path is None or _is_saved_as(given.model_name_or_path, ChorusForContrastive.__name__):
        return
    if recipe.lora.use_lora:
        raise ValueError(
            f"{given.model_name_or_path!r} has no contrastive head yet, and an adapter cannot save a new one whole: "
            "train it first, in a stage without a LoRA"
        )
    if (train is not None and not {"all", "head"} & set(train)) or "head" in (recipe.parts.freeze or ()):
        raise ValueError(f"train={train} leaves the contrastive head, which is new, as it is drawn; add head")


def _check_tokens(source: str | None) -> None:
    """Refuse to generate with a checkpoint that has no output layer."""
    if source is None or not _is_saved_as(source, ChorusForContrastive.__name__):
        return
    if not AutoConfig.from_pretrained(source).tie_word_embeddings:
        raise ValueError(
            f"{source!r} was saved as {ChorusForContrastive.__name__}, without the layer that predicts tokens, which "
            "would be drawn anew; set model.head: contrastive, or start from the generative model"
        )


def _is_saved_as(source: str, name: str) -> bool:
    # What an earlier stage will write is not there yet, or only half of it. A repository is OWNER/NAME.
    is_repository = not os.path.isdir(source) and is_remote(source) and "/" in source
    if not is_repository and not os.path.isfile(os.path.join(source, "config.json")):
        return False
    return name in (AutoConfig.from_pretrained(source).architectures or [])


def _default(name: str) -> object:
    return ObjectiveArguments.__dataclass_fields__[name].default
