"""The processor that a configuration asks for."""

from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from chorus_moe.processors.feature_extraction_chorus import ChorusFeatureExtractor
from chorus_moe.processors.image_processing_chorus import ChorusImageProcessor
from chorus_moe.processors.processing_chorus import ChorusProcessor
from chorus_moe.processors.processing_media import MEDIA
from chorus_moe.surgery.tokenizer import add_media_tokens


def processor_from_config(
    config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, **overrides: Any
) -> ChorusProcessor:
    """The processor that fits a `ChorusConfig`.

    Adds missing media tokens to `tokenizer` (then the model's embeddings must be resized before training) and sets
    its padding side to the left, as generation needs it.

    Args:
        config: a ChorusConfig, or anything with its `vision_config` and `audio_config`; either may be None.
        overrides: settings of the processor or of a part, by name, for example `image_mean`, `max_audio_seconds` or
            `image_token`.

    Raises:
        TypeError: an override that no part knows.
        ValueError: the tokenizer's media token ids are not those of the config.
    """
    vision, audio = getattr(config, "vision_config", None), getattr(config, "audio_config", None)
    image_settings: dict[str, Any] = {}
    audio_settings: dict[str, Any] = {}
    own: dict[str, Any] = {"num_image_tokens": None, "frames_per_token": None, "audio_convolutions": None}
    if vision is not None:
        image_settings = {
            "size": {"height": vision.image_size, "width": vision.image_size},
            "num_channels": vision.num_channels,
        }
        own["num_image_tokens"] = vision.num_image_tokens
    if audio is not None:
        # What the audio tower was built for; the processor must not choose anything else.
        names = {"feature_type", "do_normalize", "sampling_rate", "n_fft", "hop_length", "max_seconds"}
        audio_settings = {name: getattr(audio, name) for name in names} | {"feature_size": audio.num_mel_bins}
        own |= {"frames_per_token": audio.frames_per_token, "audio_convolutions": audio.convolutions}
    audio_names = set(ChorusFeatureExtractor().to_dict())
    for name, value in overrides.items():
        if name in own or name in {"chat_template", "image_token", "audio_token"}:
            own[name] = value
        elif name in ChorusImageProcessor.valid_kwargs.__annotations__:
            image_settings[name] = value
        elif name in audio_names:
            audio_settings[name] = value
        else:
            raise TypeError(f"processor_from_config got {name}={value!r}, which no part of the processor knows")
    image_token, audio_token = (own.get(f"{name}_token", row.token) for name, row in MEDIA.items())
    add_media_tokens(tokenizer, image_token, audio_token)
    for token, expected in ((image_token, config.image_token_id), (audio_token, config.audio_token_id)):
        found = tokenizer.convert_tokens_to_ids(token)
        # The model looks for placeholders by id: another id would leave features without a place.
        if expected is not None and found != expected:
            raise ValueError(f"the tokenizer gives {token} the id {found}, the config expects {expected}")
    # Generation goes on at the right end of each row.
    tokenizer.padding_side = "left"
    return ChorusProcessor(
        ChorusImageProcessor(**image_settings), ChorusFeatureExtractor(**audio_settings), tokenizer, **own
    )
