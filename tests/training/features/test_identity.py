"""Hashes are those of what a tower and a processor compute, and of nothing else."""

import copy
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import AutoModelForMultimodalLM

from chorus_moe import ChorusForConditionalGeneration, ChorusProcessor
from chorus_moe.training.features.identity import processor_hash, tower_hash, towers_of
from chorus_moe.training.loading import load_processor
from chorus_moe.training.lora import lora_config
from tests.training.conftest import make_model


def hashes(model: ChorusForConditionalGeneration) -> dict[str, str]:
    return {name: tower_hash(tower) for name, tower in towers_of(model).items()}


def test_a_model_that_was_saved_and_loaded_has_the_same_hashes(
    model: ChorusForConditionalGeneration, processor: ChorusProcessor, base: Path
) -> None:
    loaded = AutoModelForMultimodalLM.from_pretrained(base)
    assert hashes(loaded) == hashes(model)
    assert set(hashes(model)) == {"image", "audio"}
    again = load_processor(str(base))
    assert processor_hash(again) == processor_hash(processor)
    # What a call leaves in a tokenizer is none of its settings.
    again(text=["a", "a longer text"], padding=True, truncation=True, max_length=3)
    assert processor_hash(again) == processor_hash(processor)


def test_only_what_a_tower_computes_with_counts(model: ChorusForConditionalGeneration) -> None:
    before = hashes(model)
    with torch.no_grad():
        model.model.vision_connector.projector.norm.weight += 1
        model.model.language_model.embed_tokens.weight += 1
    assert hashes(model) == before
    adapted = get_peft_model(make_model_like(model), lora_config(model, banks=["image"], verbose=False))
    assert hashes(adapted) == before
    with torch.no_grad():
        next(model.model.audio_tower.parameters()).view(-1)[0] += 1e-3
    assert hashes(model)["image"] == before["image"]
    assert hashes(model)["audio"] != before["audio"]


def make_model_like(model: ChorusForConditionalGeneration) -> ChorusForConditionalGeneration:
    return copy.deepcopy(model)


def test_the_type_of_numbers_and_the_configuration_count(
    model: ChorusForConditionalGeneration, processor: ChorusProcessor
) -> None:
    before = hashes(model)
    model.model.vision_tower.config.pool_size = 1
    assert hashes(model)["image"] != before["image"]
    assert hashes(make_model(processor.tokenizer).to(torch.bfloat16))["audio"] != before["audio"]


def test_every_setting_of_the_processor_counts(processor: ChorusProcessor) -> None:
    before = processor_hash(processor)
    for change in (
        lambda other: setattr(other.image_processor, "image_mean", [0.1, 0.2, 0.3]),
        lambda other: setattr(other.feature_extractor, "num_mel_bins", 17),
        lambda other: setattr(other, "chat_template", other.chat_template + " "),
        lambda other: setattr(other, "num_image_tokens", 5),
        lambda other: other.tokenizer.add_tokens(["<new>"]),
    ):
        other = copy.deepcopy(processor)
        change(other)
        assert processor_hash(other) != before
