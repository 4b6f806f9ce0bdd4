"""wav2vec 2.0, HuBERT and WavLM as audio encoders: samples to tokens, on transformers' or torchaudio's modules.

Padding never changes a clip, whatever the parent does.

Shape suffixes: N clips, T samples, L frames or tokens, C channels, D hidden size.
"""

import logging
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel

from .configuration_towers import ChorusAudioConfig

WAVEFORM_TYPES = ("wav2vec2", "hubert", "wavlm")
# Settings that only the parents' own training reads, each with the value that switches it off: a masked feature or a
# dropped layer would leave parameters without gradient.
TRAINING_ONLY = {"layerdrop": 0.0, "mask_time_prob": 0.0, "mask_feature_prob": 0.0, "apply_spec_augment": False}
# Settings that change what is computed in a way that is not written here.
REFUSED = {"add_adapter": False, "conv_pos_batch_norm": False}
# What torchaudio's builders fix.
TORCHAUDIO_FIXED = {"hidden_act": "gelu", "feat_extract_activation": "gelu", "layer_norm_eps": 1e-5}


def build_waveform_backbone(backbone: PreTrainedConfig, library: str = "transformers") -> nn.Module:
    """A newly initialised encoder of samples, of the modules of `transformers` or `torchaudio`; raises as the next two
    functions do."""
    return convert_backbone(AutoModel.from_config(prepare_backbone_config(backbone)), library)


def prepare_backbone_config(backbone: PreTrainedConfig) -> PreTrainedConfig:
    """A copy without augmentation.

    Raises:
        ValueError: a model type or a setting that is not known here.
    """
    if backbone.model_type not in WAVEFORM_TYPES:
        raise ValueError(
            f"backbone_config of type {backbone.model_type!r} hears no waveform; choose from "
            f"{', '.join(WAVEFORM_TYPES)}"
        )
    for name, known in REFUSED.items():
        if getattr(backbone, name, known) != known:
            raise ValueError(f"{backbone.model_type}: {name}={getattr(backbone, name)}, only {known} is supported")
    prepared = deepcopy(backbone)
    for name, value in TRAINING_ONLY.items():
        setattr(prepared, name, value)
    if prepared.model_type == "wavlm":
        # It computes attention in its own way, and refuses every other implementation that a whole model may ask for.
        prepared._attn_implementation = "eager"
    return prepared


def convert_backbone(model: PreTrainedModel, library: str) -> nn.Module:
    """A transformers model, or torchaudio's counterpart with the same weights.

    Raises:
        ImportError: torchaudio is missing or made for another torch.
        ValueError: a setting that torchaudio's builders do not take.
    """
    if library == "transformers":
        return model
    for name, known in TORCHAUDIO_FIXED.items():
        if getattr(model.config, name) != known:
            raise ValueError(
                f"torchaudio's {model.config.model_type} has {name}={known}, not {getattr(model.config, name)}"
            )
    try:
        from torchaudio.models.wav2vec2.utils import import_huggingface_model
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        raise ImportError(f"torchaudio does not fit torch {torch.__version__}: {error}") from error
    # It warns about every model without a CTC head, which is what is wanted here.
    logging.getLogger("torchaudio.models.wav2vec2.utils.import_huggingface").setLevel(logging.ERROR)
    return import_huggingface_model(model).to(model.dtype)


class WaveformEncoder(nn.Module):
    """Samples to tokens, around `backbone`.

    Raises:
        ValueError: a backbone that is not known here or disagrees with the audio configuration.
    """

    def __init__(self, config: ChorusAudioConfig):
        super().__init__()
        backbone: Any = config.backbone_config
        if config.hidden_size != backbone.hidden_size:
            raise ValueError(
                f"audio config has hidden_size={config.hidden_size}, its {backbone.model_type} backbone needs "
                f"{backbone.hidden_size}"
            )
        self.backbone: Any = build_waveform_backbone(backbone, config.backbone_library)
        self.convolutions = config.convolutions
        self.is_torchaudio = config.backbone_library == "torchaudio"
        self.is_wavlm = backbone.model_type == "wavlm"

    @property
    def shortest(self) -> int:
        """Samples of the shortest clip that fills one token."""
        samples = 1
        for kernel, stride in reversed(self.convolutions):
            samples = (samples - 1) * stride + kernel
        return samples

    def get_input_embeddings(self) -> nn.Module:
        """The projection whose output, one tensor, enters the blocks."""
        home = self.backbone.encoder if self.is_torchaudio else self.backbone
        return home.feature_projection.projection

    def forward(self, features_NTF: torch.Tensor, mask_NT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes samples `(N, T, 1)`, zero where the mask is False; returns tokens `(N, L, D)` and which are real."""
        # A clip shorter than one token is heard with silence after it, and gives one.
        missing = max(self.shortest - mask_NT.shape[1], 0)
        samples_NT = nn.functional.pad(features_NTF[..., 0], (0, missing))
        lengths_N = mask_NT.sum(dim=1)
        frames_NCL, frames_N = self._convolve(samples_NT, lengths_N.clamp(min=self.shortest))
        real_NL = torch.arange(frames_NCL.shape[2], device=mask_NT.device) < frames_N[:, None]
        hidden_NLD = self._encode(frames_NCL.transpose(1, 2), real_NL)
        return hidden_NLD, real_NL & (lengths_N > 0)[:, None]

    def _convolve(self, samples_NT: torch.Tensor, lengths_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        maps_NCL = samples_NT[:, None]
        for layer, (kernel, stride) in zip(self.backbone.feature_extractor.conv_layers, self.convolutions, strict=True):
            lengths_N = (lengths_N - kernel) // stride + 1
            # A norm over time: the parent's would take its mean over padding, too.
            if isinstance(getattr(layer, "layer_norm", None), nn.GroupNorm):
                maps_NCL = nn.functional.gelu(masked_instance_norm(layer.conv(maps_NCL), lengths_N, layer.layer_norm))
            elif self.is_torchaudio:
                maps_NCL, _ = layer(maps_NCL, None)
            else:
                maps_NCL = layer(maps_NCL)
        return maps_NCL, lengths_N

    def _encode(self, frames_NLC: torch.Tensor, real_NL: torch.Tensor) -> torch.Tensor:
        if self.is_torchaudio:
            return self._encode_torchaudio(frames_NLC, real_NL)
        hidden = self.backbone.feature_projection(frames_NLC)
        hidden_NLD = hidden[0] if isinstance(hidden, tuple) else hidden
        return self.backbone.encoder(hidden_NLD, attention_mask=real_NL).last_hidden_state

    def _encode_torchaudio(self, frames_NLC: torch.Tensor, real_NL: torch.Tensor) -> torch.Tensor:
        """`Encoder.forward`, with the mask in the form that WavLM's attention takes as well."""
        encoder = self.backbone.encoder
        hidden_NLD = encoder.feature_projection(frames_NLC).masked_fill(~real_NL[..., None], 0.0)
        hidden_NLD, bias = encoder.transformer._preprocess(hidden_NLD), None
        mask = None
        if not self.is_wavlm:
            tokens = real_NL.shape[1]
            # torchaudio's WavLM takes `key_padding_mask` and refuses this argument; others read this alone.
            mask = real_NL[:, None, None].expand(-1, 1, tokens, tokens)
        for layer in encoder.transformer.layers:
            hidden_NLD, bias = layer(hidden_NLD, mask, position_bias=bias, key_padding_mask=~real_NL)
        if not encoder.transformer.layer_norm_first:
            hidden_NLD = encoder.transformer.layer_norm(hidden_NLD)
        return hidden_NLD


def masked_instance_norm(maps_NCL: torch.Tensor, lengths_N: torch.Tensor, norm: nn.GroupNorm) -> torch.Tensor:
    """A group norm with one channel a group, whose statistics are those of the first `lengths_N` frames of each clip.

    In float32, as autocast runs group norms.
    """
    real_N1L = (torch.arange(maps_NCL.shape[2], device=maps_NCL.device) < lengths_N[:, None])[:, None]
    maps = maps_NCL.float()
    count_N11 = lengths_N[:, None, None]
    mean_NC1 = maps.masked_fill(~real_N1L, 0.0).sum(dim=2, keepdim=True) / count_N11
    centred = maps - mean_NC1
    # From centred values: the mean of squares less the squared mean would cancel.
    variance_NC1 = centred.masked_fill(~real_N1L, 0.0).square().sum(dim=2, keepdim=True) / count_N11
    scaled = centred * torch.rsqrt(variance_NC1 + norm.eps)
    return (scaled * norm.weight.float()[:, None] + norm.bias.float()[:, None]).to(maps_NCL.dtype)
