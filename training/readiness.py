"""What must hold before the first step: arguments that fit each other, packages, weights, and something to train."""

from importlib.util import find_spec

import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.integrations import get_reporting_integration_callbacks
from transformers.utils import is_bitsandbytes_available

from chorus_moe.modeling.configuration_banks import check_name
from chorus_moe.surgery import add_bank, freeze, unfreeze
from chorus_moe.training.contrast.setup import check_head
from chorus_moe.training.loading import DTYPES, ModelOrAdapter, not_finite
from chorus_moe.training.objectives.arguments import weights_of
from chorus_moe.training.objectives.distillation_arguments import check_distillation
from chorus_moe.training.privacy.checks import check_private_recipe
from chorus_moe.training.rates import Rates
from chorus_moe.training.recipe import PRODIGY, Recipe, RunArguments, read_mapping

# Ways to order rows that read the number of tokens of each before the first step.
BY_LENGTH = ("group_by_length", "batch_rebalance")
# Beginnings of optimizers' names -> the package that has them.
PACKAGES = {"schedule_free": "schedulefree", PRODIGY: "prodigyopt"}


def check_recipe(recipe: Recipe) -> None:
    """Refuse what the Trainer finds out only after the model is loaded, or takes without a word.

    Raises:
        ValueError: a tracker or an optimizer that is unknown or not installed, an order by the length of rows, a
            schedule or rates that the optimizer has no use for, parts that cannot be chosen so, distillation that no
            teacher can make right, or what a private run cannot have.
        ImportError: 4-bit weights without bitsandbytes, privacy without Opacus.
    """
    arguments, parts = recipe.training, recipe.parts
    check_name("model", "dtype", recipe.model.dtype, DTYPES)
    if arguments.train_sampling_strategy in BY_LENGTH:
        raise ValueError(
            f"training.train_sampling_strategy={arguments.train_sampling_strategy!r}: a row is text and undecoded "
            "media, which have no length before the collator makes tokens of them; leave it out"
        )
    for tracker in get_reporting_integration_callbacks(arguments.report_to):
        try:
            tracker()
        except (ImportError, RuntimeError) as error:
            raise ValueError(f"training.report_to: {error} Or leave it out: report_to none") from error
    weights_of(recipe.objectives)
    if recipe.tasks.use_tasks and (weight := recipe.objectives.next_token_weight) != 1.0:
        # The losses of the tasks take the place of the loss that it would weigh.
        raise ValueError(f"objectives.next_token_weight={weight} beside tasks: give tasks.task_weights instead")
    check_head(recipe)
    check_optimizer(arguments, has_rates=Rates.of(parts) is not None)
    check_distillation(recipe.distillation)
    check_private_recipe(recipe)
    if recipe.lora.use_lora and parts.freeze:
        raise ValueError(f"freeze={parts.freeze} beside a LoRA: only what the LoRA names is trained; leave it out")
    if recipe.lora.use_lora and recipe.model.add_bank:
        raise ValueError("model.add_bank beside a LoRA: the saved model below it would lack it; add it in a stage")
    if recipe.quantization.groups is not None and not recipe.lora.use_lora:
        raise ValueError("quantization.quantize needs a lora section: whole numbers themselves cannot be trained")
    if recipe.model.load_in_4bit:
        if recipe.quantization.groups is not None:
            raise ValueError("quantization.quantize beside model.load_in_4bit: both quantise, leave one of them out")
        if not recipe.lora.use_lora:
            raise ValueError("model.load_in_4bit needs a lora section: 4-bit weights themselves cannot be trained")
        four_bits()


def check_optimizer(arguments: RunArguments, has_rates: bool = False) -> None:
    """Refuse an optimizer whose package is missing, and settings that would make it do something else."""
    name = str(getattr(arguments.optim, "value", arguments.optim))
    schedule = str(getattr(arguments.lr_scheduler_type, "value", arguments.lr_scheduler_type))
    package = next((package for start, package in PACKAGES.items() if name.startswith(start)), None)
    if package is None:
        return
    if find_spec(package) is None:
        raise ValueError(f"training.optim={name}: {package} is not installed; pip install 'chorus-moe[optim]'")
    if package == "schedulefree" and (schedule != "constant" or 0 < arguments.warmup_steps < 1):
        raise ValueError(
            f"training.optim={name} brings its own schedule and warm-up: set lr_scheduler_type to constant and "
            f"warmup_steps to a whole number; found {schedule} and {arguments.warmup_steps}"
        )
    if name == PRODIGY and (has_rates or arguments.learning_rate < 0.1):
        raise ValueError(
            f"training.optim=prodigy finds one rate for all and learning_rate, found {arguments.learning_rate}, is a "
            "factor on it: set learning_rate to 1.0, and leave learning_rates and layer_decay out"
        )


def four_bits() -> BitsAndBytesConfig:
    """How `load_in_4bit` loads a model (QLoRA, arXiv 2305.14314).

    Raises:
        ImportError: bitsandbytes is not installed.
    """
    if not is_bitsandbytes_available():
        raise ImportError("model.load_in_4bit: bitsandbytes is not installed; pip install 'chorus-moe[qlora]'")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype="bfloat16",
    )


def check_weights(model: nn.Module) -> None:
    """Refuse a model that no training can mend. Raises ValueError naming the first weight that is not finite."""
    if found := not_finite(model):
        raise ValueError(found)


def check_scaled(model: nn.Module, arguments: RunArguments) -> None:
    """Refuse to train float16 weights with `fp16`, whose scaler torch stops at the first step. Raises ValueError."""
    half = [n for n, weight in model.named_parameters() if weight.requires_grad and weight.dtype == torch.float16]
    if arguments.fp16 and half:
        raise ValueError(f"training.fp16 scales gradients of float32 weights, {half[0]} is in float16: --dtype float32")


def prepare_parts(model: nn.Module, recipe: Recipe, verbose: bool = True) -> ModelOrAdapter:
    """The model with its new bank or its adapter, and only the parts of the recipe trained.

    Raises:
        ValueError: a part that the model does not have, or none is left to train.
    """
    given, train, exclude = recipe.model, recipe.parts.train, recipe.parts.freeze or ()
    if (bank := read_mapping("model.add_bank", given.add_bank, "{name: legal}")) is not None:
        if "name" not in bank:
            raise ValueError(f"model.add_bank: {bank} has no name, as in {{name: legal}}")
        add_bank(model, **bank)  # type: ignore[arg-type]
    if recipe.lora.use_lora:
        from peft import get_peft_model, prepare_model_for_kbit_training

        from chorus_moe.training.lora import lora_config

        if given.load_in_4bit:
            # The Trainer switches checkpointing on if the recipe asks for it.
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        model = get_peft_model(
            model, lora_config(model, whole=train or (), verbose=verbose, **recipe.lora.to_options())
        )
    elif train is not None or exclude:
        # From here on only what is named is trained.
        freeze(model, "all")
        unfreeze(model, *(["all"] if train is None else train))
        freeze(model, *exclude)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"nothing is trained: train={train}, freeze={list(exclude)}")
    return model
