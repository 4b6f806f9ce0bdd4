"""What every configuration checks before anything is allocated; every error names the field and both numbers."""

from difflib import get_close_matches
from math import inf, isfinite
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig

# Limits far above real models, so that a mistyped size is an error and not an allocation that kills the machine.
MAX_LAYERS, MAX_WIDTH, MAX_VOCABULARY, MAX_POSITIONS = 4_096, 1_048_576, 16_777_216, 1_073_741_824
MAX_BANKS = 1_024
# The name of a field, or its last word -> outside of what its numbers can only be wrong, here and in encoders'
# configurations, which transformers does not check.
SENSIBLE = {
    "eps": (0, 1), "dropout": (0, 1), "range": (0, 1_000), "rope_theta": (1e-6, inf), "factor": (1e-6, inf),
    "partial_rotary_factor": (1, 1), "no_rope_layers": (0, 1), "coef": (0, inf), "num_prefix_tokens": (0, MAX_WIDTH),
    "max_seconds": (1e-6, 86_400), "hidden_size": (1, MAX_WIDTH), "model": (1, MAX_WIDTH), "heads": (1, MAX_WIDTH),
    "patch_size": (1, MAX_WIDTH), "grid_size": (1, MAX_WIDTH), "conv_stride": (1, MAX_WIDTH),
    "conv_kernel": (1, MAX_WIDTH), "num_hidden_layers": (0, MAX_LAYERS), "num_labels": (1, MAX_WIDTH),
    "projection_dim": (1, MAX_WIDTH), "skip_budget": (0, 1), "exit_thresholds": (0, 1),
    "original_max_position_embeddings": (1, MAX_POSITIONS),
}  # fmt: skip

# Keys that `PreTrainedConfig` itself accepts besides its fields.
_TRANSFORMERS_KEYS = {
    "attn_implementation", "auto_map", "experts_implementation", "model_type", "name_or_path", "num_labels",
    "output_attentions", "per_layer_config", "rope_scaling", "rope_theta", "partial_rotary_factor",
    "tie_last_hidden_states", "torch_dtype", "transformers_weights", "quantization_config", "distributed_config",
}  # fmt: skip


def refuse_unknown_keys(config: PreTrainedConfig, keys: dict[str, Any]) -> None:
    """Also numbers that are none, and those that are not `SENSIBLE`.

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
    # These check their own.
    for name, value in {**vars(config), **keys}.items():
        if name not in ("expert_banks", "text_config", "vision_config", "audio_config"):
            _check_numbers(f"{type(config).__name__}: {name}", name, value)


def _check_numbers(where: str, name: str, value: Any) -> None:
    low, high = SENSIBLE.get(name) or SENSIBLE.get(name.split("_")[-1]) or (-inf, inf)
    if isinstance(value, float | int) and not isfinite(value):
        # A NaN is neither too small nor too large, so that no range refuses it.
        raise ValueError(f"{where}={value} is not a finite number")
    if isinstance(value, float | int) and not low <= value <= high:
        raise ValueError(f"{where}={value} is outside {low}..{high}")
    items = vars(value) if isinstance(value, PreTrainedConfig) else value
    if isinstance(items, dict):
        # An encoder splits its width into heads; with a `head_dim` the two need not agree.
        for whole, part in (("hidden_size", "num_attention_heads"), ("d_model", "encoder_attention_heads")):
            check_divides(items, whole, part if "head_dim" not in items else "", where)
        for key, item in items.items():
            _check_numbers(f"{where}[{key!r}]", str(key), item)
    elif isinstance(items, list | tuple):
        for index, item in enumerate(items):
            _check_numbers(f"{where}[{index}]", name, item)


def check_range(config: object, limits: dict[str, tuple[int, int]], where: str | None = None) -> None:
    for name, (low, high) in limits.items():
        value = getattr(config, name)
        if value is not None and not low <= value <= high:
            raise ValueError(f"{where or type(config).__name__}: {name}={value} is outside {low}..{high}")


def check_exit(name: str, layers: int, num_hidden_layers: int) -> None:
    """An exit stands after some layers but not after the last, where the model ends."""
    if not 1 <= layers < num_hidden_layers:
        raise ValueError(f"{name}={layers} is outside 1..{num_hidden_layers - 1} of {num_hidden_layers} layers")


def check_divides(config: object, whole: str, part: str, where: str | None = None) -> None:
    values = config if isinstance(config, dict) else vars(config)
    size, count = values.get(whole), values.get(part)
    if isinstance(size, int) and isinstance(count, int) and count and size % count:
        raise ValueError(f"{where or type(config).__name__}: {whole}={size} is not a multiple of {part}={count}")
