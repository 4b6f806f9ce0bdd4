"""The audio tower: features to audio tokens, by a Conformer on torchaudio's parts, a time-delay network, a Whisper
encoder, or an encoder of samples (`tower_audio_waveform`).

Padding never changes a clip's features, in evaluation and in training.

Shape suffixes: N clips, T frames or tokens, F mel bins, C channels, D hidden size.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

from .configuration_towers import ChorusAudioConfig
from .modeling_base import ChorusTower
from .tower_audio_waveform import WaveformEncoder


@dataclass
class ChorusAudioOutput(ModelOutput):
    """Output of the audio tower.

    Args:
        last_hidden_state: `(clips, tokens, hidden_size)`, zero where padded.
        attention_mask: bool `(clips, tokens)`, True on real tokens.
    """

    last_hidden_state: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None


class ChorusAudioModel(ChorusTower):
    """Windows of sound to tokens.

    Raises:
        ImportError: torchaudio is missing or made for another torch.
        ValueError: a `backbone_config` that is not known here or disagrees with the audio configuration.
    """

    config: ChorusAudioConfig
    main_input_name = "input_features"
    input_modalities = ("audio",)

    def __init__(self, config: ChorusAudioConfig):
        super().__init__(config)
        if config.feature_type == "waveform":
            self.encoder: Any = WaveformEncoder(config)
        elif config.backbone_config is not None:
            self.encoder = WhisperWindowEncoder(config)
        else:
            self.encoder = ENCODERS[config.encoder_type](config)
        self.post_init()

    def forward(
        self, input_features: torch.Tensor, input_features_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> ChorusAudioOutput:
        """Encodes windows of sound.

        Args:
            input_features: frames `(clips, frames, num_mel_bins)`, padded on either side: log-mel frames, or samples
                `(clips, samples, 1)`. With `feature_type="whisper"` windows of full length, whose padding is what
                Whisper hears after the end of a clip.
            input_features_mask: `(clips, frames)`, nonzero on real frames; all real if None.

        Raises:
            ValueError: shapes that disagree with the configuration or with each other.
        """
        mask_NT = self._check_clips(input_features, input_features_mask)
        features_NTF = input_features.to(self.dtype)
        if not torch.compiler.is_compiling() and bool((mask_NT[:, 1:] & ~mask_NT[:, :1]).any()):
            # Pipelines pad all that a batch holds on the side on which they pad text.
            order_NT = mask_NT.logical_not().byte().argsort(dim=1, stable=True)
            mask_NT = mask_NT.take_along_dim(order_NT, dim=1)
            features_NTF = features_NTF.take_along_dim(order_NT[..., None], dim=1)
        if self.config.feature_type != "whisper":
            # Whisper was trained on what its extractor puts behind a clip, so there padding stays as it is.
            features_NTF = features_NTF.masked_fill(~mask_NT[..., None], 0.0)
        hidden_NTD, token_mask_NT = self.encoder(features_NTF, mask_NT)
        return ChorusAudioOutput(hidden_NTD.masked_fill(~token_mask_NT[..., None], 0.0), token_mask_NT)

    def smallest_input(self) -> torch.Tensor:
        """One silent clip, as short as may be, for a forward whose result is multiplied by zero."""
        # Two tokens: a batch norm has no variance over one.
        frames = self.encoder.window if self.config.feature_type == "whisper" else 2 * self.config.subsampling
        shape = (1, frames, self.config.num_mel_bins)
        # Zeros and not noise: their forward must be finite, since NaN times zero is NaN.
        return torch.zeros(shape, device=self.device, dtype=self.dtype)

    def get_input_embeddings(self) -> nn.Module:
        """The module whose output, one tensor, enters the blocks: an encoder has no token embedding."""
        return self.encoder.get_input_embeddings()

    def _check_clips(self, input_features: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        shape, bins = tuple(input_features.shape), self.config.num_mel_bins
        if len(shape) != 3 or shape[1] < 1 or shape[2] != bins:
            takes = f"the audio tower takes (clips, frames >= 1, mel bins = {bins})"
            raise ValueError(f"input_features has shape {shape}, {takes}")
        if mask is None:
            return torch.ones(shape[:2], dtype=torch.bool, device=input_features.device)
        if tuple(mask.shape) != shape[:2]:
            raise ValueError(f"input_features_mask has shape {tuple(mask.shape)}, input_features has {shape[:2]}")
        return mask.bool()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Convolutions, linear layers and norms start as torch and torchaudio start them."""
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.LayerNorm, nn.GroupNorm, nn.Embedding)):
            module.reset_parameters()
        elif isinstance(module, nn.MultiheadAttention):
            module._reset_parameters()
        elif isinstance(module, nn.BatchNorm1d):
            super()._init_weights(module)


class ConformerEncoder(nn.Module):
    """Conformer (Gulati et al. 2020, arXiv 2005.08100) with exact padding.

    Order in time comes from the convolutions and from sinusoidal positions, which are computed, never stored.
    """

    def __init__(self, config: ChorusAudioConfig):
        super().__init__()
        self.front_end = ConvolutionalFrontEnd(config)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(ConformerBlock(config) for _ in range(config.num_hidden_layers))

    def get_input_embeddings(self) -> nn.Module:
        return self.front_end.norm

    def forward(self, features_NTF: torch.Tensor, mask_NT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden_NTD, mask_NT = self.front_end(features_NTF, mask_NT)
        hidden_NTD = self.dropout(hidden_NTD + sinusoidal_positions(hidden_NTD))
        for layer in self.layers:
            hidden_NTD = layer(hidden_NTD, mask_NT)
        return hidden_NTD, mask_NT


class ConvolutionalFrontEnd(nn.Module):
    """Halves time and frequency log2(subsampling) times, then projects what remains of a token to the hidden size."""

    def __init__(self, config: ChorusAudioConfig):
        super().__init__()
        stages = int(math.log2(config.subsampling))
        channels = max(8, config.hidden_size // 4)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(channels if stage else 1, channels, kernel_size=3, stride=2, padding=1) for stage in range(stages)
        )
        bins = math.ceil(config.num_mel_bins / config.subsampling)
        self.projection = nn.Linear((channels if stages else 1) * bins, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size)

    def forward(self, features_NTF: torch.Tensor, mask_NT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        maps_NCTF = features_NTF[:, None]
        for convolution in self.convolutions:
            # Zeroed before every convolution, padding acts as the zeros beyond the end of a clip that is alone.
            maps_NCTF = nn.functional.silu(convolution(maps_NCTF.masked_fill(~mask_NT[:, None, :, None], 0.0)))
            # A stride of two rounds up, and so does this: `n` frames give exactly `ceil(n / subsampling)` tokens.
            mask_NT = mask_NT[:, ::2]
        return self.norm(self.projection(maps_NCTF.transpose(1, 2).flatten(2))), mask_NT


class ConformerBlock(GradientCheckpointingLayer):
    """torchaudio's `ConformerLayer` with a convolution module that respects padding."""

    def __init__(self, config: ChorusAudioConfig):
        super().__init__()
        parts: Any = import_conformer_layer()(
            input_dim=config.hidden_size,
            ffn_dim=config.intermediate_size,
            num_attention_heads=config.num_attention_heads,
            depthwise_conv_kernel_size=config.conv_kernel_size,
            dropout=config.dropout,
            use_group_norm=True,
        )
        self.ffn1 = parts.ffn1
        self.self_attn_layer_norm = parts.self_attn_layer_norm
        self.self_attn = parts.self_attn
        self.self_attn_dropout = parts.self_attn_dropout
        # torchaudio's own leaks padding through its convolutions and couples clips through its batch norm.
        self.conv_module = MaskedConvolution(config)
        self.ffn2 = parts.ffn2
        self.final_layer_norm = parts.final_layer_norm

    def forward(self, hidden_NTD: torch.Tensor, mask_NT: torch.Tensor) -> torch.Tensor:
        # Half steps around attention and convolution, as in Macaron (arXiv 2005.08100, section 2.4).
        hidden_NTD = hidden_NTD + 0.5 * self.ffn1(hidden_NTD)
        hidden_NTD = hidden_NTD + self._attend(self.self_attn_layer_norm(hidden_NTD), mask_NT)
        hidden_NTD = hidden_NTD + self.conv_module(hidden_NTD, mask_NT)
        hidden_NTD = hidden_NTD + 0.5 * self.ffn2(hidden_NTD)
        return self.final_layer_norm(hidden_NTD)

    def _attend(self, hidden_NTD: torch.Tensor, mask_NT: torch.Tensor) -> torch.Tensor:
        # A clip without any real token attends to its padding: a softmax over nothing would be NaN.
        ignored_NT = ~mask_NT & mask_NT.any(dim=1, keepdim=True)
        # Contiguous: products of another layout sum in an order that depends on whether the weight is trained.
        input_TND = hidden_NTD.transpose(0, 1).contiguous()
        output_TND, _ = self.self_attn(input_TND, input_TND, input_TND, key_padding_mask=ignored_NT, need_weights=False)
        return self.self_attn_dropout(output_TND.transpose(0, 1))


class MaskedConvolution(nn.Module):
    """The Conformer's convolution module; padded frames are zero for the depthwise kernel, norms are per frame."""

    def __init__(self, config: ChorusAudioConfig):
        super().__init__()
        width, kernel = config.hidden_size, config.conv_kernel_size
        self.layer_norm = nn.LayerNorm(width)
        self.pointwise_in = nn.Linear(width, 2 * width)
        self.depthwise = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=width)
        # Per frame: a batch or group norm would take its mean over padding and other clips.
        self.depthwise_norm = nn.LayerNorm(width)
        self.pointwise_out = nn.Linear(width, width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden_NTD: torch.Tensor, mask_NT: torch.Tensor) -> torch.Tensor:
        hidden_NTD = nn.functional.glu(self.pointwise_in(self.layer_norm(hidden_NTD)))
        hidden_NTD = hidden_NTD.masked_fill(~mask_NT[..., None], 0.0)
        hidden_NTD = self.depthwise(hidden_NTD.transpose(1, 2)).transpose(1, 2)
        hidden_NTD = nn.functional.silu(self.depthwise_norm(hidden_NTD))
        return self.dropout(self.pointwise_out(hidden_NTD))


class TimeDelayEncoder(nn.Module):
    """Convolutions in time over all channels (Waibel et al. 1989): what a token hears ends a few frames around it.

    Batch norms take their statistics over the real frames of all clips, which meet there in training. Activation
    checkpointing leaves it alone: recomputed, running statistics would move twice.
    """

    def __init__(self, config: ChorusAudioConfig):
        super().__init__()
        halvings = int(math.log2(config.subsampling))
        self.convolutions, self.norms = nn.ModuleList(), nn.ModuleList()
        for index in range(config.num_hidden_layers):
            channels, stride = config.hidden_size if index else config.num_mel_bins, 1 + (1 <= index <= halvings)
            kernel = config.conv_kernel_size
            self.convolutions.append(
                nn.Conv1d(channels, config.hidden_size, kernel, stride, padding=kernel // 2, bias=False)
            )
            self.norms.append(nn.BatchNorm1d(config.hidden_size))
        self.dropout = nn.Dropout(config.dropout)

    def get_input_embeddings(self) -> nn.Module:
        return self.convolutions[0]

    def forward(self, hidden_NTD: torch.Tensor, mask_NT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        layers: Any = zip(self.convolutions, self.norms, strict=True)
        for convolution, norm in layers:
            hidden_NTD = hidden_NTD.masked_fill(~mask_NT[..., None], 0.0)
            hidden_NTD = convolution(hidden_NTD.transpose(1, 2)).transpose(1, 2)
            mask_NT = mask_NT[:, :: convolution.stride[0]]
            rows = mask_NT.flatten().nonzero().squeeze(1) if norm.training else None
            if rows is not None and (len(rows) > 1 or isinstance(norm, nn.SyncBatchNorm)):
                hidden_XD = hidden_NTD.flatten(0, 1)
                normed = norm(hidden_XD.index_select(0, rows))
                hidden_NTD = torch.zeros_like(hidden_XD).index_copy(0, rows, normed).view_as(hidden_NTD)
            else:
                # Also in training, where one frame has no variance of its own.
                known = norm.running_mean, norm.running_var, norm.weight, norm.bias
                hidden_NTD = nn.functional.batch_norm(hidden_NTD.transpose(1, 2), *known, eps=norm.eps).transpose(1, 2)
            hidden_NTD = hidden_NTD.relu()
        return self.dropout(hidden_NTD), mask_NT


ENCODERS: dict[str, type[nn.Module]] = {"conformer": ConformerEncoder, "time_delay": TimeDelayEncoder}


class WhisperWindowEncoder(nn.Module):
    """A Hugging Face Whisper encoder; every clip fills its window, as in its own training.

    Whisper hears the padding, so it is always the same: what its feature extractor puts there
    (`feature_type="whisper"`), otherwise the clip's lowest value.
    """

    def __init__(self, config: ChorusAudioConfig):
        super().__init__()
        from transformers.models.whisper.modeling_whisper import WhisperEncoder

        backbone = config.backbone_config
        if backbone.model_type != "whisper":
            raise ValueError(f"backbone_config of type {backbone.model_type!r} is no mel encoder known here: 'whisper'")
        for name, found, wanted in (
            ("hidden_size", config.hidden_size, backbone.d_model),
            ("num_mel_bins", config.num_mel_bins, backbone.num_mel_bins),
            ("subsampling", config.subsampling, 2),
        ):
            if found != wanted:
                raise ValueError(f"audio config has {name}={found}, its Whisper backbone needs {wanted}")
        self.front_end = WhisperEncoder._from_config(backbone)
        self.window = 2 * backbone.max_source_positions
        self.hears_padding = config.feature_type == "whisper"

    def get_input_embeddings(self) -> nn.Module:
        return self.front_end.get_input_embeddings()

    def forward(self, features_NTF: torch.Tensor, mask_NT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        frames = features_NTF.shape[1]
        if frames > self.window or (self.hears_padding and frames < self.window):
            raise ValueError(f"input_features has {frames} frames, a Whisper window holds {self.window}")
        if not self.hears_padding:
            features_NTF = self._fill_window(features_NTF, mask_NT)
        hidden_NTD = self.front_end(features_NTF.transpose(1, 2)).last_hidden_state
        # The rest of the window was heard, but is no part of the clip.
        return hidden_NTD[:, : (frames + 1) // 2], mask_NT[:, ::2]

    def _fill_window(self, features_NTF: torch.Tensor, mask_NT: torch.Tensor) -> torch.Tensor:
        # Silence in log-mel features is the lowest value, not zero.
        lowest_N = features_NTF.masked_fill(~mask_NT[..., None], torch.inf).amin(dim=(1, 2))
        lowest_N = lowest_N.masked_fill(~mask_NT.any(dim=1), 0.0)
        features_NTF = torch.where(mask_NT[..., None], features_NTF, lowest_N[:, None, None])
        window_NTF = lowest_N[:, None, None].expand(-1, self.window - features_NTF.shape[1], features_NTF.shape[2])
        return torch.cat([features_NTF, window_NTF], dim=1)


def sinusoidal_positions(hidden_NTD: torch.Tensor) -> torch.Tensor:
    """Sines and cosines of the token index, `(tokens, width)`, in the dtype and on the device of `hidden_NTD`."""
    tokens, width = hidden_NTD.shape[1:]
    half = (width + 1) // 2
    scale = math.log(10_000.0) / max(half - 1, 1)
    rates = torch.exp(-scale * torch.arange(half, device=hidden_NTD.device, dtype=torch.float32))
    angles = torch.arange(tokens, device=hidden_NTD.device, dtype=torch.float32)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)[:, :width].to(hidden_NTD.dtype)


def import_conformer_layer() -> type[nn.Module]:
    """torchaudio's `ConformerLayer`.

    Raises:
        ImportError: torchaudio is missing, or its binary does not fit the installed torch.
    """
    try:
        from torchaudio.models.conformer import ConformerLayer
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        raise ImportError(
            "the audio tower needs torchaudio 2.11 with torch >=2.11,<2.15 from the same package index "
            f"(found torch {torch.__version__}): pip install 'torchaudio==2.11.*' 'torch>=2.11,<2.15'. Cause: {error}"
        ) from error
    return ConformerLayer
