"""The configuration of a whole model.

Unusual here:
- a misspelt key is an error (transformers stores it in silence);
- sizes are checked before anything is allocated, and every error names both numbers.
"""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .configuration_checks import MAX_WIDTH, refuse_unknown_keys
from .configuration_text import ChorusTextConfig
from .configuration_towers import ChorusAudioConfig, ChorusVisionConfig


@strict
class ChorusConfig(PreTrainedConfig):
    r"""A whole model. Leave `vision_config` or `audio_config` out for a model without that modality.

    Args:
        image_token_id, audio_token_id: the placeholder of one image or audio token in `input_ids`.
        exit_thresholds: one for each of `text_config.exit_layers`, shallow first: a classifier lets a sample leave
            there if its confidence, between 0 and 1, is above. If None all samples run through all layers, bit for bit
            as in a model without exits. `calibrate_exits` finds them.
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
        "skip_loss",
        "exit_loss",
        "exit_logits",
        "skip_logits",
        "left_after",
        "compute",
        "image_hidden_states",
        "audio_hidden_states",
    ]

    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    audio_config: dict | PreTrainedConfig | None = None
    image_token_id: int | None = None
    audio_token_id: int | None = None
    projection_dim: int = 256
    exit_thresholds: list[float] | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        refuse_unknown_keys(self, kwargs)
        super().__post_init__(**kwargs)
        # An Auto class of several models looks for its own among these names, and fails on None.
        self.architectures: list[str] = getattr(self, "architectures", None) or []

    @property
    def modalities(self) -> list[str]:
        """The modalities that this model takes, `text` first."""
        towers = {"image": self.vision_config, "audio": self.audio_config}
        return ["text"] + [name for name, tower in towers.items() if tower is not None]

    def validate_placeholders(self) -> None:
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

    def validate_exit_thresholds(self) -> None:
        """Part of `@strict` validation: one threshold an exit, each a probability."""
        if self.exit_thresholds is None:
            return
        exits = self.text_config.exit_layers or []
        if len(self.exit_thresholds) != len(exits):
            raise ValueError(
                f"ChorusConfig: {len(self.exit_thresholds)} exit_thresholds for {len(exits)} exit_layers {exits}"
            )
        for layers, threshold in zip(sorted(exits), self.exit_thresholds, strict=True):
            if not 0 <= threshold <= 1:
                raise ValueError(f"ChorusConfig: exit_thresholds: {threshold} after {layers} layers is outside 0..1")
