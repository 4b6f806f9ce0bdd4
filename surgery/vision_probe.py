"""What a vision encoder yields: width, layout, prefix tokens, grid and number of tokens.

An encoder is probed once, when its configuration is made; what is saved says what was found.
"""

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from math import isqrt
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PreTrainedConfig

from chorus_moe.modeling.configuration_services import SERVICES
from chorus_moe.modeling.configuration_towers import ChorusVisionConfig
from chorus_moe.modeling.tower_vision_timm import create_timm_encoder, dump_model_args

# Hugging Face models that fit their positions to the image; `image_size` in their configuration is that of pretraining.
ANY_SIZE_TYPES = frozenset({"dinov2", "dinov2_with_registers", "dinov3_vit"})


@dataclass(frozen=True)
class VisionProbe:
    """What an encoder yields for one square image.

    Args:
        layout: `NLC` (tokens, prefix first), `NCHW` or `NHWC` (feature map).
        num_prefix_tokens: class, distillation and register tokens in front of the image tokens.
        grid_size: (rows, columns) of the image tokens, None if they form no grid.
        num_tokens: image tokens, without prefix.
    """

    hidden_size: int
    layout: str
    num_prefix_tokens: int
    grid_size: tuple[int, int] | None
    num_tokens: int


def probe_vision(config: ChorusVisionConfig) -> VisionProbe:
    """Finds what the encoder of a new configuration yields; raises as the two functions below."""
    if config.backbone_config is not None:
        return probe_backbone(config.backbone_config, config.image_size, config.num_channels)
    return probe_vision_encoder(config.architecture, config.model_args, config.image_size, config.num_channels)


SERVICES["probe_vision"] = probe_vision


def probe_vision_encoder(
    architecture: str | None, model_args: dict[str, Any] | None, image_size: int, num_channels: int
) -> VisionProbe:
    """Finds what a timm architecture yields for images of `(num_channels, image_size, image_size)`.

    Raises:
        ImportError: timm is missing.
        ValueError: the encoder cannot be built, or yields neither tokens nor one feature map.
    """
    return _probe_timm(architecture, dump_model_args(architecture, model_args), image_size, num_channels)


def probe_backbone(backbone_config: PreTrainedConfig, image_size: int, num_channels: int) -> VisionProbe:
    """Finds what a Hugging Face vision model yields for images of `(num_channels, image_size, image_size)`.

    Raises:
        ValueError: the configuration is made for other images, or the model yields no `last_hidden_state`.
    """
    name = type(backbone_config).__name__
    fixed = {"num_channels": num_channels}
    if backbone_config.model_type not in ANY_SIZE_TYPES:
        fixed["image_size"] = image_size
    for field, found in fixed.items():
        wanted = getattr(backbone_config, field, None)
        if wanted is not None and wanted not in (found, [found, found], (found, found)):
            raise ValueError(f"{name}: {field}={wanted} but the vision config has {field}={found}")

    def build() -> nn.Module:
        return AutoModel.from_config(deepcopy(backbone_config), dtype=torch.float32)

    def encode(model: Any, pixel_values: torch.Tensor) -> torch.Tensor:
        return model(pixel_values=pixel_values).last_hidden_state

    features, _ = _encode_zeros(name, build, encode, image_size, num_channels)
    if not isinstance(features, torch.Tensor) or features.ndim not in (3, 4):
        raise ValueError(f"{name} yields no tokens or feature map as last_hidden_state; choose another vision model")
    patch_size = getattr(backbone_config, "patch_size", None)
    rows = image_size // patch_size if isinstance(patch_size, int) else None
    num_prefix_tokens = 0
    if features.ndim == 3 and rows is not None:
        num_prefix_tokens = max(features.shape[1] - rows * rows, 0)
    return _describe(name, features, "NCHW", num_prefix_tokens)


@lru_cache(maxsize=256)
def _probe_timm(architecture: str, model_args: str, image_size: int, num_channels: int) -> VisionProbe:
    def build() -> nn.Module:
        return create_timm_encoder(architecture, json.loads(model_args), image_size, num_channels)

    def encode(model: Any, pixel_values: torch.Tensor) -> Any:
        return model.forward_features(pixel_values)

    features, model = _encode_zeros(architecture, build, encode, image_size, num_channels)
    if not isinstance(features, torch.Tensor) or features.ndim not in (3, 4):
        raise ValueError(f"{architecture!r} yields neither tokens nor one feature map; choose another architecture")
    num_prefix_tokens = getattr(model, "num_prefix_tokens", None)
    if num_prefix_tokens is None and features.ndim == 3:
        # Without a word from timm: one token more than a square is a class token.
        odd_one = not _is_square(features.shape[1]) and _is_square(features.shape[1] - 1)
        num_prefix_tokens = int(hasattr(model, "cls_token") or odd_one)
    return _describe(architecture, features, _map_layout(model, features), num_prefix_tokens or 0)


def _encode_zeros(
    name: str,
    build: Callable[[], nn.Module],
    encode: Callable[[Any, torch.Tensor], Any],
    image_size: int,
    num_channels: int,
) -> tuple[Any, nn.Module]:
    """Encodes one blank image on the meta device, or on the CPU if the model reads values; keeps the random state."""
    shape = (1, num_channels, image_size, image_size)
    failure: Exception | None = None
    # On the meta device nothing is allocated. Building draws weights, which must not move the caller's random state.
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for device in ("meta", "cpu"):
            try:
                with torch.device(device):
                    model = build().eval()
                    return encode(model, torch.zeros(shape)), model
            except (NotImplementedError, RuntimeError, AssertionError) as error:
                failure = error
    raise ValueError(f"{name!r} does not encode an image of {shape[1:]}: {failure}") from failure


def _map_layout(model: nn.Module, features: torch.Tensor) -> str:
    # A square image gives a square map: the axis that differs is the channels. timm's word counts where all agree.
    if features.ndim == 4 and features.shape[1] == features.shape[2] != features.shape[3]:
        return "NHWC"
    if features.ndim == 4 and features.shape[2] == features.shape[3] != features.shape[1]:
        return "NCHW"
    return str(getattr(model, "output_fmt", "NCHW"))


def _describe(name: str, features: torch.Tensor, map_layout: str, num_prefix_tokens: int) -> VisionProbe:
    if features.ndim == 4:
        hidden_size = features.shape[1] if map_layout == "NCHW" else features.shape[3]
        rows, columns = features.shape[2:] if map_layout == "NCHW" else features.shape[1:3]
        return VisionProbe(hidden_size, map_layout, 0, (rows, columns), rows * columns)
    num_tokens = features.shape[1] - num_prefix_tokens
    if num_tokens < 1:
        raise ValueError(f"{name!r} yields {features.shape[1]} tokens, of which {num_prefix_tokens} are prefix tokens")
    grid_size = (isqrt(num_tokens), isqrt(num_tokens)) if _is_square(num_tokens) else None
    return VisionProbe(features.shape[2], "NLC", num_prefix_tokens, grid_size, num_tokens)


def _is_square(number: int) -> bool:
    return isqrt(number) ** 2 == number
