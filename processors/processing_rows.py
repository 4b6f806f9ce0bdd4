"""Rows of token ids: truncation that keeps media whole, padding, and labels.

A row set is a dict of equally long lists per sample, as tokenizers return it: `{"input_ids": [[...], ...], ...}`.
"""

from collections.abc import Sequence
from typing import Any

from .processing_limits import MediaPlace

IGNORED_LABEL = -100
PAD_VALUES: dict[str, Any] = {"special_tokens_mask": 1, "offset_mapping": (0, 0)}


def truncate_rows(rows: dict[str, list], max_length: int, media_ids: set[int], side: str) -> dict[str, list]:
    """Rows of at most `max_length` tokens: text tokens are dropped from `side`, media tokens never.

    Raises:
        MediaError: a sample whose media alone are longer than `max_length`.
    """
    kept = []
    for sample, ids in enumerate(rows["input_ids"]):
        num_media = sum(token in media_ids for token in ids)
        if num_media > max_length:
            raise MediaPlace(sample=sample).error(
                f"images and clips alone take {num_media} tokens, max_length is {max_length}; media are never cut: "
                "raise max_length or drop the sample"
            )
        kept.append(_kept_positions(ids, max_length - num_media, media_ids, side))
    return {
        # Every list of the row is cut at the same positions: masks and offsets belong to tokens.
        name: [[row[position] for position in keep] for row, keep in zip(values, kept, strict=True)]
        for name, values in rows.items()
    }


def _kept_positions(ids: list[int], text_budget: int, media_ids: set[int], side: str) -> list[int]:
    text = [position for position, token in enumerate(ids) if token not in media_ids]
    surplus = max(len(text) - text_budget, 0)
    dropped = set(text[:surplus] if side == "left" else text[len(text) - surplus :])
    return [position for position in range(len(ids)) if position not in dropped]


def pad_rows(
    rows: dict[str, list], side: str, pad_token_id: int | None, length: int | None = None, multiple: int | None = None
) -> dict[str, list]:
    """Rows of one length: the longest row or `length`, rounded up to `multiple`.

    Raises:
        ValueError: padding is needed and the tokenizer has no pad token.
    """
    lengths = [len(ids) for ids in rows["input_ids"]]
    target = max([*lengths, length or 0])
    if multiple:
        target = -(-target // multiple) * multiple
    if pad_token_id is None and min(lengths) < target:
        raise ValueError("rows of different length need padding, but the tokenizer has no pad token")
    padded = {}
    for name, values in rows.items():
        # Masks and type ids are 0 on padding.
        filler = pad_token_id if name == "input_ids" else PAD_VALUES.get(name, 0)
        fill = [[filler] * (target - len(row)) for row in values]
        padded[name] = [extra + row if side == "left" else row + extra for row, extra in zip(values, fill, strict=True)]
    return padded


def label_rows(
    input_ids: Sequence[Sequence[int]], assistant_masks: Sequence[Sequence[int]], never: set[int]
) -> list[list[int]]:
    """`input_ids` where the mask is 1 and the token is none of `never` (media, padding), else -100."""
    return [
        [token if spoken and token not in never else IGNORED_LABEL for token, spoken in zip(ids, mask, strict=True)]
        for ids, mask in zip(input_ids, assistant_masks, strict=True)
    ]
