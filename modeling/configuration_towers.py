"""The configurations of the vision tower and of the audio tower."""

from math import ceil
from typing import TYPE_CHECKING, Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .configuration_banks import check_name
from .configuration_checks import MAX_LAYERS, MAX_WIDTH, check_divides, check_range, refuse_unknown_keys
from .configuration_services import SERVICES
from .tower_vision_timm import check_backbone

FEATURE_TYPES = ("log_mel", "whisper", "waveform")
ENCODER_TYPES = ("conformer", "time_delay")


@strict
class ChorusVisionConfig(PreTrainedConfig):
    r"""The vision tower: any timm architecture, or any Hugging Face vision model.

    Args:
        architecture: a timm model name, built with `pretrained=False`; weights come with the checkpoint.
        model_args: further arguments of `timm.create_model`.
        backbone_config: a Hugging Face vision configuration, instead of `architecture`.
        image_size: height and width of the images, in pixels.
        pool_size: the connector averages `pool_size x pool_size` neighbouring tokens into one.
        hidden_size, layout, num_prefix_tokens, grid_size, num_tokens: what the encoder yields, probed and saved if
            None: width, `NCHW`, `NHWC` or `NLC`, class and register tokens, (rows, columns) or None, tokens without
            prefix.
    """

    model_type = "chorus_vision"
    base_config_key = "vision_config"
    sub_configs_defaults = {
        "backbone_config": SubConfigSpec(config_class=AutoConfig, model_type="siglip_vision_model", optional=True)
    }

    architecture: str | None = "vit_tiny_patch16_224"
    model_args: dict | None = None
    if TYPE_CHECKING:  # what it is once `__post_init__` has read a dictionary
        backbone_config: Any
    else:
        backbone_config: dict | PreTrainedConfig | None = None
    image_size: int = 224
    num_channels: int = 3
    pool_size: int = 1
    if TYPE_CHECKING:  # what they are once `__post_init__` has probed the encoder
        hidden_size: int
        layout: str
        num_prefix_tokens: int
        num_tokens: int
    else:
        hidden_size: int | None = None
        layout: str | None = None
        num_prefix_tokens: int | None = None
        num_tokens: int | None = None
    grid_size: list[int] | None = None
    initializer_range: int | float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        refuse_unknown_keys(self, kwargs)
        # Before the probe, which would build an encoder for any size.
        check_range(self, {"image_size": (1, 16_384), "num_channels": (1, 64), "pool_size": (1, 1_024)})
        check_range(self, {name: (1, MAX_WIDTH) for name in ("hidden_size", "num_tokens")})
        check_backbone(self.backbone_config)
        if isinstance(found := self.backbone_config, dict):  # "encoder": under the field's own name it needs a type
            self.backbone_config = self.sub_configs_defaults["backbone_config"].create_subconfig("encoder", found)[0]
        super().__post_init__(**kwargs)
        if self.backbone_config is not None:
            self.architecture = None
        # Probed once and saved: processor and model read the same numbers, so placeholders cannot disagree with
        # features. Without the package they stay None: transformers makes a configuration without arguments to compare.
        if (self.hidden_size is None or self.num_tokens is None) and "probe_vision" in SERVICES:
            probe = SERVICES["probe_vision"](self)
            self.hidden_size, self.layout = probe.hidden_size, probe.layout
            self.num_prefix_tokens, self.num_tokens = probe.num_prefix_tokens, probe.num_tokens
            self.grid_size = None if probe.grid_size is None else list(probe.grid_size)

    @property
    def num_image_tokens(self) -> int:
        """Placeholder tokens of one image, after the connector's pooling."""
        if self.grid_size is None:
            return ceil(self.num_tokens / self.pool_size**2)
        # As the connector pools: groups at the border may be smaller.
        rows, columns = self.grid_size
        return ceil(rows / self.pool_size) * ceil(columns / self.pool_size)

    def validate_probe(self) -> None:
        """Part of `@strict` validation."""
        if self.num_tokens is not None:
            check_name("ChorusVisionConfig", "layout", self.layout, ("NCHW", "NHWC", "NLC"))
        if self.grid_size is not None and self.grid_size[0] * self.grid_size[1] != self.num_tokens:
            raise ValueError(
                f"ChorusVisionConfig: grid_size={self.grid_size} does not hold num_tokens={self.num_tokens} tokens"
            )


@strict
class ChorusAudioConfig(PreTrainedConfig):
    r"""The audio tower: log-mel features into a Conformer (arXiv 2005.08100) or convolutions, or another encoder.

    Args:
        feature_type: what a frame of `input_features` is: `log_mel`, a row of the log-mel spectrogram; `whisper`, the
            same as Whisper's own feature extractor computes it, in windows of full length; `waveform`, one sample.
        encoder_type: what hears them, `conformer`, or `time_delay` (Waibel et al. 1989): `num_hidden_layers` layers of
            convolutions over `conv_kernel_size` frames, `hidden_size` channels, and batch norms, for few speakers.
        do_normalize: bring the samples of a clip to mean zero and variance one (`waveform` only).
        sampling_rate: samples per second that the features are computed at.
        hop_length: samples between two feature frames; 1 for a waveform, as is `num_mel_bins`.
        max_seconds: length of one window; longer clips become several windows.
        subsampling: feature frames that the convolutional front end turns into one token (a power of two); 1 for a
            waveform, whose encoder has `convolutions` instead.
        pool_size: tokens that the connector turns into one.
        backbone_config: a Hugging Face audio configuration, instead of `encoder_type`.
        backbone_library: whose modules a waveform backbone is built of, `transformers` or `torchaudio`.
    """

    model_type = "chorus_audio"
    base_config_key = "audio_config"
    sub_configs_defaults = {
        "backbone_config": SubConfigSpec(config_class=AutoConfig, model_type="whisper", optional=True)
    }

    feature_type: str = "log_mel"
    encoder_type: str = "conformer"
    do_normalize: bool = False
    sampling_rate: int = 16_000
    num_mel_bins: int = 80
    n_fft: int = 400
    hop_length: int = 160
    max_seconds: int | float = 30.0
    hidden_size: int = 256
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    intermediate_size: int = 1_024
    conv_kernel_size: int = 31
    hidden_act: str = "silu"
    dropout: int | float = 0.0
    subsampling: int = 4
    pool_size: int = 1
    if TYPE_CHECKING:  # what it is once `__post_init__` has read a dictionary
        backbone_config: Any
    else:
        backbone_config: dict | PreTrainedConfig | None = None
    backbone_library: str = "transformers"
    initializer_range: int | float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        refuse_unknown_keys(self, kwargs)
        check_backbone(self.backbone_config)
        if isinstance(found := self.backbone_config, dict):  # "encoder": under the field's own name it needs a type
            self.backbone_config = self.sub_configs_defaults["backbone_config"].create_subconfig("encoder", found)[0]
        super().__post_init__(**kwargs)

    @property
    def convolutions(self) -> list[list[int]]:
        """[kernel, stride] of the convolutions, without padding, between a waveform and the encoder's tokens."""
        if self.feature_type != "waveform" or self.backbone_config is None:
            return []
        kernels, strides = self.backbone_config.conv_kernel, self.backbone_config.conv_stride
        return [list(pair) for pair in zip(kernels, strides, strict=True)]

    @property
    def frames_per_token(self) -> int:
        """Feature frames behind one placeholder token; for a waveform, what `convolutions` leave of them."""
        return self.subsampling * self.pool_size

    def num_audio_tokens(self, num_frames: int) -> int:
        """Placeholder tokens of a window of `num_frames` feature frames."""
        for kernel, stride in self.convolutions:
            # At least one: a clip too short for the kernels is followed by silence, see `WaveformEncoder`.
            num_frames = max((num_frames - kernel) // stride + 1, 1)
        return ceil(num_frames / self.frames_per_token)

    def validate_features(self) -> None:
        """Part of `@strict` validation: the features are those that the encoder takes."""
        check_name("ChorusAudioConfig", "feature_type", self.feature_type, FEATURE_TYPES)
        check_name("ChorusAudioConfig", "encoder_type", self.encoder_type, ENCODER_TYPES)
        check_name("ChorusAudioConfig", "backbone_library", self.backbone_library, ("transformers", "torchaudio"))
        check_name("ChorusAudioConfig", "hidden_act", self.hidden_act, ("silu",))  # torchaudio's knows no other
        if self.feature_type != "waveform":
            return
        if self.backbone_config is None:
            raise ValueError("ChorusAudioConfig: feature_type='waveform' needs a backbone_config that hears samples")
        for name in ("num_mel_bins", "hop_length", "subsampling"):
            if getattr(self, name) != 1:
                raise ValueError(f"ChorusAudioConfig: {name}={getattr(self, name)}, a waveform has {name}=1")

    def validate_sizes(self) -> None:
        """Part of `@strict` validation."""
        widths = ["hidden_size", "num_attention_heads", "intermediate_size"]
        check_range(self, dict.fromkeys(widths, (1, MAX_WIDTH)) | {"num_hidden_layers": (1, MAX_LAYERS)})
        check_range(self, {"sampling_rate": (1_000, 768_000), "n_fft": (2, 65_536), "hop_length": (1, 65_536)})
        check_range(self, {"num_mel_bins": (1, 1_024), "pool_size": (1, 1_024), "subsampling": (1, 64)})
        check_range(self, {"conv_kernel_size": (1, 4_095)})
        check_divides(self, "hidden_size", "num_attention_heads")
        # The front end halves the frames, convolution by convolution.
        if self.subsampling & (self.subsampling - 1):
            raise ValueError(f"ChorusAudioConfig: subsampling={self.subsampling} must be a power of two")
        if self.encoder_type == "time_delay" and self.subsampling >= 2**self.num_hidden_layers:
            raise ValueError(
                f"ChorusAudioConfig: subsampling={self.subsampling} is too much for a time-delay network with "
                f"num_hidden_layers={self.num_hidden_layers}, whose layers but the first halve the frames"
            )
        # An even kernel has no middle: the convolution could not keep the number of frames.
        if self.conv_kernel_size % 2 == 0:
            raise ValueError(f"ChorusAudioConfig: conv_kernel_size={self.conv_kernel_size} must be odd")
