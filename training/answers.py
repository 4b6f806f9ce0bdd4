"""Answers to prompts of text, images and sound."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from chorus_moe.processors.processing_chorus import ChorusProcessor
from chorus_moe.training.collator import clean_messages
from chorus_moe.training.layouts import standard_row
from chorus_moe.training.loading import ModelOrAdapter, device_of


def user_turn(text: str, images: Sequence[Any] = (), audio: Sequence[Any] = ()) -> dict[str, Any]:
    """A row whose one user turn shows the images, then the sounds, then the text."""
    content = [{"type": "image"} for _ in images] + [{"type": "audio"} for _ in audio]
    content.append({"type": "text", "text": text})
    return {"messages": [{"role": "user", "content": content}], "images": list(images), "audio": list(audio)}


@torch.inference_mode()
def answer_rows(
    model: ModelOrAdapter,
    processor: ChorusProcessor,
    rows: Sequence[Mapping[str, Any]],
    *,
    max_new_tokens: int = 64,
    **options: Any,
) -> list[str]:
    """The model's answers to `rows`, whose messages end before the answer; greedy unless `options` say otherwise.

    Args:
        model: a ChorusForConditionalGeneration, with or without an adapter, in evaluation mode.
        rows: as in `ChorusDataCollator`.
        options: for `generate`.

    Raises:
        MediaError: a row that cannot be read, by its number.
    """
    rows = [standard_row(row) for row in rows]
    batch = processor.apply_chat_template(
        [clean_messages(row["messages"]) for row in rows],
        images=[list(row.get("images") or []) for row in rows],
        audio=[list(row.get("audio") or []) for row in rows],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        # On the left, so that every row ends with its last prompt token, where generation goes on.
        processor_kwargs={"padding": True, "padding_side": "left"},
    ).to(device_of(model))
    options = {"do_sample": False, **options}
    tokens = model.generate(**batch, max_new_tokens=max_new_tokens, **options)
    new_tokens = tokens[:, batch["input_ids"].shape[1] :]
    return [text.strip() for text in processor.batch_decode(new_tokens, skip_special_tokens=True)]
