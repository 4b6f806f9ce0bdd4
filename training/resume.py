"""Whether a checkpoint still belongs to a run: to its model, which an operation may have changed, and its arguments.

Unusual here: an optimizer's state knows its parameters by number alone. A bank more or a frozen part moves all numbers
behind it, and torch notices a wrong count at most; so the weights saved beside it are compared by name first.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from safetensors import safe_open
from torch import nn
from transformers import Trainer, TrainingArguments

from chorus_moe.training.checkpoints import fixed_arguments, saved_arguments

# States with the shape of their parameter, by the names that torch's and transformers' optimizers give them.
LIKE_PARAMETER = ("exp_avg", "exp_avg_sq", "momentum_buffer", "square_avg", "z")
CURE = (
    "start a new run from these weights (their own optimizer state starts anew), or continue with the model that the "
    "checkpoint was saved from"
)


class OptimizerMisfit(ValueError):
    """A saved optimizer state that belongs to other parameters."""


def check_resume(trainer: Trainer, checkpoint: str | Path) -> None:
    """Refuse, before any work, a checkpoint whose weights or optimizer state do not fit the trainer's model, or whose
    run had arguments that it cannot change on the way.

    Checkpoints of adapters are compared by their optimizer state alone, those without one by their weights alone.

    Raises:
        OptimizerMisfit: naming the parameter that is missing, unexpected or of another shape, with both shapes.
        ValueError: naming the argument, with both values.
    """
    folder, model = Path(checkpoint), trainer.model
    _check_arguments(trainer.args, folder)
    _check_adapter(model, folder)
    _check_weights(model, folder)
    path = folder / "optimizer.pt"
    if not path.is_file():
        return
    # Shapes only: on the meta device the state, twice the size of the model, takes no memory.
    state = torch.load(path, map_location="meta", weights_only=True)
    # `create_optimizer` sets the trainer's own optimizer, and `train` would then keep this one.
    kept = trainer.optimizer
    try:
        check_optimizer_state(model, trainer.create_optimizer(), state, source=str(folder))
    finally:
        trainer.optimizer = kept


def _check_arguments(arguments: TrainingArguments, folder: Path) -> None:
    """Refuse what would have no effect, or would show rows twice and others never. Learning rate, weight decay, betas,
    epsilon, warmup and numbers of steps may change: `WholeCheckpoints` applies them."""
    saved, now = saved_arguments(folder), fixed_arguments(arguments)
    names = {"optim": "start a new run from these weights"}
    # Others are functions of the step; these have a state, which brings their old settings back.
    if {saved.get("lr_scheduler_type"), now["lr_scheduler_type"]} & {"reduce_lr_on_plateau", "greedy"}:
        names |= dict.fromkeys(("lr_scheduler_type", "lr_scheduler_kwargs"), names["optim"])
    if not arguments.ignore_data_skip:
        names |= dict.fromkeys(
            ("seed", "data_seed", "rows_per_step"),
            "the order of the rows would change in the middle of an epoch; --ignore_data_skip true begins a new one",
        )
    for name, cure in names.items():
        if name in saved and saved[name] != now[name]:
            raise ValueError(f"{folder} was trained with {name}={saved[name]!r}, now it is {now[name]!r}: {cure}")


def check_optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any], source: str = "the optimizer state"
) -> None:
    """Refuse what `optimizer.load_state_dict(state)` would put on the wrong parameters.

    Args:
        optimizer: a new one, on the parameters of `model`.
        state: of an earlier optimizer's `state_dict()`.

    Raises:
        OptimizerMisfit: naming the first parameter that does not fit, with both shapes, or both counts.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups, saved_groups = optimizer.param_groups, state["param_groups"]
    if len(groups) != len(saved_groups):
        raise OptimizerMisfit(f"{source} has {len(saved_groups)} parameter groups, the optimizer {len(groups)}; {CURE}")
    for number, (group, saved) in enumerate(zip(groups, saved_groups, strict=True)):
        # Not strict: shapes come first, because the first parameter that moved says more than two counts.
        for parameter, key in zip(group["params"], saved["params"], strict=False):
            # A parameter that never had a gradient has no state.
            found = _shape_in(state["state"].get(key, {}))
            if found is not None and found != tuple(parameter.shape):
                name = names.get(id(parameter), "an objective")
                raise OptimizerMisfit(f"{source} has {found} where {name} has {tuple(parameter.shape)}; {CURE}")
        if len(group["params"]) != len(saved["params"]):
            raise OptimizerMisfit(
                f"{source} has {len(saved['params'])} parameters in group {number}, {len(group['params'])} are trained "
                f"now; {CURE}"
            )


def _shape_in(state: Mapping[str, Any]) -> tuple[int, ...] | None:
    return next((tuple(state[key].shape) for key in LIKE_PARAMETER if isinstance(state.get(key), torch.Tensor)), None)


def _check_weights(model: nn.Module, folder: Path) -> None:
    saved: dict[str, tuple[int, ...]] = {}
    # Adapters are saved under another name: for them nothing is found here.
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, framework="pt") as file:
            saved |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    if not saved:
        return
    ours: dict[int, dict[str, tuple[int, ...]]] = {}
    # Tied parameters are saved under one of their names, which need not be the first.
    for name, parameter in model.named_parameters(remove_duplicate=False):
        # DeepSpeed's third stage leaves an empty tensor behind, and its shape beside it.
        ours.setdefault(id(parameter), {})[name] = tuple(getattr(parameter, "ds_shape", parameter.shape))
    for aliases in ours.values():
        name, shape = next(((name, s) for name, s in aliases.items() if name in saved), next(iter(aliases.items())))
        if saved.get(name) != shape:
            found = f"has {name} of shape {saved[name]}" if name in saved else f"has no {name}"
            raise OptimizerMisfit(f"{folder} {found}, the model has it with {shape}; {CURE}")
    known = {name for aliases in ours.values() for name in aliases} | {name for name, _ in model.named_buffers()}
    extra = sorted(saved.keys() - known)
    if extra:
        raise OptimizerMisfit(f"{folder} has {extra[0]} of shape {saved[extra[0]]}, the model does not; {CURE}")


# Settings of an adapter that choose nothing but where it lies; what it is put on is compared by its tensors.
NOT_COMPARED = (
    *("base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping", "task_type"),
    *("target_modules", "target_parameters", "modules_to_save", "exclude_modules"),
)


def _check_adapter(model: Any, folder: Path) -> None:
    """Refuse a checkpoint of another adapter: PEFT would keep what fits in name, and the rest would start anew."""
    path, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    configs = getattr(model, "peft_config", None)
    if configs is None or not path.is_file():
        if configs is not None or path.is_file():
            has = "an adapter" if path.is_file() else "no adapter"
            raise OptimizerMisfit(f"{folder} holds {has}, the model {'has one' if configs else 'has none'}; {CURE}")
        return
    name = "default" if "default" in configs else next(iter(configs))
    saved, ours = (
        json.loads(path.read_text(encoding="utf-8")),
        json.loads(json.dumps(configs[name].to_dict(), default=sorted)),
    )
    before, now_below = (config.get("base_model_name_or_path") for config in (saved, ours))
    if before != now_below:
        # No error: the same model may lie elsewhere by now.
        print(f"{folder.name}: its adapter was trained on {before!r} and continues on {now_below!r}", file=sys.stderr)
    for key in sorted(saved.keys() & ours.keys() - set(NOT_COMPARED)):
        if saved[key] != ours[key]:
            raise OptimizerMisfit(f"{folder} has an adapter with {key}={saved[key]!r}, the model {ours[key]!r}; {CURE}")
    with safe_open(weights, framework="pt") as file:
        theirs = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    state = get_peft_model_state_dict(model, adapter_name=name)
    now = {key: tuple(tensor.shape) for key, tensor in state.items()}
    for key in sorted(theirs.keys() | now.keys()):
        if theirs.get(key) != now.get(key):
            raise OptimizerMisfit(
                f"{folder} has {key} of shape {theirs.get(key)}, the model's adapter has it with {now.get(key)}; {CURE}"
            )
