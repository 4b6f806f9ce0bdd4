"""Whether training data hold what the terms of a loss need."""

from collections.abc import Iterable, Mapping
from typing import Any

from chorus_moe.training.data import MEDIA_KINDS, FeatureRows
from chorus_moe.training.objectives.arguments import ObjectiveArguments


def check_served(arguments: ObjectiveArguments, rows: Iterable[Mapping[str, Any]], where: str) -> None:
    """Refuse a term that no row can serve; the rows are read as far as needed.

    Args:
        where: what an error calls the rows.

    Raises:
        ValueError: naming the term and what no row has.
    """
    # The contrast of cached features is that of the media themselves.
    alone = not isinstance(rows, FeatureRows) and arguments.contrast_weight > 0 and not any(map(media_of, rows))
    if alone:
        raise ValueError(
            f"objectives.contrast_weight={arguments.contrast_weight}: none of {where} has an image or sound, which a "
            "text could belong to"
        )
    missing = {"image": arguments.masked_image_weight, "audio": arguments.masked_audio_weight}
    missing = {medium: weight for medium, weight in missing.items() if weight > 0}
    if not missing:
        return
    if isinstance(rows, FeatureRows):
        medium, weight = next(iter(missing.items()))
        # The tower does not run, and its features are what is predicted.
        raise ValueError(
            f"objectives.masked_{medium}_weight={weight}: {where} are cached features; take rows with media"
        )
    for row in rows:
        for medium in media_of(row):
            missing.pop(medium, None)
        if not missing:
            return
    medium, weight = next(iter(missing.items()))
    raise ValueError(f"objectives.masked_{medium}_weight={weight}: none of {where} has {medium} to learn from")


def media_of(row: Mapping[str, Any]) -> set[str]:
    """The media of a row, in its columns or in the parts of its turns."""
    found = {medium for column, medium in MEDIA_KINDS.items() if row.get(column)}
    for turn in row["messages"]:
        content = turn.get("content") if isinstance(turn, Mapping) else None
        for part in content if isinstance(content, list) else []:
            kind = part.get("type") if isinstance(part, Mapping) else None
            found |= {medium for medium in MEDIA_KINDS.values() if kind in (medium, f"{medium}_url", f"input_{medium}")}
    return found
