"""Batches of rows with cached features, beside batches of rows with media."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers.modeling_outputs import BaseModelOutputWithPooling

from chorus_moe.modeling.tower_audio import ChorusAudioOutput
from chorus_moe.processors.processing_rows import IGNORED_LABEL, pad_rows, truncate_rows
from chorus_moe.training.collator import ChorusDataCollator, Row
from chorus_moe.training.features.rows import FeatureRow


class FeatureCollator(ChorusDataCollator):
    """A `ChorusDataCollator` that also takes rows of `chorus-moe cache-features`; options and errors are its own.

    A batch of them holds the states of the towers, under `mm_encoder_outputs`, in the place of pictures and sound.
    """

    def _encode(self, rows: Sequence[Row]) -> dict[str, Any]:
        cached = [row for row in rows if isinstance(row, FeatureRow)]
        if not cached:
            return super()._encode(rows)
        if len(cached) < len(rows):
            raise ValueError(f"{len(cached)} of the {len(rows)} rows of a batch hold cached features; all or none may")
        processor, options = self.processor, self.options
        tokens = {name: [list(row[name]) for row in cached] for name in ("input_ids", "labels")}
        if "max_length" in options:
            media_ids = {processor.image_token_id, processor.audio_token_id}
            side = processor.tokenizer.truncation_side
            tokens = truncate_rows(tokens, options["max_length"], media_ids, side)
        tokens["attention_mask"] = [[1] * len(ids) for ids in tokens["input_ids"]]
        tokens["mm_token_type_ids"] = processor.create_mm_token_type_ids(tokens["input_ids"])
        multiple = options.get("pad_to_multiple_of")
        padded = pad_rows(tokens, options["padding_side"], processor.tokenizer.pad_token_id, None, multiple)
        batch: dict[str, Any] = {name: torch.tensor(values) for name, values in padded.items()}
        batch["labels"] = batch["labels"].masked_fill(batch["attention_mask"] == 0, IGNORED_LABEL)
        return batch | {"mm_encoder_outputs": encoder_outputs(cached)}


def encoder_outputs(rows: Sequence[FeatureRow]) -> dict[str, Any]:
    """What the towers gave for the media of some rows, in their order.

    A modality of which the rows have nothing has an output of no items: its tower, which would otherwise take an idle
    step in training, rests on every rank.
    """
    outputs: dict[str, Any] = {}
    for name, shape in rows[0].shapes.items():
        pieces = [piece for row in rows for piece in row.states[name]]
        # Images all have one length; windows of sound are zero where padded.
        states_NLD = pad_sequence(pieces, batch_first=True) if pieces else torch.zeros(0, *shape)
        if name == "image":
            outputs[name] = BaseModelOutputWithPooling(last_hidden_state=states_NLD)
        else:
            lengths_N = torch.tensor([len(piece) for piece in pieces], dtype=torch.int64)
            mask_NL = torch.arange(states_NLD.shape[1])[None, :] < lengths_N[:, None]
            outputs[name] = ChorusAudioOutput(states_NLD, mask_NL)
    return outputs
