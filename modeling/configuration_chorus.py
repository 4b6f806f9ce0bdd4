"""Configurations of Chorus: the whole model, its text decoder, its vision tower and its audio tower.

Unusual here:
- a misspelt key is an error (transformers stores it in silence);
- sizes are checked before anything is allocated, and every error names both numbers;
- what the vision encoder yields (width, layout, tokens) is probed once and saved with the configuration.
"""

from difflib import get_close_matches
from math import ceil
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .configuration_banks import ExpertBankConfig, read_expert_banks
from .parameter_report import ParameterReport, report_parameters
from .vision_probe import probe_backbone, probe_vision_encoder

DEFAULT_BANKS: dict[str, dict[str, Any]] = {"text": {}, "image": {}, "audio": {}, "common": {}}
MAX_LAYERS, MAX_WIDTH, MAX_VOCABULARY, MAX_POSITIONS = 4_096, 1_048_576, 16_777_216, 1_073_741_824

# Keys that `PreTrainedConfig` itself accepts besides its fields.
_TRANSFORMERS_KEYS = {
    "attn_implementation",
    "auto_map",
    "experts_implementation",
    "model_type",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "per_layer_config",
    "rope_scaling",
    "rope_theta",
    "partial_rotary_factor",
    "tie_last_hidden_states",
    "torch_dtype",
    "transformers_weights",
    "quantization_config",
    "distributed_config",
}


def _refuse_unknown_keys(config: PreTrainedConfig, keys: dict[str, Any]) -> None:
    generation_keys = GenerationConfig._get_default_generation_params()
    known = {name for name in config.__dataclass_fields__ if not name.startswith("_")}
    for key in keys:
        if key.startswith("_") or key in _TRANSFORMERS_KEYS or key in generation_keys or key in known:
            continue
        hint = get_close_matches(key, known, n=1)
        raise ValueError(
            f"{type(config).__name__}: unknown key {key!r}" + (f"; did you mean {hint[0]!r}?" if hint else "")
        )


def _check_range(config: PreTrainedConfig, limits: dict[str, tuple[int, int]]) -> None:
    for name, (low, high) in limits.items():
        value = getattr(config, name)
        if value is not None and not low <= value <= high:
            raise ValueError(f"{type(config).__name__}: {name}={value} is outside {low}..{high}")


def _check_divides(config: PreTrainedConfig, whole: str, part: str) -> None:
    if getattr(config, whole) % getattr(config, part) != 0:
        raise ValueError(
            f"{type(config).__name__}: {whole}={getattr(config, whole)} is not a multiple of "
            f"{part}={getattr(config, part)}"
        )


@strict
class ChorusTextConfig(PreTrainedConfig):
    r"""The decoder: attention, dense layers and sparse layers of expert banks.

    Args:
        intermediate_size: width of the feed-forward of `dense` layers.
        head_dim: width of one head; `hidden_size // num_attention_heads` if None.
        use_qk_norm: RMSNorm on each query and key head (Qwen3).
        sliding_window: tokens that a `sliding_attention` layer sees.
        layer_types: `full_attention` or `sliding_attention` for each layer; all full if None.
        mlp_layer_types: `dense` or `sparse` for each layer; the first dense and all others sparse if None.
        cross_modal_layers: layers with cross-modal attention on a shared query projection. If None: the full-attention
            layers of a sliding-window model, otherwise the last layer.
        share_cross_modal_query: one query projection for all modalities; False unties it, for ablation.
        expert_banks: name -> settings, see [`ExpertBankConfig`]; sizes left out come from `num_experts`,
            `num_experts_per_tok` and `moe_intermediate_size`. The default banks are `text`, `image`, `audio`, `common`.
        shared_expert_intermediate_size: width of the always-on dense experts of a sparse layer; 0 for none.
        router_aux_loss_coef: weight of the balance loss while training. It means the same at any number of
            accumulation steps and ranks.
        router_z_loss_coef: weight of the router z-loss (ST-MoE, arXiv 2202.08906) while training.
        alignment_loss_coef: weight of the alignment of the two directions of cross-modal attention while training.
        is_causal: False for a bidirectional model (classification, embedding).

    Raises:
        ValueError: a size that cannot be built, naming the field and both numbers.
    """

    model_type = "chorus_text"
    base_config_key = "text_config"
    keys_to_ignore_at_inference = ["past_key_values"]
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.q_proj.*": "colwise",
        "layers.*.self_attn.k_proj.*": "colwise",
        "layers.*.self_attn.v_proj.*": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
        "layers.*.mlp.shared_experts.gate_proj": "colwise",
        "layers.*.mlp.shared_experts.up_proj": "colwise",
        "layers.*.mlp.shared_experts.down_proj": "rowwise",
        "layers.*.mlp.banks.*.experts.gate_up_proj": "packed_colwise",
        "layers.*.mlp.banks.*.experts.down_proj": "rowwise",
        "layers.*.mlp.banks.*.experts": "moe_tp_experts",
    }
    base_model_ep_plan = {
        "layers.*.mlp.banks.*.experts.gate_up_proj": "grouped_gemm",
        "layers.*.mlp.banks.*.experts.down_proj": "grouped_gemm",
        "layers.*.mlp.banks.*.experts": "ep_dispatch_experts",
    }

    vocab_size: int = 32_000
    hidden_size: int = 512
    intermediate_size: int = 1_536
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 32_768
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    rope_parameters: dict | None = None
    attention_bias: bool = False
    attention_dropout: int | float = 0.0
    use_qk_norm: bool = False
    sliding_window: int | None = None
    layer_types: list[str] | None = None
    mlp_layer_types: list[str] | None = None
    cross_modal_layers: list[int] | None = None
    share_cross_modal_query: bool = True
    num_experts: int = 8
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 512
    shared_expert_intermediate_size: int = 512
    expert_banks: dict[str, dict] | None = None
    router_aux_loss_coef: float = 0.01
    router_z_loss_coef: float = 0.0
    alignment_loss_coef: float = 0.0
    output_router_logits: bool = False
    is_causal: bool = True
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        _refuse_unknown_keys(self, kwargs)
        _check_range(self, {"num_hidden_layers": (1, MAX_LAYERS), "num_attention_heads": (1, MAX_WIDTH)})
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            _check_divides(self, "hidden_size", "num_attention_heads")
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.layer_types is None:
            self.layer_types = ["full_attention"] * self.num_hidden_layers
        if self.mlp_layer_types is None:
            self.mlp_layer_types = ["dense"] + ["sparse"] * (self.num_hidden_layers - 1)
        if self.cross_modal_layers is None:
            full = [i for i, kind in enumerate(self.layer_types) if kind == "full_attention"]
            mixed = len(full) < self.num_hidden_layers
            self.cross_modal_layers = full if mixed else [self.num_hidden_layers - 1]
        if self.expert_banks is None:
            self.expert_banks = {name: dict(values) for name, values in DEFAULT_BANKS.items()}
        self.expert_banks = {bank.name: bank.to_dict() for bank in self.banks}
        super().__post_init__(**kwargs)

    @property
    def banks(self) -> list[ExpertBankConfig]:
        """The expert banks in the order of the gate's columns."""
        defaults = {
            "num_experts": self.num_experts,
            "num_experts_per_tok": self.num_experts_per_tok,
            "intermediate_size": self.moe_intermediate_size,
        }
        return read_expert_banks(self.expert_banks or {}, defaults)

    @property
    def sparse_layers(self) -> list[int]:
        return [i for i, kind in enumerate(self.mlp_layer_types or []) if kind == "sparse"]

    def banks_of_layer(self, layer_idx: int) -> list[ExpertBankConfig]:
        """The banks that live in a sparse layer."""
        return [bank for bank in self.banks if bank.layers is None or layer_idx in bank.layers]

    def validate_sizes(self):
        """Part of `@strict` validation: nothing is allocated for sizes that cannot be built."""
        widths = ["hidden_size", "intermediate_size", "head_dim", "moe_intermediate_size"]
        _check_range(
            self,
            {name: (1, MAX_WIDTH) for name in widths}
            | {
                "num_hidden_layers": (1, MAX_LAYERS),
                "num_attention_heads": (1, MAX_WIDTH),
                "num_key_value_heads": (1, MAX_WIDTH),
                "vocab_size": (1, MAX_VOCABULARY),
                "max_position_embeddings": (1, MAX_POSITIONS),
                "sliding_window": (1, MAX_POSITIONS),
                "shared_expert_intermediate_size": (0, MAX_WIDTH),
            },
        )
        _check_divides(self, "num_attention_heads", "num_key_value_heads")
        if self.head_dim % 2:
            raise ValueError(f"ChorusTextConfig: head_dim={self.head_dim} must be even for rotary positions")
        for name in ("router_aux_loss_coef", "router_z_loss_coef", "alignment_loss_coef"):
            if getattr(self, name) < 0:
                raise ValueError(f"ChorusTextConfig: {name}={getattr(self, name)} must not be negative")

    def validate_layers(self):
        """Part of `@strict` validation: layer lists fit the number of layers, banks fit the layers they name."""
        for name, allowed in (
            ("layer_types", ("full_attention", "sliding_attention")),
            ("mlp_layer_types", ("dense", "sparse")),
        ):
            kinds = getattr(self, name)
            if len(kinds) != self.num_hidden_layers:
                raise ValueError(
                    f"ChorusTextConfig: {name} has {len(kinds)} entries for num_hidden_layers={self.num_hidden_layers}"
                )
            for index, kind in enumerate(kinds):
                if kind not in allowed:
                    raise ValueError(f"ChorusTextConfig: {name}[{index}]={kind!r}; choose from {list(allowed)}")
        if "sliding_attention" in self.layer_types and self.sliding_window is None:
            raise ValueError("ChorusTextConfig: layer_types asks for sliding_attention but sliding_window is None")
        for layer in self.cross_modal_layers:
            if not 0 <= layer < self.num_hidden_layers:
                raise ValueError(
                    f"ChorusTextConfig: cross_modal_layers names layer {layer} of num_hidden_layers="
                    f"{self.num_hidden_layers}"
                )
        for bank in self.banks:
            bank.validate(self.sparse_layers)
        for layer in self.sparse_layers:
            if not self.banks_of_layer(layer):
                raise ValueError(f"ChorusTextConfig: sparse layer {layer} holds no expert bank")


@strict
class ChorusVisionConfig(PreTrainedConfig):
    r"""The vision tower: any timm architecture, or any Hugging Face vision model.

    Args:
        architecture: a timm model name, built with `pretrained=False`; weights come with the checkpoint.
        model_args: further arguments of `timm.create_model`.
        backbone_config: a Hugging Face vision configuration, instead of `architecture`.
        image_size: height and width of the images, in pixels.
        pool_size: the connector averages `pool_size x pool_size` neighbouring tokens into one.
        hidden_size, layout, num_prefix_tokens, grid_size, num_tokens: what the encoder yields. Probed and saved when
            None: its width, `NCHW`, `NHWC` or `NLC`, class and register tokens, (rows, columns) or None, and the tokens
            per image without prefix.
    """

    model_type = "chorus_vision"
    base_config_key = "vision_config"
    sub_configs_defaults = {
        "backbone_config": SubConfigSpec(config_class=AutoConfig, model_type="siglip_vision_model", optional=True)
    }

    architecture: str | None = "vit_tiny_patch16_224"
    model_args: dict | None = None
    backbone_config: dict | PreTrainedConfig | None = None
    image_size: int = 224
    num_channels: int = 3
    pool_size: int = 1
    hidden_size: int | None = None
    layout: str | None = None
    num_prefix_tokens: int | None = None
    grid_size: list[int] | None = None
    num_tokens: int | None = None
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        _refuse_unknown_keys(self, kwargs)
        _check_range(self, {"image_size": (1, 16_384), "num_channels": (1, 64), "pool_size": (1, 1_024)})
        if isinstance(self.backbone_config, dict):
            spec = self.sub_configs_defaults["backbone_config"]
            self.backbone_config, _ = spec.create_subconfig("encoder", self.backbone_config)
        if self.backbone_config is not None:
            self.architecture = None
        if self.hidden_size is None or self.num_tokens is None:
            probe = (
                probe_backbone(self.backbone_config, self.image_size, self.num_channels)
                if self.backbone_config is not None
                else probe_vision_encoder(self.architecture, self.model_args, self.image_size, self.num_channels)
            )
            self.hidden_size, self.layout = probe.hidden_size, probe.layout
            self.num_prefix_tokens, self.num_tokens = probe.num_prefix_tokens, probe.num_tokens
            self.grid_size = None if probe.grid_size is None else list(probe.grid_size)
        super().__post_init__(**kwargs)

    @property
    def num_image_tokens(self) -> int:
        """Placeholder tokens of one image, after the connector's pooling."""
        if self.grid_size is None:
            return ceil(self.num_tokens / self.pool_size**2)
        rows, columns = self.grid_size
        return ceil(rows / self.pool_size) * ceil(columns / self.pool_size)

    def validate_probe(self):
        """Part of `@strict` validation."""
        if self.layout not in ("NCHW", "NHWC", "NLC"):
            raise ValueError(f"ChorusVisionConfig: layout={self.layout!r}; choose from NCHW, NHWC, NLC")
        if self.grid_size is not None and self.grid_size[0] * self.grid_size[1] != self.num_tokens:
            raise ValueError(
                f"ChorusVisionConfig: grid_size={self.grid_size} does not hold num_tokens={self.num_tokens} tokens"
            )


@strict
class ChorusAudioConfig(PreTrainedConfig):
    r"""The audio tower: log-mel features into a Conformer (arXiv 2005.08100), or a Hugging Face audio encoder.

    Args:
        sampling_rate: samples per second that the features are computed at.
        hop_length: samples between two feature frames.
        max_seconds: length of one window; longer clips become several windows.
        subsampling: feature frames that the convolutional front end turns into one token (a power of two).
        pool_size: tokens that the connector turns into one.
        backbone_config: a Hugging Face audio configuration, instead of the Conformer.
    """

    model_type = "chorus_audio"
    base_config_key = "audio_config"
    sub_configs_defaults = {
        "backbone_config": SubConfigSpec(config_class=AutoConfig, model_type="whisper", optional=True)
    }

    sampling_rate: int = 16_000
    num_mel_bins: int = 80
    n_fft: int = 400
    hop_length: int = 160
    max_seconds: float = 30.0
    hidden_size: int = 256
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    intermediate_size: int = 1_024
    conv_kernel_size: int = 31
    hidden_act: str = "silu"
    dropout: float = 0.0
    subsampling: int = 4
    pool_size: int = 1
    backbone_config: dict | PreTrainedConfig | None = None
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        _refuse_unknown_keys(self, kwargs)
        if isinstance(self.backbone_config, dict):
            spec = self.sub_configs_defaults["backbone_config"]
            self.backbone_config, _ = spec.create_subconfig("encoder", self.backbone_config)
        super().__post_init__(**kwargs)

    @property
    def frames_per_token(self) -> int:
        """Feature frames behind one placeholder token."""
        return self.subsampling * self.pool_size

    def num_audio_tokens(self, num_frames: int) -> int:
        """Placeholder tokens of a window of `num_frames` feature frames."""
        return ceil(num_frames / self.frames_per_token)

    def validate_sizes(self):
        """Part of `@strict` validation."""
        _check_range(
            self,
            {
                "sampling_rate": (1_000, 768_000),
                "num_mel_bins": (1, 1_024),
                "n_fft": (2, 65_536),
                "hop_length": (1, 65_536),
                "hidden_size": (1, MAX_WIDTH),
                "num_hidden_layers": (1, MAX_LAYERS),
                "num_attention_heads": (1, MAX_WIDTH),
                "intermediate_size": (1, MAX_WIDTH),
                "conv_kernel_size": (1, 4_095),
                "subsampling": (1, 64),
                "pool_size": (1, 1_024),
            },
        )
        _check_divides(self, "hidden_size", "num_attention_heads")
        if self.subsampling & (self.subsampling - 1):
            raise ValueError(f"ChorusAudioConfig: subsampling={self.subsampling} must be a power of two")
        if self.conv_kernel_size % 2 == 0:
            raise ValueError(f"ChorusAudioConfig: conv_kernel_size={self.conv_kernel_size} must be odd")
        if self.max_seconds <= 0:
            raise ValueError(f"ChorusAudioConfig: max_seconds={self.max_seconds} must be positive")


@strict
class ChorusConfig(PreTrainedConfig):
    r"""A whole model. Leave `vision_config` or `audio_config` out for a model without that modality.

    Args:
        image_token_id, audio_token_id: the placeholder of one image or audio token in `input_ids`.
        projection_dim: width of the embeddings of [`ChorusForContrastive`].

    Raises:
        ValueError: token ids outside the vocabulary or equal, or a key that does not exist.
    """

    model_type = "chorus"
    sub_configs_defaults = {
        "text_config": ChorusTextConfig,
        "vision_config": SubConfigSpec(config_class=ChorusVisionConfig, optional=True),
        "audio_config": SubConfigSpec(config_class=ChorusAudioConfig, optional=True),
    }
    keys_to_ignore_at_inference = [
        "past_key_values",
        "router_logits",
        "aux_loss",
        "z_loss",
        "alignment_loss",
        "image_hidden_states",
        "audio_hidden_states",
    ]

    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    audio_config: dict | PreTrainedConfig | None = None
    image_token_id: int | None = None
    audio_token_id: int | None = None
    projection_dim: int = 256
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        _refuse_unknown_keys(self, kwargs)
        super().__post_init__(**kwargs)

    @property
    def modalities(self) -> list[str]:
        """The modalities that this model takes, `text` first."""
        towers = {"image": self.vision_config, "audio": self.audio_config}
        return ["text"] + [name for name, tower in towers.items() if tower is not None]

    def parameter_report(self) -> ParameterReport:
        """Total and active parameters by bank, tower and modality, counted on the meta device."""
        return report_parameters(self)

    def validate_placeholders(self):
        """Part of `@strict` validation: each tower has a placeholder token of its own within the vocabulary."""
        vocab_size = self.text_config.vocab_size
        ids = {"image_token_id": self.vision_config, "audio_token_id": self.audio_config}
        for name, tower in ids.items():
            value = getattr(self, name)
            if tower is not None and value is None:
                raise ValueError(f"ChorusConfig: {name} is None but the model has a {name[:5]} tower")
            if value is not None and not 0 <= value < vocab_size:
                raise ValueError(f"ChorusConfig: {name}={value} is outside the vocabulary of {vocab_size} tokens")
        if self.image_token_id is not None and self.image_token_id == self.audio_token_id:
            raise ValueError(f"ChorusConfig: image_token_id and audio_token_id are both {self.image_token_id}")
        if not 1 <= self.projection_dim <= MAX_WIDTH:
            raise ValueError(f"ChorusConfig: projection_dim={self.projection_dim} is outside 1..{MAX_WIDTH}")
