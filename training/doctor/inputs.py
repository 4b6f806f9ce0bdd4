"""The model that the doctor examines, and inputs of every modality that it takes, made by its own processor."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedModel

from chorus_moe.modeling.configuration_text import ChorusTextConfig
from chorus_moe.modeling.modeling_text import ChorusTextModel
from chorus_moe.processors.processing_chorus import ChorusProcessor
from chorus_moe.training.answers import user_turn
from chorus_moe.training.doctor.finding import TOLERANCES
from chorus_moe.training.loading import ModelOrAdapter, base_model, device_of

Batch = dict[str, Tensor]
Row = dict[str, Any]
Key = TypeVar("Key")
# Inputs with one entry per token; the others have one per image or clip.
SEQUENCES = ("input_ids", "attention_mask", "mm_token_type_ids")
QUESTIONS = ("What is it?", "How many of them are there, and which one is the largest of all that you can find here?")
ANSWER = "There are three of them, and the last one is the largest."
# The last tokens of every sample, all of them words of the answer.
NUM_ANSWER_TOKENS = 4


@dataclass
class Patient:
    """A generative model, with or without an adapter, in evaluation mode.

    Args:
        model: a `ChorusForConditionalGeneration` or a `PeftModel` around one.
        source: the folder or Hub id that it was loaded from, if any.
    """

    model: ModelOrAdapter
    processor: ChorusProcessor
    source: str | None = None

    @property
    def base(self) -> PreTrainedModel:
        """The model itself; adapters act in it also when it is called without their wrapper."""
        return base_model(self.model)

    @property
    def is_adapted(self) -> bool:
        return self.base is not self.model

    @property
    def text_config(self) -> ChorusTextConfig:
        return self.base.config.text_config

    @property
    def decoder(self) -> ChorusTextModel:
        return self.base.model.language_model

    @property
    def media(self) -> list[str]:
        # Text comes first in every model.
        return self.base.config.modalities[1:]

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.embed_tokens.weight.dtype

    @property
    def device(self) -> torch.device:
        return device_of(self.model)

    @property
    def tolerance(self) -> float:
        return TOLERANCES[self.dtype]

    @cached_property
    def rows(self) -> list[Row]:
        """A short and a long text, a row for each kind of medium, and one with all kinds and one of them twice."""
        kinds = [(), (), *((name,) for name in self.media)]
        kinds += [(*self.media, self.media[0])] if self.media else []
        return [self.make_row(kind, number) for number, kind in enumerate(kinds)]

    def row_of(self, modality: str) -> Row:
        """The row whose only medium is of this modality."""
        return self.rows[2 + self.media.index(modality)]

    def make_row(self, kind: Sequence[str], number: int, seed: int = 0) -> Row:
        """Another seed gives other images and sounds of the same sizes."""
        rng = np.random.default_rng([number, seed])
        images = [noise_image(rng, index) for index in range(kind.count("image"))]
        clips = [self._noise_clip(rng, number + index) for index in range(kind.count("audio"))]
        row = user_turn(QUESTIONS[number % 2], images, clips)
        return {**row, "messages": [*row["messages"], {"role": "assistant", "content": ANSWER}]}

    def exchanged(self, modality: str) -> Row:
        """The row of a modality with another image or sound in the place of the first."""
        return self.make_row((modality,), 2 + self.media.index(modality), seed=1)

    def _noise_clip(self, rng: np.random.Generator, index: int) -> dict[str, Any]:
        extractor = self.processor.feature_extractor
        seconds = min(0.25 + 0.1 * (index % 3), extractor.max_seconds)
        rate = extractor.sampling_rate
        return {"array": rng.normal(0, 0.1, int(seconds * rate)).astype(np.float32), "sampling_rate": rate}

    def encode(self, rows: Sequence[Mapping[str, Any]] | None = None, side: str | None = "left") -> Batch:
        """The tensors of some rows (all if None), padded on one side, or as the processor does by itself (None)."""
        rows = self.rows if rows is None else rows
        batch = self.processor.apply_chat_template(
            [row["messages"] for row in rows],
            images=[row["images"] for row in rows],
            audio=[row["audio"] for row in rows],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True} | ({"padding_side": side} if side else {}),
        )
        return {name: value.to(self.device) for name, value in batch.items()}

    @torch.no_grad()
    def logits(self, batch: Batch) -> list[Tensor]:
        """Logits `(tokens, vocabulary)` of the real tokens of each sample."""
        found = self.base(**batch).logits
        return [row[mask.bool()] for row, mask in zip(found, batch["attention_mask"], strict=True)]


def train_mode(patient: Patient) -> None:
    """Training mode, without the warning about banks that labels do not reach: it appears once and is for trainers."""
    # The flags alone: `train()` of the base would say the warning. The modules below are switched as usual.
    patient.model.training = patient.base.training = True
    patient.base.model.train()


def noise_image(rng: np.random.Generator, index: int) -> Image.Image:
    return Image.fromarray(rng.integers(0, 255, (40 + 8 * index, 48, 3), dtype=np.uint8))


def all_labels(batch: Batch) -> Tensor:
    """Labels on every real token, media included: a parameter that these do not reach is reached by no label."""
    return batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)


def answer_labels(batch: Batch) -> Tensor:
    """Labels on the last words only, as in a conversation. For batches padded on the left."""
    labels = batch["input_ids"].clone()
    labels[:, :-NUM_ANSWER_TOKENS] = -100
    return labels


def gradient_norms(
    patient: Patient, parameters: Mapping[Key, nn.Parameter], batch: Batch, labels: Tensor
) -> dict[Key, float]:
    """Norm of the gradient of each parameter under the loss of `labels`; 0 for one outside the graph.

    Each gradient is freed as soon as it is measured, so no second copy of the model is needed.
    """
    norms = dict.fromkeys(parameters, 0.0)

    def measure(name: Key, parameter: nn.Parameter) -> None:
        assert parameter.grad is not None  # called once it has been accumulated
        norms[name] += float(parameter.grad.detach().float().norm())
        parameter.grad = None

    # Only the wanted parameters get gradients; the graph of the rest is not built.
    patient.model.requires_grad_(False)
    handles = []
    for name, parameter in parameters.items():
        parameter.requires_grad_(True)
        handles.append(parameter.register_post_accumulate_grad_hook(lambda p, name=name: measure(name, p)))
    try:
        loss = patient.base(**batch, labels=labels).loss
        # A loss that no wanted parameter reaches has no graph, and `backward` would raise.
        if loss.requires_grad:
            loss.backward()
    finally:
        for handle in handles:
            handle.remove()
    return norms
