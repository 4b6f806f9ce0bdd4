"""Which image and which clip belongs to which sample, checked against the placeholders before any tensor work."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from .processing_limits import MediaError, MediaLimits, MediaPlace
from .processing_media import MEDIA


def is_media_item(item: object) -> bool:
    """Whether `item` is one image or clip, not a list of them. A list of numbers is a clip."""
    if isinstance(item, (list, tuple)):
        return len(item) > 0 and isinstance(item[0], (int, float, np.number))
    if isinstance(item, (str, bytes, bytearray, Path, dict, np.ndarray, torch.Tensor)):
        return True
    # A PIL image, without importing PIL; or torchcodec's `AudioDecoder`.
    return (hasattr(item, "mode") and hasattr(item, "size")) or hasattr(item, "get_all_samples")


def as_item_list(media: object, modality: str) -> list[Any]:
    """A top-level list out of one item, a batch array of images (N, H, W, C), or a list."""
    if media is None:
        return []
    # A batch of images. Sound has no such form: an array with two axes is one clip with channels.
    if modality == "image" and isinstance(media, (np.ndarray, torch.Tensor)) and media.ndim == 4:
        return list(media)
    if is_media_item(media):
        return [media]
    if not isinstance(media, (list, tuple)):
        wanted = f"{MEDIA[modality].plural} must be one item, a list, or a list per sample"
        raise MediaPlace(modality).error(f"{wanted}, found {type(media).__name__}")
    return list(media)


def flatten_media(media: object, modality: str) -> list[Any]:
    """All items of a flat or nested list, in order."""
    return [item for entry in as_item_list(media, modality) for item in as_item_list(entry, modality)]


def nest_media(media: object, texts: list[str], token: str, modality: str, limits: MediaLimits) -> list[list[Any]]:
    """One list of items per sample, as many as the sample's text has placeholders.

    Args:
        media: one item, a flat list (dealt out by the placeholders, in order), or a list per sample, empty or None for
            none.

    Raises:
        MediaError: counts that do not match or exceed the limit; names the sample, both numbers and the likely reason.
    """
    plural = MEDIA[modality].plural
    found = [text.count(token) for text in texts]
    entries = as_item_list(media, modality)
    # A flat list, dealt out by the placeholders.
    if entries and all(is_media_item(entry) for entry in entries):
        nested = _deal_out(entries, found, token, modality)
    elif entries and len(entries) != len(texts):
        raise MediaError(
            f"found {len(entries)} lists of {plural} for {len(texts)} texts; the number of {token} tokens in the "
            f"prompts should be the same as the number of {plural} passed, sample by sample",
            sample=min(len(entries), len(texts)),
            modality=modality,
        )
    else:
        nested = [as_item_list(entry, modality) for entry in entries] or [[] for _ in texts]
    maximum = getattr(limits, MEDIA[modality].limit)
    for sample, (placeholders, items) in enumerate(zip(found, nested, strict=True)):
        if len(items) > maximum:
            raise MediaPlace(modality, sample=sample).error(f"{len(items)} {plural}, the limit is {maximum}")
        if placeholders != len(items):
            raise _mismatch(sample, placeholders, len(items), token, modality)
    return nested


def _deal_out(items: list[Any], found: list[int], token: str, modality: str) -> list[list[Any]]:
    """A flat list cut by the number of placeholders of each sample."""
    nested, start = [], 0
    for sample, placeholders in enumerate(found):
        # The last sample gets the rest, so surplus items are an error there and are not dropped.
        share = items[start:] if sample == len(found) - 1 else items[start : start + placeholders]
        if len(share) != placeholders:
            raise _mismatch(sample, placeholders, len(share), token, modality)
        nested.append(share)
        start += placeholders
    return nested


def _mismatch(sample: int, found: int, expected: int, token: str, modality: str) -> MediaError:
    plural = MEDIA[modality].plural
    reason = f"write {token} once per item, or drop the surplus {plural}"
    if found > expected:
        cure = "build the prompt with apply_chat_template, which keeps typed placeholders as text"
        reason = f"an item is missing, or a person typed {token}: {cure}"
    return MediaPlace(modality, sample=sample).error(
        f"found {found} {modality} placeholder{'s' * (found != 1)} for {expected} {plural}; {reason} (the number of "
        f"{token} tokens in the prompts should be the same as the number of {plural} passed)"
    )
