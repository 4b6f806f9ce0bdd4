"""Each encoder of the demo learns its own medium first."""

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from chorus_moe.training.collator import ChorusDataCollator
from chorus_moe.training.demo.augment import PictureAugment
from chorus_moe.training.demo.data import BASE_SKILLS, DigitPictures, DigitQuestions, corpus, handwritten_digits
from chorus_moe.training.demo.encoders import (
    OTHER_SHARE,
    EncoderLesson,
    FrozenTowers,
    LoneDigitCollator,
    LoneDigits,
    beside,
    learn_alone,
)
from chorus_moe.training.demo.model import build_demo
from chorus_moe.training.demo.speech import SAMPLING_RATE, SpeechClips


@pytest.fixture(scope="module")
def demo() -> tuple[Any, Any]:
    torch.manual_seed(0)
    return build_demo(corpus())


@pytest.fixture(scope="module")
def pictures() -> DigitPictures:
    return handwritten_digits()[0]


def clips() -> SpeechClips:
    """A tone a digit, of different lengths."""
    waves = [np.sin(np.arange(4_000 + 300 * digit) * 0.02 * (digit + 1)).astype(np.float32) for digit in range(10)]
    return SpeechClips(waves, np.arange(10), ["tone"] * 10)


def test_an_item_is_a_function_of_seed_and_index(pictures: DigitPictures):
    first, again = (LoneDigits(pictures, 20, seed=3, picture_augment=PictureAugment()) for _ in range(2))
    assert [digit for _, digit in map(first.__getitem__, range(20))] == [again[i][1] for i in range(20)]
    assert np.array_equal(np.asarray(first[7][0]), np.asarray(again[7][0]))
    with pytest.raises(IndexError, match="item 20 of 20"):
        first[20]


@pytest.mark.parametrize("workers", [0, 1])
def test_towers_in_the_loader_give_the_loss_and_gradients_of_the_media_themselves(
    pictures: DigitPictures, workers: int
):
    torch.manual_seed(0)
    model, processor = build_demo(corpus())
    for tower in (model.model.vision_tower, model.model.audio_tower):
        tower.requires_grad_(False)
    questions, collate = DigitQuestions(pictures, clips(), BASE_SKILLS, 6), ChorusDataCollator(processor)
    loader = DataLoader(questions, 6, num_workers=workers, collate_fn=FrozenTowers(collate, model.model))
    cached = next(iter(loader))
    assert not any(name in cached for name in ("pixel_values", "input_features", "input_features_mask"))
    found = []
    for batch in (collate([questions[index] for index in range(6)]), cached):
        model.train().zero_grad()
        loss = model(**batch).loss
        loss.backward()
        found.append((loss.detach(), [p.grad.clone() for p in model.model.audio_connector.parameters()]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)


def test_a_clip_scores_the_same_alone_and_beside_a_longer_one(demo: tuple[Any, Any]):
    model, processor = demo
    lesson, collate = EncoderLesson(model.model, "audio").eval(), LoneDigitCollator(processor, "audio")
    short, long = clips().waveforms[0], clips().waveforms[9]
    with torch.inference_mode():
        alone = lesson(**collate([(short, 0)]))["logits"]
        beside = lesson(**collate([(short, 0), (long, 9)]))["logits"]
    # Products over other numbers of rows: 1e-6 seen at logits of size 1.
    torch.testing.assert_close(beside[:1], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("modality", ["image", "audio"])
def test_a_lesson_teaches_the_tower_and_connector_of_the_model(
    modality: str, demo: tuple[Any, Any], pictures: DigitPictures
):
    model, processor = demo
    lesson = EncoderLesson(model.model, modality).train()
    data = LoneDigits(pictures if modality == "image" else clips(), 16)
    batch = LoneDigitCollator(processor, modality)([data[i] for i in range(16)])
    optimizer = torch.optim.AdamW(lesson.parameters(), lr=2e-3)
    losses = []
    for _ in range(12):
        loss = lesson(**batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    mine = {name.split(".")[1] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    prefix = "vision" if modality == "image" else "audio"
    assert {f"{prefix}_tower", f"{prefix}_connector"} <= mine
    assert "language_model" not in mine


@pytest.mark.parametrize("modality", ["image", "audio"])
def test_a_frozen_lesson_leaves_only_its_own_tower_and_connector_untrained(modality: str):
    model = build_demo(corpus())[0]
    EncoderLesson(model.model, modality).freeze()
    frozen = {name.split(".")[1] for name, parameter in model.named_parameters() if not parameter.requires_grad}
    prefix = "vision" if modality == "image" else "audio"
    assert frozen == {f"{prefix}_tower", f"{prefix}_connector"}


def test_a_repeated_lesson_keeps_the_statistics_of_batch_norms_and_freezes_what_it_taught():
    model, processor = build_demo(corpus())
    lesson, collate = EncoderLesson(model.model, "audio"), LoneDigitCollator(processor, "audio")
    batch = collate([(clip, digit) for digit, clip in enumerate(clips().waveforms)])
    norm = model.model.audio_tower.encoder.norms[0]
    lesson.train()(**batch)
    # As in any lesson, batch norms have moved.
    assert norm.running_mean.any()
    before = norm.running_mean.clone(), norm.weight.detach().clone()

    def teach(taught: EncoderLesson) -> None:
        taught.train()(**batch)["loss"].backward()
        torch.optim.SGD(taught.parameters(), 0.1).step()

    lesson.repeat(teach)
    assert torch.equal(norm.running_mean, before[0]) and not torch.equal(norm.weight, before[1])
    assert not any(p.requires_grad for part in (lesson.tower, lesson.connector) for p in part.parameters())


def test_other_words_are_classes_behind_the_digits_and_take_their_share_of_the_clips():
    words = SpeechClips([np.full(100, word, np.float32) for word in range(3)], np.arange(3), ["voice"] * 3)
    lesson = LoneDigits(clips(), 1_000, other_words=words)
    items = [lesson[i] for i in range(len(lesson))]
    others = [(float(waveform[0]), label) for waveform, label in items if label >= 10]
    # 1,000 draws: three standard deviations are 0.045.
    assert len(others) / len(items) == pytest.approx(OTHER_SHARE, abs=0.046)
    assert set(others) == {(0.0, 10), (1.0, 11), (2.0, 12)}
    assert lesson.num_classes == 13 and LoneDigits(clips(), 1).num_classes == 10


def test_a_lesson_with_other_words_scores_every_class(demo: tuple[Any, Any]):
    model, processor = demo
    lesson, collate = EncoderLesson(model.model, "audio", 13), LoneDigitCollator(processor, "audio")
    assert lesson(**collate([(clips().waveforms[0], 12)]))["logits"].shape == (1, 13)


def test_a_clip_that_is_drawn_again_is_not_heard_again(demo: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch):
    _, processor = demo
    extractor, known = processor.feature_extractor, clips().waveforms
    expected = extractor([known[3], known[8]], sampling_rate=SAMPLING_RATE, return_tensors="pt")
    collate = LoneDigitCollator(processor, "audio")
    collate([(known[8], 8), (known[3], 3)])
    monkeypatch.setattr(type(extractor), "__call__", None)
    batch = collate([(known[3], 3), (known[8], 8)])
    assert torch.equal(batch["input_features"], expected["input_features"])
    assert torch.equal(batch["input_features_mask"], expected["input_features_mask"])
    assert batch["labels"].tolist() == [3, 8]


def test_an_encoder_learns_its_lesson_and_is_frozen():
    model, processor = build_demo(corpus())
    items, collate = LoneDigits(clips(), 20, seed=4), LoneDigitCollator(processor, "audio")
    had: list[Any] = []
    learn_alone(model, "audio", items, lambda *given: had.extend(given), collate)
    lesson, *others = had
    assert lesson.tower is model.model.audio_tower and others == [items, collate]
    assert not any(parameter.requires_grad for parameter in model.model.audio_tower.parameters())


def test_what_is_learnt_in_a_process_beside_this_one_comes_back_and_is_frozen(tmp_path: Path):
    module = torch.nn.Linear(2, 2)
    with beside(lambda: module.weight.data.fill_(3.0), [module], tmp_path / "learnt.safetensors"):
        pass
    assert module.weight.eq(3.0).all() and not module.weight.requires_grad


def test_without_forks_the_lesson_beside_comes_after_this_one_and_not_at_all_after_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "platform", "darwin")
    module, order = torch.nn.Linear(2, 2), []
    with beside(lambda: order.append("beside"), [module], tmp_path / "learnt.safetensors"):
        order.append("this")
    with pytest.raises(KeyError), beside(lambda: order.append("never"), [module], tmp_path / "learnt.safetensors"):
        raise KeyError("no recordings")
    assert order == ["this", "beside"] and not module.weight.requires_grad


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux only")
def test_a_failure_in_the_process_beside_this_one_is_an_error(tmp_path: Path):
    def learn() -> None:
        os._exit(3)

    with (
        pytest.raises(RuntimeError, match="exit code 3"),
        beside(learn, [torch.nn.Linear(2, 2)], tmp_path / "learnt.safetensors"),
    ):
        pass
