"""The demo's encoders learn their own medium first, each alone; the decoder then reads tokens that mean something.

A step of an encoder costs a sixth (pictures) to a third (sound) of a step of the whole model, and a decoder that is
shown noise learns nothing from it for hundreds of steps. The classifier used here is thrown away; tower and connector
are the model's own, and stay as the lesson left them.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers.modeling_outputs import BaseModelOutputWithPooling

from chorus_moe.modeling.modeling_chorus import ChorusModel
from chorus_moe.modeling.modeling_generation import ChorusForConditionalGeneration
from chorus_moe.modeling.tower_audio import ChorusAudioOutput
from chorus_moe.processors.processing_chorus import ChorusProcessor
from chorus_moe.training.demo.augment import PictureAugment
from chorus_moe.training.demo.data import DigitPictures
from chorus_moe.training.demo.speech import SAMPLING_RATE, SpeechClips

# Of the clips: enough to hear sounds rather than ten patterns, and still two thirds digits.
OTHER_SHARE = 0.35


class EncoderLesson(nn.Module):
    """Tower and connector of one modality under a classifier of digits.

    Args:
        model: a ChorusModel.
        modality: "image" or "audio".
        num_classes: the ten digits, and whatever else is to be told apart.
    """

    def __init__(self, model: ChorusModel, modality: str, num_classes: int = 10):
        super().__init__()
        is_image = modality == "image"
        self.tower = model.vision_tower if is_image else model.audio_tower
        self.connector = model.vision_connector if is_image else model.audio_connector
        self.encode: Callable[..., Any] = model.get_image_features if is_image else model.get_audio_features
        width = model.config.text_config.hidden_size
        # A learnt weight for each token: a digit fills only part of its clip.
        self.weigh = nn.Linear(width, 1)
        self.dropout = nn.Dropout(0.2)
        self.classify = nn.Linear(2 * width, num_classes)
        self.is_repeated = False

    def train(self, mode: bool = True) -> "EncoderLesson":
        super().train(mode)
        if self.is_repeated:
            # One speaker's few clips would move the statistics of batch norms; tokens are dropped for the decoder only.
            self.tower.eval()
            self.connector.eval()
        return self

    def forward(self, labels: Tensor | None = None, **media: Tensor) -> dict[str, Tensor]:
        """`logits` `(N, num_classes)` of the weighted mean and the largest value of each channel, and `loss` when there
        are `labels` `(N,)`."""
        pieces = list(self.encode(**media).pooler_output)
        lengths = torch.tensor([len(piece) for piece in pieces], device=pieces[0].device)
        tokens_NLD = nn.utils.rnn.pad_sequence(pieces, batch_first=True)
        padded_NL1 = (torch.arange(tokens_NLD.shape[1], device=lengths.device) >= lengths[:, None])[..., None]
        # Padding gets weight zero.
        weights_NL1 = self.weigh(tokens_NLD).masked_fill(padded_NL1, -torch.inf).softmax(dim=1)
        largest_ND = tokens_NLD.masked_fill(padded_NL1, -torch.inf).amax(dim=1)
        pooled_NX = torch.cat([(weights_NL1 * tokens_NLD).sum(dim=1), largest_ND], dim=1)
        logits = self.classify(self.dropout(pooled_NX))
        outputs = {"logits": logits}
        if labels is None:
            return outputs
        # Smoothed labels carry over to unknown speakers better (docs/log.md, 2026-11-24).
        return {"loss": nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)} | outputs

    def freeze(self) -> None:
        """Freeze tower and connector: trained further with the decoder, they overfit to its speakers."""
        self.tower.requires_grad_(False)
        self.connector.requires_grad_(False)

    def repeat(self, train: Callable[["EncoderLesson"], object]) -> None:
        """Let `train` teach what an adapter has put into tower and connector, then freeze that as well."""
        self.is_repeated = True
        train(self)
        self.freeze()


class LoneDigits(Dataset):
    """`length` pictures or clips, each digit equally often, item i a function of (seed, i): `(medium, class)`.

    With `other_words` (clips whose `digits` number the words), `OTHER_SHARE` of the clips are such words; their classes
    start at 10.
    """

    def __init__(
        self,
        media: DigitPictures | SpeechClips,
        length: int,
        *,
        seed: int = 0,
        picture_augment: PictureAugment | None = None,
        other_words: SpeechClips | None = None,
    ):
        self.other_words = other_words
        self.items: Sequence[Any] = media.images if isinstance(media, DigitPictures) else media.waveforms
        self.rows = [np.flatnonzero(media.digits == digit) for digit in range(10)]
        self.length, self.seed, self.picture_augment = length, seed, picture_augment

    @property
    def num_classes(self) -> int:
        """Ten digits, and every other word."""
        return 10 if self.other_words is None else 11 + int(self.other_words.digits.max())

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Any, int]:
        if not 0 <= index < self.length:
            raise IndexError(f"item {index} of {self.length}")
        rng = np.random.default_rng((self.seed, index))
        if self.other_words is not None and rng.random() < OTHER_SHARE:
            row = int(rng.integers(len(self.other_words)))
            return self.other_words.waveforms[row], 10 + int(self.other_words.digits[row])
        digit = int(rng.integers(10))
        item = self.items[rng.choice(self.rows[digit])]
        return (self.picture_augment(item, rng) if self.picture_augment else item), digit


class LoneDigitCollator:
    """Batches of one modality for [`EncoderLesson`], through the processor's own parts.

    The features of a clip are computed once and kept: clips are augmented beforehand, and drawn several times.
    """

    def __init__(self, processor: ChorusProcessor, modality: str):
        self.processor, self.modality = processor, modality
        # By identity, with the clip itself: as long as it lives, no other object has its number.
        self.heard: dict[int, tuple[np.ndarray, Tensor]] = {}

    def __call__(self, items: Sequence[tuple[Any, int]]) -> dict[str, Tensor]:
        media = [medium for medium, _ in items]
        if self.modality == "image":
            batch = dict(self.processor.image_processor(media, return_tensors="pt"))
        else:
            frames = [self._hear(clip) for clip in media]
            ones = [torch.ones(len(clip), dtype=torch.long) for clip in frames]
            batch = {
                "input_features": nn.utils.rnn.pad_sequence(frames, batch_first=True),
                "input_features_mask": nn.utils.rnn.pad_sequence(ones, batch_first=True),
            }
        return batch | {"labels": torch.tensor([digit for _, digit in items])}

    def _hear(self, clip: np.ndarray) -> Tensor:
        if id(clip) not in self.heard:
            found = self.processor.feature_extractor(clip, sampling_rate=SAMPLING_RATE, return_tensors="pt")
            self.heard[id(clip)] = clip, found["input_features"][0]
        return self.heard[id(clip)][1]


class FrozenTowers:
    """Batches of `collate` whose media have been through the frozen towers of `model`: the states lie in
    `mm_encoder_outputs`. As the collator of a loader with workers it takes the towers off the core that trains.
    """

    def __init__(self, collate: Callable[[Sequence[Any]], dict[str, Any]], model: ChorusModel):
        self.collate, self.vision_tower, self.audio_tower = collate, model.vision_tower, model.audio_tower

    @torch.no_grad()
    def __call__(self, rows: Sequence[Any]) -> dict[str, Any]:
        batch = self.collate(rows)
        # Batch norms of a tower that was frozen in training mode would go on learning. A tower's own pooled output is
        # none of the connector's, so only the states go on.
        outputs: dict[str, Any] = {}
        if "pixel_values" in batch:
            seen = self.vision_tower.eval()(batch.pop("pixel_values"))
            outputs["image"] = BaseModelOutputWithPooling(last_hidden_state=seen.last_hidden_state)
        if "input_features" in batch:
            heard = self.audio_tower.eval()(batch.pop("input_features"), batch.pop("input_features_mask"))
            outputs["audio"] = ChorusAudioOutput(heard.last_hidden_state, heard.attention_mask)
        return batch | {"mm_encoder_outputs": outputs}


def learn_alone(
    model: ChorusForConditionalGeneration,
    modality: str,
    items: LoneDigits,
    train: Callable[[EncoderLesson, LoneDigits, Callable[..., Any]], object],
    collate: Callable[..., Any],
) -> EncoderLesson:
    """Let `train` teach tower and connector of one modality their medium: a lesson, on items, in batches of a collator.
    They are frozen. Returns the lesson, for others to come."""
    lesson = EncoderLesson(model.model, modality, items.num_classes)
    train(lesson, items, collate)
    lesson.freeze()
    return lesson


@contextmanager
def beside(learn: Callable[[], object], modules: Sequence[nn.Module], file: Path) -> Iterator[None]:
    """While the body runs, `learn` trains `modules` on the other core, in a forked process that hands them over in a
    `file`; then they are frozen. Without `fork`, or with a GPU, which does not survive one, it runs after the body.

    Raises:
        RuntimeError: the process failed; it has printed its own error.
    """
    parts = nn.ModuleList(modules)
    if sys.platform != "linux" or torch.cuda.is_available():
        yield
        learn()
    else:

        def learn_and_save() -> None:
            learn()
            save_file(parts.state_dict(), file)

        file.parent.mkdir(parents=True, exist_ok=True)
        # Forked, so that models and data need not be pickled.
        process = get_context("fork").Process(target=learn_and_save)
        process.start()
        try:
            yield
        except BaseException:
            # Otherwise the lesson would train on after the run has failed.
            process.terminate()
            raise
        finally:
            process.join()
        if process.exitcode:
            raise RuntimeError(f"the lesson beside this one ended with exit code {process.exitcode}")
        # The other process trained a copy; its weights come back in the file.
        parts.load_state_dict(load_file(file))
    parts.requires_grad_(False)
