"""Rows of messages, images and sound to a batch with labels on the assistant's words.

Unusual here:
- nothing is dropped silently: a sample that cannot be read is an error, or with `on_bad_media="skip"` it is counted
  and logged, up to a cap;
- turns with `weight: 0` (OpenAI), `train: false` (axolotl) or `loss: false` (ms-swift) are read and not learned;
- a batch whose samples are all bad still comes out, as text without labels, so that all ranks take equally many steps.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from transformers.utils import logging

from chorus_moe.processors.processing_chorus import ChorusProcessor
from chorus_moe.processors.processing_limits import MediaError
from chorus_moe.processors.processing_media import MEDIA
from chorus_moe.training.data import SKIPPED
from chorus_moe.training.layouts import DOCUMENT, LEARNED_KEYS, LayoutError, is_learned, standard_row

logger = logging.get_logger(__name__)
# A batch may hold documents and conversations, so one template writes both.
DOCUMENT_TEMPLATE = (
    "{%- if messages[0]['role'] == '" + DOCUMENT + "' -%}"
    "{%- set content = messages[0]['content'] -%}"
    "{{- bos_token -}}"
    "{%- generation -%}"
    "{%- if content is string -%}{{- content -}}"
    "{%- else -%}{%- for part in content -%}"
    "{%- if part['type'] == 'text' -%}{{- part['text'] -}}{%- else -%}{{- MEDIA[part['type']] -}}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{{- eos_token -}}"
    "{%- endgeneration -%}"
    "{%- else %}"
)
Row = Mapping[str, Any]
# Rows, and the batch that was made of them, to what else the batch gets.
MoreColumns = Callable[[Sequence[Row], Mapping[str, torch.Tensor]], dict[str, torch.Tensor]]


class ChorusDataCollator:
    """Makes the batches of a Trainer whose `remove_unused_columns` is False.

    A row has `messages` (chat turns), `images` and `audio` (lists, None or missing): one item for each image or audio
    part that holds no data. Items are anything the processor reads: PIL images, arrays, paths, `{"bytes", "path"}`.
    Rows in the layouts of other projects are converted, see `layouts`.

    Args:
        processor: a ChorusProcessor.
        max_length: tokens a sample may have; longer text is cut, images and sound never are.
        on_bad_media: "raise", or "skip" to leave a sample out that cannot be read.
        max_bad_samples: how many may be skipped before that is an error as well.
        pad_to_multiple_of: round the length of a batch up.
        prompt_only: leave the last turn, the assistant's, out: prompts for `generate`, padded on the left, no labels.
        more: what else a batch gets: functions of the rows that could be read, perhaps none, and of their batch.

    Raises:
        ValueError: an unknown option.
        MediaError: a bad sample, by its number in the batch, or more of them than the cap.
    """

    def __init__(
        self,
        processor: ChorusProcessor,
        *,
        max_length: int | None = None,
        on_bad_media: str = "raise",
        max_bad_samples: int = 100,
        pad_to_multiple_of: int | None = None,
        prompt_only: bool = False,
        more: Sequence[MoreColumns] = (),
    ):
        if on_bad_media not in ("raise", "skip"):
            raise ValueError(f"on_bad_media={on_bad_media!r}; choose 'raise' or 'skip'")
        self.processor = processor
        self.on_bad_media = on_bad_media
        self.max_bad_samples = max_bad_samples
        self.prompt_only = prompt_only
        self.more = tuple(more)
        # Generation goes on at the right end of a prompt.
        self.options: dict[str, Any] = {"padding": True, "padding_side": "left" if prompt_only else "right"}
        if max_length is not None:
            self.options |= {"truncation": True, "max_length": max_length}
        if pad_to_multiple_of is not None:
            self.options["pad_to_multiple_of"] = pad_to_multiple_of
        # In shared memory: the workers of a DataLoader count together.
        self._bad = torch.zeros(1, dtype=torch.int64).share_memory_()
        self._warned_unlabelled = False

    @property
    def num_bad_samples(self) -> int:
        """Samples skipped so far, over all workers of this process."""
        return int(self._bad)

    def __call__(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        """The batch of `rows`: the processor's tensors and `labels` (B, S), padded on the right."""
        if all(row is SKIPPED for row in rows):
            # The Trainer takes the batches of a resumed stream to where it goes on, and looks into none of them.
            return {}
        good = list(rows)
        # The processor checks all samples before it computes, so an error costs little and names one sample; without it
        # the batch is tried again.
        while good:
            try:
                return self._with_more(good, self._checked(self._encode(good)))
            except MediaError as error:
                self._skip(error)
                # The error does not belong to a sample, so skipping one would not help.
                if error.sample is None:
                    raise
                del good[error.sample]
        # A rank without a batch would leave the others waiting in the gradient exchange.
        return self._unlabelled(rows[0])

    def _encode(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        rows = [self._standard(row, sample) for sample, row in enumerate(rows)]
        media: dict[str, Any] = {
            medium.column: [list(row.get(medium.column) or []) for row in rows] for medium in MEDIA.values()
        }
        messages = [clean_messages(row["messages"]) for row in rows]
        learned = [self._learned(turns, sample) for sample, turns in enumerate(messages)]
        messages = [[{k: v for k, v in turn.items() if k not in LEARNED_KEYS} for turn in turns] for turns in messages]
        if self.prompt_only:
            return self._prompts(messages, media)
        needs_mask = not all(map(all, learned))
        is_document = [turns[0]["role"] == DOCUMENT for turns in messages if turns]
        batch = self.processor.apply_chat_template(
            messages,
            chat_template=document_template(self.processor) if any(is_document) else None,
            return_labels=True,
            return_tensors="pt",
            return_assistant_tokens_mask=needs_mask,
            processor_kwargs=dict(self.options),
            **media,
        )
        if needs_mask:
            masks = batch.pop("assistant_masks")
            for sample, flags in enumerate(learned):
                if not all(flags):
                    self._unlearn(batch["labels"][sample], masks[sample].tolist(), flags, sample)
        return dict(batch)

    def _prompts(self, messages: list[list[dict[str, Any]]], media: dict[str, Any]) -> dict[str, torch.Tensor]:
        for sample, turns in enumerate(messages):
            if turns[-1]["role"] != "assistant":
                raise MediaError(
                    f"sample {sample}: the last turn is {turns[-1]['role']!r}, not the assistant's", sample
                )
        batch = self.processor.apply_chat_template(
            [turns[:-1] for turns in messages],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs=dict(self.options),
            **media,
        )
        return dict(batch)

    def _standard(self, row: Row, sample: int) -> dict[str, Any]:
        try:
            return standard_row(row)
        except LayoutError as error:
            raise MediaError(f"sample {sample}: {error}", sample) from error

    def _learned(self, turns: Sequence[Row], sample: int) -> list[bool]:
        """Whether each turn of the assistant is learned."""
        try:
            return [is_learned(turn) for turn in turns if turn["role"] == "assistant"]
        except LayoutError as error:
            raise MediaError(f"sample {sample}: {error}", sample) from error

    def _unlearn(self, labels_S: torch.Tensor, mask_S: list[int], learned: list[bool], sample: int) -> None:
        """Take the labels of the turns that are not learned; each turn is one run of the assistant's tokens."""
        runs, start = [], 0
        for value, group in groupby(mask_S):
            stop = start + len(list(group))
            runs += [slice(start, stop)] if value else []
            start = stop
        if len(runs) > len(learned) or (len(runs) < len(learned) and "max_length" not in self.options):
            raise MediaError(
                f"sample {sample}: the chat template marks {len(runs)} runs of tokens for {len(learned)} turns of the "
                "assistant, so none can be left out of learning",
                sample,
            )
        if self.processor.tokenizer.truncation_side == "left":
            # What was cut off are the first turns.
            learned = learned[len(learned) - len(runs) :]
        for run, is_kept in zip(runs, learned, strict=False):
            if not is_kept:
                labels_S[run] = -100

    def _skip(self, error: MediaError) -> None:
        """Count a bad sample, or raise."""
        if self.on_bad_media == "raise":
            raise error
        self._bad += 1
        if self.num_bad_samples > self.max_bad_samples:
            raise MediaError(
                f"{self.num_bad_samples} samples could not be read, max_bad_samples is {self.max_bad_samples}; "
                f"the last one: {error}",
                error.sample,
                error.modality,
            ) from error
        logger.warning(f"skipped bad sample {self.num_bad_samples} of at most {self.max_bad_samples}: {error}")

    def _checked(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        # The first position is never predicted, so its label does not count.
        if not self.prompt_only and not self._warned_unlabelled and bool((batch["labels"][:, 1:] == -100).all()):
            self._warned_unlabelled = True
            logger.warning(
                f"a batch of {len(batch['labels'])} samples has no labels, so training learns nothing from it: no "
                "assistant turn is left, perhaps because max_length cut it off (this warning appears once)"
            )
        return batch

    def _unlabelled(self, row: Row) -> dict[str, torch.Tensor]:
        """The texts of one row without any label: what stands for a batch of which nothing could be read."""
        try:
            messages = without_media(clean_messages(standard_row(row)["messages"]))
        # A row that was no row has no text to stand for it either.
        except LayoutError:
            messages = [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}]
        batch = self._encode([{"messages": messages}])
        # Without labels the batch teaches nothing.
        if "labels" in batch:
            batch["labels"] = torch.full_like(batch["labels"], -100)
        # It stands for no row.
        return self._with_more((), batch)

    def _with_more(self, rows: Sequence[Row], batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for columns in self.more:
            batch = batch | columns(rows, batch)
        return batch


def document_template(processor: ChorusProcessor) -> str:
    """The processor's chat template, which also writes documents: their parts, and eos."""
    own = processor.chat_template or ""
    own = own.get("default", "") if isinstance(own, dict) else own
    media = {medium: getattr(processor, f"{medium}_token") for medium in MEDIA}
    # Jinja drops one newline at the end of a template.
    return DOCUMENT_TEMPLATE.replace("MEDIA", repr(media)) + own.removesuffix("\n") + "{% endif %}"


def clean_messages(messages: Sequence[Row]) -> list[dict[str, Any]]:
    """Messages without the None values that Arrow tables put where another row has a key."""
    cleaned = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, list | tuple):
            # An Arrow table has one set of keys: a text part gets `image: None` where another part has an image.
            content = [_without_none(part) if isinstance(part, Mapping) else part for part in content]
        cleaned.append({**_without_none(message), "content": content})
    return cleaned


def without_media(messages: Sequence[Row]) -> list[dict[str, Any]]:
    """Messages without their image and audio parts."""
    return [
        {**message, "content": [part for part in message["content"] if _kind(part) not in MEDIA]}
        if isinstance(message.get("content"), list)
        else dict(message)
        for message in messages
    ]


def _kind(part: Any) -> str | None:
    return part.get("type") if isinstance(part, Mapping) else None


def _without_none(mapping: Row) -> dict[str, Any]:
    return {key: value for key, value in mapping.items() if value is not None}
