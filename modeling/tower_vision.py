"""The vision tower: any timm architecture, or any Hugging Face vision model, as a sequence of image tokens."""

from typing import Any

import torch
from torch import nn
from transformers import AutoModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import logging

from .configuration_towers import ChorusVisionConfig
from .modeling_base import ChorusTower
from .tower_vision_timm import create_timm_encoder

logger = logging.get_logger(__name__)


class ChorusVisionModel(ChorusTower):
    """Images to tokens, around `timm_model` or, for a `backbone_config`, around `backbone`.

    Raises:
        ImportError: timm is missing.
        ValueError: the encoder cannot be built.
    """

    config: ChorusVisionConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)

    def __init__(self, config: ChorusVisionConfig):
        super().__init__(config)
        self.timm_model: Any = None
        self.backbone: Any = None
        if config.backbone_config is None:
            self.timm_model = _create_timm(config)
        else:
            self.backbone = AutoModel.from_config(config.backbone_config)
            _freeze_mask_tokens(self.backbone)
        self._built_on_meta = next(self.parameters()).is_meta
        self._timm_checkpointing = False
        self._reference: tuple[nn.Module, dict[nn.Module, str]] | None = None
        self.post_init()

    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutput:
        """Encodes images.

        Args:
            pixel_values: normalised images, `(images, num_channels, image_size, image_size)`.

        Returns:
            `last_hidden_state` of shape `(images, num_tokens, hidden_size)`: image tokens in row order, without prefix.

        Raises:
            ValueError: another number of channels or another size than the configuration says.
        """
        expected = (self.config.num_channels, self.config.image_size, self.config.image_size)
        if pixel_values.ndim != 4 or pixel_values.shape[1:] != expected:
            takes = f"the vision tower takes (images, channels, height, width) with {expected} for one image"
            raise ValueError(f"pixel_values has shape {tuple(pixel_values.shape)}, {takes}")
        self._reference = None
        features, pooled = self._encode(pixel_values.to(self.dtype))
        tokens = self._image_tokens(features)
        if pooled is not None:
            # A pooling head's parameters are never unused: data-parallel training waits for every gradient.
            tokens = tokens + (pooled * 0.0).sum()
        return BaseModelOutput(last_hidden_state=tokens)

    def smallest_input(self) -> torch.Tensor:
        """Blank images for a forward whose result is multiplied by zero: one, or two where batch norm needs them."""
        # A batch norm has no variance over one value per channel.
        images = 2 if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in self.modules()) else 1
        config = self.config
        shape = (images, config.num_channels, config.image_size, config.image_size)
        return torch.zeros(shape, device=self.device, dtype=self.dtype)

    def get_input_embeddings(self) -> nn.Module:
        """The module that meets the pixels first: an encoder has no token embedding."""
        return self.timm_model if self.backbone is None else self.backbone.get_input_embeddings()

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether timm recomputes its blocks in the backward pass; a Hugging Face backbone keeps its own flags."""
        return self._timm_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enable: bool) -> None:
        self._timm_checkpointing = enable
        if self.timm_model is None:
            return
        try:
            self.timm_model.set_grad_checkpointing(enable)
        # timm's models that cannot do it refuse by assertion, or lack the method.
        except (AssertionError, AttributeError):
            if enable:
                logger.warning_once(f"timm has no activation checkpointing for {self.config.architecture!r}")

    def _encode(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns the features in the encoder's own layout and, in training, its pooled output if it has one."""
        if self.backbone is not None:
            output = self.backbone(pixel_values=pixel_values)
            return output.last_hidden_state, getattr(output, "pooler_output", None) if self.training else None
        features = self.timm_model.forward_features(pixel_values)
        return features, self.timm_model.forward_head(features, pre_logits=True) if self.training else None

    def _image_tokens(self, features: torch.Tensor) -> torch.Tensor:
        config = self.config
        if config.layout == "NCHW":
            tokens = features.flatten(2).transpose(1, 2)
        elif config.layout == "NHWC":
            tokens = features.flatten(1, 2)
        else:
            tokens = features[:, config.num_prefix_tokens :]
        if tokens.shape[1:] != (config.num_tokens, config.hidden_size):
            raise ValueError(
                f"the vision encoder yields (tokens, width)={tuple(tokens.shape[1:])} for one image but the "
                f"configuration says {(config.num_tokens, config.hidden_size)}; compose the configuration anew"
            )
        return tokens

    @torch.no_grad()
    def _init_weights(self, module: Any) -> None:
        if self.timm_model is None:
            return
        # `from_pretrained` builds on the meta device, which loses buffers that are not saved and leaves missing tensors
        # uninitialised. The former are made again, the latter copied from a fresh model: timm's initialisation is kept.
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()
        if not self._built_on_meta:
            return
        missing = _missing_tensors(module)
        if missing:
            fresh = self._fresh_counterpart(module)
            for name, tensor in missing:
                init.copy_(tensor, getattr(fresh, name))

    def _fresh_counterpart(self, module: nn.Module) -> nn.Module:
        """The same module of a timm model that timm has just initialised; kept until the first forward."""
        if self._reference is None:
            with torch.device("cpu"):
                fresh = _create_timm(self.config)
            self._reference = (fresh, {module: name for name, module in self.timm_model.named_modules()})
        fresh, names = self._reference
        return fresh.get_submodule(names[module])


def _create_timm(config: ChorusVisionConfig) -> nn.Module:
    # Without pretrained weights: they come with the checkpoint alone, and loading needs no network.
    return create_timm_encoder(config.architecture, config.model_args, config.image_size, config.num_channels)


def _freeze_mask_tokens(backbone: nn.Module) -> None:
    """Tokens that stand for hidden patches serve the backbone's own training; here nothing would reach them."""
    for name, parameter in backbone.named_parameters():
        if name.rpartition(".")[2] == "mask_token":
            parameter.requires_grad_(False)


def _missing_tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """The module's own saved tensors that no checkpoint has filled."""
    saved: list[tuple[str, torch.Tensor]] = [*module.named_parameters(recurse=False)]
    saved += [(n, b) for n, b in module.named_buffers(recurse=False) if n not in module._non_persistent_buffers_set]
    return [(name, tensor) for name, tensor in saved if not getattr(tensor, "_is_hf_initialized", False)]
