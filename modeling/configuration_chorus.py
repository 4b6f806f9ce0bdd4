"""The configuration of a whole model; every error names the field and both numbers."""

from typing import TYPE_CHECKING, Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .configuration_banks import check_name
from .configuration_checks import refuse_unknown_keys
from .configuration_modalities import ENCODED, TEXT
from .configuration_services import SERVICES, service
from .configuration_text import ChorusTextConfig
from .configuration_towers import ChorusAudioConfig, ChorusVisionConfig


@strict
class ChorusConfig(PreTrainedConfig):
    r"""A whole model. Leave `vision_config` or `audio_config` out for a model without that modality.

    Args:
        text_config: if it is a dictionary without `modalities`, the decoder takes text and what has an encoder. One
            that was saved before the field existed takes all three, and so does a ready [`ChorusTextConfig`] that
            does not say otherwise.
        image_token_id, audio_token_id: the placeholder of one image or audio token in `input_ids`.
        exit_thresholds: one for each of `text_config.exit_layers`, shallow first: a classifier lets a sample leave
            there if its confidence, between 0 and 1, is above. If None all samples run through all layers, bit for bit
            as in a model without exits. `calibrate_exits` finds them.
        projection_dim: width of the embeddings of [`ChorusForContrastive`].
        contrastive_loss: its loss, "infonce" (CLIP) or "sigmoid" (SigLIP).

    Raises:
        ValueError: token ids outside the vocabulary or equal, an encoder whose modality the decoder does not take, an
            unknown key.
    """

    model_type = "chorus"
    # TRL reads it of every model whose class is not in transformers. Of the class, it is not saved.
    auto_map: ClassVar[dict[str, str]] = {}
    sub_configs_defaults = {
        "text_config": ChorusTextConfig,
        "vision_config": SubConfigSpec(config_class=ChorusVisionConfig, optional=True),
        "audio_config": SubConfigSpec(config_class=ChorusAudioConfig, optional=True),
    }
    # What is not named here the Trainer gathers from every evaluation batch, and holds for the whole data set.
    keys_to_ignore_at_inference = [
        "past_key_values", "cache", "routing", "aux_loss", "z_loss", "alignment_loss", "skip_loss",
        "expert_budget_loss", "exit_loss", "exit_logits", "skip_logits", "left_after", "compute",
        "image_hidden_states", "audio_hidden_states", "logits_per_pair",
    ]  # fmt: skip

    if TYPE_CHECKING:  # what they are after validation; before, a dictionary or None is taken too
        text_config: ChorusTextConfig
        vision_config: ChorusVisionConfig | None
        audio_config: ChorusAudioConfig | None
    else:
        text_config: dict | PreTrainedConfig | None = None
        vision_config: dict | PreTrainedConfig | None = None
        audio_config: dict | PreTrainedConfig | None = None
    image_token_id: int | None = None
    audio_token_id: int | None = None
    projection_dim: int = 256
    contrastive_loss: str = "infonce"
    exit_thresholds: list[int | float] | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        # First: transformers would store a misspelt key as an attribute, in silence.
        refuse_unknown_keys(self, kwargs)
        text: Any = {} if self.text_config is None else self.text_config
        # What is saved has a version of transformers, what is written by hand has none. Saved without modalities it is
        # from before the field existed, and its tensors are those of all modalities.
        by_hand = self.transformers_version is None
        if isinstance(text, dict) and text.get("modalities") is None and by_hand:
            self.text_config = {**text, "modalities": self.modalities}  # type: ignore[assignment]  # not validated yet
        super().__post_init__(**kwargs)
        if self.vision_config is not None and self.vision_config.num_tokens is None:
            service("probe_vision", "a vision_config without hidden_size and num_tokens")
        # transformers reads the field of the whole model only. A saved one has the tables that it was saved with.
        self.tie_word_embeddings |= by_hand and self.text_config.tie_word_embeddings
        # An Auto class of several models looks for its own among these names, and fails on None.
        self.architectures: list[str] = getattr(self, "architectures", None) or []

    def __repr__(self) -> str:
        return SERVICES.get("describe_config", PreTrainedConfig.__repr__)(self)

    @property
    def modalities(self) -> list[str]:
        """The modalities that this model takes, `text` first."""
        return [TEXT.name] + [row.name for row in ENCODED if getattr(self, row.config) is not None]

    def validate_modalities(self) -> None:
        """Part of `@strict` validation: the decoder takes what the encoders make."""
        for name in self.modalities:
            if name not in self.text_config.modalities:
                raise ValueError(
                    f"ChorusConfig: the model has an encoder for {name!r} but the modalities of its text_config are "
                    f"{self.text_config.modalities}"
                )

    def validate_placeholders(self) -> None:
        """Part of `@strict` validation: each tower has a placeholder token of its own within the vocabulary."""
        vocab_size = self.text_config.vocab_size
        owners: dict[int, str] = {}
        for row in ENCODED:
            name, value = row.token_id, getattr(self, row.token_id)
            if value is None and row.name in self.modalities:
                raise ValueError(f"ChorusConfig: {name} is None but the model has a tower for {row.name}")
            if value is not None and not 0 <= value < vocab_size:
                raise ValueError(f"ChorusConfig: {name}={value} is outside the vocabulary of {vocab_size} tokens")
            # Two modalities with one placeholder could not be told apart in `input_ids`.
            if value is not None and owners.setdefault(value, name) != name:
                raise ValueError(f"ChorusConfig: {owners[value]} and {name} are both {value}")
        check_name("ChorusConfig", "contrastive_loss", self.contrastive_loss, ("infonce", "sigmoid"))

    def validate_exit_thresholds(self) -> None:
        """Part of `@strict` validation: one threshold an exit."""
        if self.exit_thresholds is None:
            return
        exits = self.text_config.exit_layers or []
        if len(self.exit_thresholds) != len(exits):
            raise ValueError(f"ChorusConfig: {len(self.exit_thresholds)} exit_thresholds for exit_layers {exits}")
