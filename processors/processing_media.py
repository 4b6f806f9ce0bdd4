"""What processors, data sets and collators call the media, one row each. A new medium begins here.

Unusual here: the model's facts of a modality stand in `modeling/configuration_modalities.py`, under the same names; the
two folders ship without each other.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Medium:
    """One medium.

    Args:
        token: its placeholder in text, unless a processor is given another as `{name}_token`.
        plural: what errors call several of them.
        limit: field of `MediaLimits` with how many a sample may have.
        column: column of a data set, and argument of the processor, with the items of a sample.
        keys: keys of a message's part that may hold one.
        inputs: tensors of a batch that bring it to the model, the medium itself first.
        settings: names in the processor's configuration on which those depend.
    """

    token: str
    plural: str
    limit: str
    column: str
    keys: tuple[str, ...]
    inputs: tuple[str, ...]
    settings: tuple[str, ...]


MEDIA = {
    "image": Medium(
        token="<image>",
        plural="images",
        limit="images_per_sample",
        column="images",
        keys=("image", "url", "path", "base64", "bytes"),
        inputs=("pixel_values",),
        settings=("num_image_tokens", "image_processor"),
    ),
    "audio": Medium(
        token="<audio>",
        plural="clips",
        limit="clips_per_sample",
        column="audio",
        keys=("audio", "url", "path", "base64", "bytes", "array"),
        inputs=("input_features", "input_features_mask"),
        settings=("frames_per_token", "audio_convolutions", "feature_extractor"),
    ),
}
