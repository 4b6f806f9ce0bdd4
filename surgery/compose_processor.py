"""The processor of a composed model: image settings and tokenizer of its parents.

Unusual here:
- the settings of the parent's image processor are read, whatever its class, and given to our image processor;
- the text parent's chat template is kept: as it is if it writes images and sound in their place and marks the
  assistant's words, which training needs, else extended by both (`compose_template`).
"""

import math
import os
import re
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from transformers import AutoImageProcessor, PreTrainedConfig, PreTrainedTokenizerBase

from chorus_moe.modeling.configuration_chorus import ChorusConfig
from chorus_moe.processors.processing_chorus import ChorusProcessor
from chorus_moe.processors.processing_media import MEDIA
from chorus_moe.surgery.compose_template import extended_template
from chorus_moe.surgery.parent_checkpoint import ParentCheckpoint
from chorus_moe.surgery.processor import processor_from_config
from chorus_moe.surgery.template_limits import limited_template

TIMM_PREFIXES = ("hf-hub:", "hf_hub:", "local-dir:")
# Settings that our image processor has under the same name and with the same meaning.
IMAGE_SETTINGS = (
    "do_resize",
    "resample",
    "do_center_crop",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
    "do_pad_to_square",
)
# timm's names -> the numbers of PIL, which transformers uses.
INTERPOLATIONS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}
# Text between two media: shows whether a chat template keeps media and words in order.
PROBE_WORD = "between"


def parent_image_settings(source: str | os.PathLike[str], image_size: int, **loading: Any) -> dict[str, Any]:
    """Settings of `ChorusImageProcessor` that prepare images as the vision parent's own does.

    Args:
        source: as in `vision_parent`: a folder or Hub id, or the name of a timm model.
        image_size: pixels that the vision tower takes.
        loading: `revision`, `token`, `cache_dir`, `local_files_only`.

    Raises:
        OSError: the parent has no image processor, as transformers says it.
        ValueError: images that would come out in another size, or a way of cropping that is not known here.
    """
    text = os.fspath(source)
    for prefix in TIMM_PREFIXES:
        text = text.removeprefix(prefix)
    pretrained = _timm_settings(text, loading)
    settings = _of_timm(text, pretrained) if pretrained is not None else _of_transformers(text, loading)
    # The crop comes last, so it decides the size of the image.
    shape = settings["crop_size"] if settings.get("do_center_crop") else settings["size"]
    found = (shape.get("height"), shape.get("width"))
    if found != (image_size, image_size):
        raise ValueError(
            f"{text}: its image processor makes images of {found[0]} x {found[1]} pixels, the vision tower takes "
            f"{image_size} x {image_size}"
        )
    return settings


def _timm_settings(source: str, loading: dict[str, Any]) -> dict[str, Any] | None:
    """timm's `pretrained_cfg`; None for a model that is not timm's."""
    # Only a bare name asks for timm, which is optional; a folder or a Hub id says in its configuration whose it is.
    if not os.path.isdir(source) and "/" not in source:
        import timm

        if timm.is_model(source):
            return timm.get_pretrained_cfg(source).to_dict()
    values, _ = PreTrainedConfig.get_config_dict(source, **loading)
    # Only timm's configurations have "architecture"; old ones hold the settings at the top level.
    return values.get("pretrained_cfg") or values if "architecture" in values else None


def _of_timm(source: str, pretrained: dict[str, Any]) -> dict[str, Any]:
    """As timm's evaluation transform: resize by the crop's share, crop the centre. An odd margin is halved downwards as
    in transformers, where timm rounds: the crop may lie one pixel higher or further left."""
    from timm.data import resolve_data_config

    # timm's own rules fill in what the configuration leaves out.
    data = resolve_data_config({}, pretrained_cfg=pretrained)
    pixels = data["input_size"][-1]
    # Rounded down, as in timm's evaluation transform.
    scaled = math.floor(pixels / data["crop_pct"])
    sizes = {"center": {"shortest_edge": scaled}, "squash": {"height": scaled, "width": scaled}}
    if data["crop_mode"] not in sizes or data["interpolation"] not in INTERPOLATIONS:
        raise ValueError(
            f"{source}: crop_mode={data['crop_mode']!r}, interpolation={data['interpolation']!r}; known are "
            f"{', '.join(sizes)} and {', '.join(INTERPOLATIONS)}"
        )
    return {
        "size": sizes[data["crop_mode"]],
        "resample": INTERPOLATIONS[data["interpolation"]],
        "do_center_crop": True,
        "crop_size": {"height": pixels, "width": pixels},
        "image_mean": list(data["mean"]),
        "image_std": list(data["std"]),
    }


def _of_transformers(source: str, loading: dict[str, Any]) -> dict[str, Any]:
    processor: Any = AutoImageProcessor.from_pretrained(source, **loading)
    found = {name: getattr(processor, name, None) for name in IMAGE_SETTINGS}
    settings = {name: value for name, value in found.items() if value is not None}
    for name in ("size", "crop_size"):
        if getattr(processor, name, None) is not None:
            # transformers' size dictionaries list every possible key, most of them None.
            settings[name] = {key: value for key, value in dict(getattr(processor, name)).items() if value is not None}
    return settings


def parent_tokenizer(checkpoint: ParentCheckpoint) -> PreTrainedTokenizerBase:
    """The text parent's tokenizer.

    Raises:
        ValueError: no tokenizer, or one without an end of text, which ends the turns of a conversation.
    """
    try:
        tokenizer = checkpoint.tokenizer
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{checkpoint.source}: no tokenizer can be read beside the text model: {error!s:.200}"
        ) from error
    if tokenizer.eos_token is None:
        raise ValueError(f"{checkpoint.source}: the tokenizer has no eos token; set one and save it again")
    return tokenizer


def carries_media(tokenizer: PreTrainedTokenizerBase, image_token: str, audio_token: str) -> bool:
    """Whether the tokenizer's chat template writes every image and clip of a message as its token, in order, takes
    plain strings as well, and marks the assistant's words with `{% generation %}`."""
    # Several named templates are a dictionary; none of them is known to be the one for media.
    template = tokenizer.chat_template
    if not isinstance(template, str) or not re.search(r"\{%-?\s*generation\s*-?%\}", template):
        return False
    # Image, text, sound, then a plain string: many templates drop media, move them to the front or refuse strings.
    content = [{"type": "image"}, {"type": "text", "text": PROBE_WORD}, {"type": "audio"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": PROBE_WORD}]
    try:
        with limited_template(template):
            text = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception:  # noqa: BLE001  a template is other people's program: whatever it raises, it does not carry media
        return False
    parts = (re.escape(part) for part in (image_token, PROBE_WORD, audio_token, PROBE_WORD))
    once = text.count(image_token) == text.count(audio_token) == 1
    return once and re.search(".*".join(parts), text, flags=re.DOTALL) is not None


def compose_processor(
    config: ChorusConfig | SimpleNamespace,
    tokenizer: PreTrainedTokenizerBase,
    vision: str | os.PathLike[str] | None = None,
    *,
    vision_loading: Mapping[str, Any] | None = None,
    notes: list[str] | None = None,
    **overrides: Any,
) -> ChorusProcessor:
    """The processor of a composed model.

    The tokenizer is the text parent's with the media tokens added, images are prepared as the vision parent's own
    image processor does; what the audio parent wants is in `config.audio_config`. The text parent's chat template is
    kept if it can hold images and sound (`carries_media`) or can be extended so that it does, otherwise it is ours.

    Args:
        config: the composed model's, or anything with its `vision_config`, `audio_config` and media token ids.
        tokenizer: the text parent's, see [`parent_tokenizer`].
        vision: folder, Hub id or the name of a timm model; None for a new vision tower.
        vision_loading: `revision`, `token`, `cache_dir`, `local_files_only` of the vision parent.
        notes: of a report; gets a line that says what became of the chat template.
        overrides: as in [`processor_from_config`].

    Raises:
        OSError: a vision parent without an image processor, as transformers says it.
        ValueError: parts that do not fit the config.
    """
    settings: dict[str, Any] = {}
    if vision is not None and config.vision_config is not None:
        settings = parent_image_settings(vision, config.vision_config.image_size, **vision_loading or {})
    tokens = {f"{name}_token": overrides.get(f"{name}_token", row.token) for name, row in MEDIA.items()}
    if "chat_template" in overrides:
        note = "chat template: as given"
    elif carries_media(tokenizer, **tokens):
        settings["chat_template"], note = tokenizer.chat_template, "chat template: the text parent's"
    else:
        media = {name: tokens[f"{name}_token"] for name in MEDIA}
        settings["chat_template"], note = extended_template(tokenizer, media)
    if notes is not None and note not in notes:
        notes.append(note)
    processor = processor_from_config(config, tokenizer, **settings | overrides)
    # Saved beside each other, the two must not disagree: whoever loads the tokenizer alone gets the same chats.
    tokenizer.chat_template = processor.chat_template
    return processor
