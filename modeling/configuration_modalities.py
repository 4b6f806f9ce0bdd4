"""The modalities, one row each: what the model calls their parts. A new modality begins here.

All tables of the model, of surgery and of training that are keyed by modality are made from these rows.
"""

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Modality:
    """One modality.

    Args:
        name: `text`, `image`, ...; banks, projections and outputs carry it.
        type_id: its value in `mm_token_type_ids`.
    """

    name: str
    type_id: int


@dataclass(frozen=True, kw_only=True)
class EncodedModality(Modality):
    """A modality whose tokens an encoder makes.

    Args:
        config: field of [`ChorusConfig`] with the configuration of the encoder.
        token_id: field of [`ChorusConfig`] with the placeholder.
        tower, connector: attributes of [`ChorusModel`].
    """

    config: str
    token_id: str
    tower: str
    connector: str


# What processors call modalities stands in `processing_media`: that folder imports nothing from this one.
TEXT = Modality(name="text", type_id=0)
# In this order encoders run, on every rank: ranks that gather shards in different orders deadlock. The values are those
# of transformers (0 text, 1 image, 2 video, 3 audio), whose processors and `generate` write `mm_token_type_ids`.
ENCODED = (
    EncodedModality(name="image", type_id=1, config="vision_config", token_id="image_token_id",
                    tower="vision_tower", connector="vision_connector"),
    EncodedModality(name="audio", type_id=3, config="audio_config", token_id="audio_token_id",
                    tower="audio_tower", connector="audio_connector"),
)  # fmt: skip
MODALITIES = {row.name: row for row in (TEXT, *ENCODED)}
ENCODED_MODALITIES = {row.name: row for row in ENCODED}
# Modality -> its value in `mm_token_type_ids`.
MODALITY_IDS: dict[str, int] = {name: row.type_id for name, row in MODALITIES.items()}
# What a configuration takes that does not name its modalities, as none could once. New rows do not enter here.
UNNAMED = ("text", "image", "audio")


def in_order(names: Collection[str]) -> list[str]:
    """Modalities in the order of the table, which is that of parameters."""
    return [name for name in MODALITY_IDS if name in names]
