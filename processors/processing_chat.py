"""Conversations to model inputs and labels.

Unusual here:
- a placeholder, or any special token, typed into a message is text (see `processing_messages`);
- media wait undecoded until every conversation is checked;
- labels cover the assistant's words and the token that ends its turn.
"""

import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from transformers.processing_utils import ProcessorMixin

from .processing_limits import MediaError, MediaPlace
from .processing_media import MEDIA
from .processing_messages import (
    break_control_tokens,
    check_rendered,
    default_chat_template,
    prepare_conversation,
    split_batch,
)
from .processing_placement import flatten_media
from .processing_rows import label_rows

TokenRows = torch.Tensor | Sequence[Sequence[int]]


class ChatProcessor(ProcessorMixin):
    """The conversation half of `ChorusProcessor`, over its tokenizer, media tokens and `__call__`."""

    image_token: str
    audio_token: str
    image_token_id: int
    audio_token_id: int
    # Around rendering, by template and number of conversations: its time and memory are bounded by `import chorus_moe`.
    template_limits: Callable[[str, int], AbstractContextManager[None]] = staticmethod(lambda *_: nullcontext())

    def apply_chat_template(  # type: ignore[override]
        self,
        conversation: object,
        chat_template: str | None = None,
        *,
        images: object = None,
        audio: object = None,
        return_labels: bool = False,
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """A conversation, or a batch of them, as text or (with `tokenize=True, return_dict=True`) as model inputs.

        A message is `{"role", "content"}`; content is a string, a part or a list of parts: `{"type": "text", "text"}`,
        `{"type": "image", "image" | "path" | "url" | "base64" | "bytes"}` and `{"type": "audio", "audio" | ...}` with
        `"sampling_rate"` beside an array, or OpenAI's `image_url`, `audio_url` and `input_audio`. Tools, tool calls,
        documents and reasoning are written by a template that knows them, else refused. Special tokens typed into any
        of these become text (see `processing_messages`).

        Args:
            images, audio: items for parts that hold no data, in order: a flat list, or for a batch a list per
                conversation.
            return_labels: add `labels`, see `build_labels`; implies `tokenize=True, return_dict=True`.
            processor_kwargs: settings of `__call__`, such as `padding`, `truncation`, `max_length`, `sampling_rate`.
            kwargs: as in `ProcessorMixin.apply_chat_template`.

        Raises:
            MediaError: a mistake in one conversation, by its number.
        """
        options = dict(processor_kwargs or {})
        conversations, is_batched = split_batch(conversation)
        # Escaping is not optional: a caller could otherwise switch it off for text that users typed.
        kwargs.pop("sanitize_control_tokens", None)
        rate = kwargs.get("sampling_rate") or {**options.get("audio_kwargs", {}), **options}.get("sampling_rate")
        rows = {
            modality: self._media_rows(media, len(conversations), is_batched, modality)
            for modality, media in (("image", images), ("audio", audio))
        }
        control = self._control_tokens()
        beside = {key: break_control_tokens(kwargs[key], control) for key in kwargs.keys() & {"tools", "documents"}}
        kwargs.update(beside)
        prepared = [
            prepare_conversation(messages, {name: rows[name][sample] for name in rows}, control, rate, sample)
            for sample, messages in enumerate(conversations)
        ]
        template = chat_template or self.chat_template
        if isinstance(self.chat_template, dict):
            template = self.chat_template.get(chat_template or "default", chat_template)
        wants_mask = kwargs.get("return_assistant_tokens_mask", False)
        check_rendered(template or "", prepared, wants_mask or return_labels, **beside)
        if kwargs.get("tokenize") or return_labels:
            # The template writes bos and eos; the tokenizer would add a second bos.
            options.setdefault("add_special_tokens", False)
            options["media"] = self._take_media(prepared)
        target = prepared if is_batched else prepared[0]
        # Our own template needs no limit, which takes longer than the template itself.
        is_ours = template == default_chat_template(self.image_token, self.audio_token)
        limit = nullcontext() if is_ours else self.template_limits(template or "", len(prepared))
        if return_labels:
            tensor_type = kwargs.pop("return_tensors", "auto")
            tensor_type = options.pop("return_tensors", None) if tensor_type == "auto" else tensor_type
            # As lists: labels are made row by row, and everything becomes tensors in one place.
            kwargs.update(tokenize=True, return_dict=True, return_assistant_tokens_mask=True, return_tensors=None)
        with limit:
            batch = super().apply_chat_template(target, chat_template, processor_kwargs=options, **kwargs)
        if not return_labels:
            return batch
        batch["labels"] = self.build_labels(batch["input_ids"], batch["assistant_masks"])
        if not wants_mask:
            del batch["assistant_masks"]
        return batch.convert_to_tensors(tensor_type=tensor_type)

    def _media_rows(self, media: Any, num_conversations: int, is_batched: bool, modality: str) -> list[list[Any]]:
        if not is_batched or media is None:
            return [flatten_media(media, modality)] + [[] for _ in range(num_conversations - 1)]
        if len(media) != num_conversations:
            raise MediaError(f"found {len(media)} lists of {modality} items for {num_conversations} conversations")
        return [flatten_media(entry, modality) for entry in media]

    def _control_tokens(self) -> re.Pattern[str]:
        added = {str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        # Longest first, so that a token which begins with another is found as a whole.
        tokens = added | set(self.tokenizer.all_special_tokens) | {self.image_token, self.audio_token}
        return re.compile("|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True) if token))

    def _take_media(self, conversations: list[list[dict]]) -> dict[str, list[list] | None]:
        """Media of prepared conversations, decoded later. Empty arrays stay there: transformers 5.22 decodes sound."""
        rows: dict[str, list[list]] = {name: [] for name in MEDIA}
        for sample, messages in enumerate(conversations):
            parts = [part for turn in messages if isinstance(turn["content"], list) for part in turn["content"]]
            for modality in rows:
                mine = [part for part in parts if part["type"] == modality]
                if missing := sum(part[modality] is None for part in mine):
                    raise MediaPlace(modality, sample=sample).error(f"{missing} {modality} parts hold no data")
                rows[modality].append([part.pop(modality) for part in mine])
                for part in mine:
                    part[modality] = np.empty(0)
        return {modality: items if any(items) else None for modality, items in rows.items()}

    def build_labels(self, input_ids: TokenRows, assistant_masks: TokenRows) -> list[list[int]]:
        """Labels (B, S): the assistant's words and the token that ends its turn, -100 elsewhere.

        Media and pad tokens are never labelled, also inside an assistant's turn.
        """
        rows, masks = (x.tolist() if isinstance(x, torch.Tensor) else list(x) for x in (input_ids, assistant_masks))
        never = {self.image_token_id, self.audio_token_id}
        # Where eos is also the pad token it must stay labelled, or the model never learns to end a turn.
        if self.tokenizer.pad_token_id != self.tokenizer.eos_token_id:
            never.add(self.tokenizer.pad_token_id)
        return label_rows(rows, masks, never)
