"""What every configuration checks before anything is allocated; every error names the field and both numbers."""

from difflib import get_close_matches
from math import isfinite
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig

# Limits far above real models, so that a mistyped size is an error and not an allocation that kills the machine.
MAX_LAYERS, MAX_WIDTH, MAX_VOCABULARY, MAX_POSITIONS = 4_096, 1_048_576, 16_777_216, 1_073_741_824
MAX_BANKS = 1_024

# Keys that `PreTrainedConfig` itself accepts besides its fields.
_TRANSFORMERS_KEYS = {
    "attn_implementation", "auto_map", "experts_implementation", "model_type", "name_or_path", "num_labels",
    "output_attentions", "per_layer_config", "rope_scaling", "rope_theta", "partial_rotary_factor",
    "tie_last_hidden_states", "torch_dtype", "transformers_weights", "quantization_config", "distributed_config",
}  # fmt: skip


def refuse_unknown_keys(config: PreTrainedConfig, keys: dict[str, Any]) -> None:
    """Also numbers that are none, and more labels than any model has.

    Args:
        keys: what was given beside the fields of the configuration.

    Raises:
        ValueError: naming the key or the field.
    """
    # transformers moves generation settings that stand in a model's configuration to a file of their own.
    generation_keys = GenerationConfig._get_default_generation_params()
    known = {name for name in config.__dataclass_fields__ if not name.startswith("_")}
    for key in keys:
        # A leading underscore marks what transformers keeps for itself, such as `_commit_hash`.
        if key.startswith("_") or key in _TRANSFORMERS_KEYS or key in generation_keys or key in known:
            continue
        hint = get_close_matches(key, known, n=1)
        raise ValueError(
            f"{type(config).__name__}: unknown key {key!r}" + (f"; did you mean {hint[0]!r}?" if hint else "")
        )
    # Of these transformers makes a table of names, which nothing else limits.
    num_labels = keys.get("num_labels")
    if num_labels is not None and not 1 <= num_labels <= MAX_WIDTH:
        raise ValueError(f"{type(config).__name__}: num_labels={num_labels} is outside 1..{MAX_WIDTH}")
    for name, value in vars(config).items():
        if name not in ("backbone_config", "expert_banks"):  # which check their own
            _check_finite(f"{type(config).__name__}: {name}", value)


def _check_finite(name: str, value: Any) -> None:
    """A NaN is neither too small nor too large, so that no range refuses it."""
    if isinstance(value, float) and not isfinite(value):
        raise ValueError(f"{name}={value} is not a finite number")
    if isinstance(value, dict | list | tuple):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            _check_finite(f"{name}[{key!r}]", item)


def check_range(config: object, limits: dict[str, tuple[int, int]], where: str | None = None) -> None:
    for name, (low, high) in limits.items():
        value = getattr(config, name)
        if value is not None and not low <= value <= high:
            raise ValueError(f"{where or type(config).__name__}: {name}={value} is outside {low}..{high}")


def check_exit(name: str, layers: int, num_hidden_layers: int) -> None:
    """An exit stands after some layers but not after the last, where the model ends."""
    if not 1 <= layers < num_hidden_layers:
        raise ValueError(
            f"{name}={layers} is outside 1..{num_hidden_layers - 1}: the model has {num_hidden_layers} layers"
        )


def check_divides(config: PreTrainedConfig, whole: str, part: str) -> None:
    if getattr(config, whole) % getattr(config, part) != 0:
        raise ValueError(
            f"{type(config).__name__}: {whole}={getattr(config, whole)} is not a multiple of "
            f"{part}={getattr(config, part)}"
        )
