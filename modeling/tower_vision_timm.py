"""timm models by name: what a configuration may ask of `timm.create_model`, and nothing else."""

import json
import re
from difflib import get_close_matches
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

# Arguments of `timm.create_model` that load files, or that the configuration or the tower decides.
RESERVED_MODEL_ARGS = {
    "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict", "checkpoint_path", "cache_dir",
    "features_only", "num_classes", "in_chans",
}  # fmt: skip
# No argument of a timm model is larger; a greater number in a configuration is a mistake or an attack.
MAX_MODEL_ARG = 65_536
MAX_DEPTH = 1_024


def create_timm_encoder(
    architecture: str | None, model_args: dict[str, Any] | None, image_size: int, num_channels: int, **options: Any
) -> nn.Module:
    """Builds a timm model, from its name alone; without classifier and weights unless `options` say otherwise.

    Args:
        architecture: a name of `timm.list_models()`, with or without a pretrained tag.
        model_args: further arguments of `timm.create_model`, as JSON can hold them.
        image_size: pixels; passed on as `img_size` to architectures that fix it.

    Raises:
        ImportError: timm is missing.
        ValueError: an unknown name, a reserved or oversized argument, or a model that timm refuses to build.
    """
    options = {"pretrained": False, "num_classes": 0, "in_chans": num_channels} | options
    timm = _import_timm()
    _check_architecture(architecture, timm)
    # Through JSON, so that the probed encoder is the one that a saved configuration rebuilds.
    arguments = json.loads(dump_model_args(architecture, model_args))
    try:
        # Others take any size, and some of them refuse the argument.
        if getattr(timm.get_pretrained_cfg(architecture), "fixed_input_size", False):
            arguments.setdefault("img_size", image_size)
        return timm.create_model(architecture, **options, **arguments)
    except Exception as error:
        raise ValueError(f"timm cannot build {architecture!r} with model_args={arguments}: {error}") from error


def check_backbone(config: dict[str, Any] | PreTrainedConfig | None) -> None:
    """Hold what transformers builds of timm, also inside of another model, to the rules of `architecture`.

    Raises:
        ValueError: a source in the place of an architecture's name, a reserved or oversized argument, or a model of the
            Hub named as a part, whose configuration transformers would fetch.
    """
    values = config if isinstance(config, dict) else {} if config is None else config.to_dict()
    name, model_type = values.get("backbone"), values.get("model_type")
    if model_type == "timm_wrapper" or (model_type == "timm_backbone" and name is not None):
        architecture = name if model_type == "timm_backbone" else values.get("architecture")
        _check_architecture(architecture, _import_timm())
        dump_model_args(architecture, values.get("model_args"))
    elif name is not None:
        raise ValueError(f"backbone_config of type {model_type!r}: backbone={name!r} is looked up on the Hub; drop it")
    for part in values.values():
        for inner in part if isinstance(part, list | tuple) else [part]:
            if isinstance(inner, dict | PreTrainedConfig):
                check_backbone(inner)


def _import_timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise ImportError(f"vision towers need timm: pip install 'timm>=1.0.31,<1.1' ({error})") from error
    return timm


def _check_architecture(architecture: str | None, timm: Any) -> None:
    # Checked first: a foreign configuration can neither reach the network nor name a file.
    if not isinstance(architecture, str) or not re.fullmatch(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)?", architecture):
        raise ValueError(
            f"architecture={architecture!r} is not a plain timm name such as 'vit_tiny_patch16_224'; "
            "sources such as hf-hub: or local-dir: are never followed"
        )
    if not timm.is_model(architecture):
        matches = get_close_matches(architecture.split(".")[0], timm.list_models(), n=3)
        hint = f"; did you mean {', '.join(matches)}?" if matches else "; see timm.list_models()"
        raise ValueError(f"timm has no architecture {architecture!r}{hint}")


def dump_model_args(architecture: str | None, model_args: dict[str, Any] | None) -> str:
    """The arguments as JSON; raises ValueError for one that is reserved, too large or no JSON."""
    arguments = model_args or {}
    for key, value in arguments.items():
        if key in RESERVED_MODEL_ARGS:
            raise ValueError(f"{architecture!r}: model_args may not hold {key!r}; the vision config decides it")
        _check_size(architecture, key, value, MAX_DEPTH if key.startswith("depth") else MAX_MODEL_ARG)
    try:
        return json.dumps(arguments, sort_keys=True)
    except TypeError as error:
        raise ValueError(f"{architecture!r}: model_args must be plain JSON values: {error}") from error


def _check_size(architecture: str | None, key: str, value: Any, limit: int) -> None:
    if isinstance(value, (int, float)) and value > limit:
        raise ValueError(f"{architecture!r}: model_args[{key!r}]={value} is larger than {limit}")
    if isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            _check_size(architecture, key, item, limit)
