"""Rows of pairs to a batch of `ChorusForContrastive`."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from chorus_moe.processors.processing_limits import MediaError
from chorus_moe.processors.processing_media import MEDIA
from chorus_moe.training.collator import ChorusDataCollator
from chorus_moe.training.contrast.pairs import pair_of
from chorus_moe.training.layouts import LayoutError


class PairCollator(ChorusDataCollator):
    """Makes the batches of a Trainer whose `remove_unused_columns` is False: row i of every tensor belongs together.

    Rows are those of [`PairDataset`], or such as `pair_of` reads. Arguments and errors are those of
    [`ChorusDataCollator`]; a clip longer than the model's window is a bad sample.
    """

    def _encode(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        pairs = [self._pair(row, sample) for sample, row in enumerate(rows)]
        for sample, pair in enumerate(pairs):
            if pair.keys() != pairs[0].keys():
                raise MediaError(
                    f"sample {sample}: a pair of {' and '.join(pair)}, sample 0 has {' and '.join(pairs[0])}; the rows "
                    "of a batch have the same modalities",
                    sample,
                )
        batch: dict[str, torch.Tensor] = {}
        media = {medium: [[pair[name]] for pair in pairs] for name, medium in _columns(pairs[0]).items()}
        if media:
            # With placeholders an error names the sample; their tokens are not used.
            tokens = "".join(getattr(self.processor, f"{name}_token") for name in _columns(pairs[0]))
            found = self.processor(text=[tokens] * len(pairs), return_tensors="pt", **media)
            self._check_windows(found, media.get("audio") or [])
            wanted = ("pixel_values", "input_features", "input_features_mask")
            batch |= {name: found[name] for name in wanted if name in found}
        if "text" in pairs[0]:
            batch |= self.processor(text=[pair["text"] for pair in pairs], return_tensors="pt", **self.options)
        return batch

    def _pair(self, row: Mapping[str, Any], sample: int) -> dict[str, Any]:
        try:
            return pair_of(row)
        except LayoutError as error:
            raise MediaError(f"sample {sample}: {error}", sample) from error

    def _check_windows(self, found: Mapping[str, Any], clips: list[list[Any]]) -> None:
        """Refuse a clip of several windows: each would be a row of its own."""
        if not clips or len(found["input_features"]) == len(clips):
            return
        for sample, clip in enumerate(clips):
            windows = len(self.processor(audio=clip, return_tensors="pt")["input_features"])
            if windows > 1:
                raise MediaError(
                    f"sample {sample}: its clip fills {windows} windows, a pair takes a clip of one; cut it shorter",
                    sample,
                    "audio",
                )

    def _checked(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return batch

    def _unlabelled(self, row: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        raise MediaError("no sample of a batch could be read; leave the bad rows out of the data")


def _columns(pair: Mapping[str, Any]) -> dict[str, str]:
    """Medium of a pair -> the argument of the processor."""
    return {name: medium.column for name, medium in MEDIA.items() if name in pair}
