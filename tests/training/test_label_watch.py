"""Experts behind which nobody reads image and audio positions: they get no gradient, and the user is told once."""

import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from chorus_moe import ChorusForConditionalGeneration
from chorus_moe.training import label_watch
from chorus_moe.training.label_watch import WATCHED_BATCHES
from tests.conftest import tiny_batch, tiny_config

LEFT_OUT = {"text": {}, "image": {"layers": [1]}, "audio": {"layers": [1]}, "common": {}}
NUM_ANSWER_TOKENS = 3


def make(**text: object) -> ChorusForConditionalGeneration:
    torch.manual_seed(0)
    return ChorusForConditionalGeneration(tiny_config(**text))


def expert_gradients(model: ChorusForConditionalGeneration, layer: int) -> dict[str, float]:
    """Largest gradient of the experts of each bank when the last words alone are labelled, as in a conversation."""
    batch = tiny_batch(model.config)
    batch["labels"][:, :-NUM_ANSWER_TOKENS] = -100
    model(**batch).loss.backward()
    banks = model.model.language_model.layers[layer].mlp.banks
    return {name: bank.experts.down_proj.grad.abs().max().item() for name, bank in banks.items()}


@pytest.fixture
def heard(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """What is logged; what was said once in this process may be said again."""
    label_watch.logger.warning_once.__func__.cache_clear()
    return caplog


def test_labels_of_an_answer_do_not_reach_the_media_banks_of_the_last_layer() -> None:
    last = expert_gradients(make(), 2)
    assert (last["image"], last["audio"]) == (0, 0)
    assert min(last["text"], last["common"]) > 0
    assert min(expert_gradients(make(), 1).values()) > 0


def lessons(model: nn.Module, count: int = WATCHED_BATCHES, follows_media: bool = False) -> None:
    """Forwards in training. The answer is the last words, or also the word right behind an image or a clip."""
    batch = tiny_batch(model.config)
    if not follows_media:
        batch["labels"][:, :-NUM_ANSWER_TOKENS] = -100
    model.train()
    for _ in range(count):
        model(**batch)


def test_training_warns_once_and_names_banks_and_layer(heard: pytest.LogCaptureFixture) -> None:
    lessons(make(), 2 * WATCHED_BATCHES)
    (record,) = heard.records
    assert record.levelno == logging.WARNING
    assert "expert banks ['audio', 'image'] of layer 2: no later layer reads" in record.getMessage()


def test_experts_whose_output_predicts_a_label_learn_and_give_no_warning(heard: pytest.LogCaptureFixture) -> None:
    model = make()
    lessons(model, follows_media=True)
    assert not heard.messages
    model(**tiny_batch(model.config)).loss.backward()
    banks = model.model.language_model.layers[2].mlp.banks
    assert min(banks[name].experts.down_proj.grad.abs().max() for name in ("image", "audio")) > 0


def test_media_that_never_came_give_no_warning(heard: pytest.LogCaptureFixture) -> None:
    model, ids = make().train(), torch.full((2, 9), 7)
    for _ in range(WATCHED_BATCHES):
        model(input_ids=ids, labels=ids)
    assert not heard.messages


def test_inference_never_warns(heard: pytest.LogCaptureFixture) -> None:
    model = make().eval()
    batch = tiny_batch(model.config)
    for _ in range(WATCHED_BATCHES):
        model(**batch)
    del batch["labels"]
    model.generate(**batch, max_new_tokens=2)
    assert not heard.messages


@pytest.mark.parametrize(
    "text",
    [
        {"expert_banks": LEFT_OUT},
        {"mlp_layer_types": ["dense", "sparse", "dense"]},
        {"expert_banks": {"words_and_images": {"modalities": ["text", "image"]}, "common": {}}},
    ],
)
def test_banks_that_are_read_give_no_warning(heard: pytest.LogCaptureFixture, text: dict) -> None:
    lessons(make(**text))
    assert not heard.messages


def test_frozen_experts_give_no_warning(heard: pytest.LogCaptureFixture) -> None:
    lessons(make().requires_grad_(False))
    assert not heard.messages


@pytest.mark.parametrize(("layer", "warns"), [(1, False), (2, True)])
def test_a_lora_warns_where_it_would_learn_nothing(heard: pytest.LogCaptureFixture, layer: int, warns: bool) -> None:
    parameter = f"language_model.layers.{layer}.mlp.banks.image.experts.down_proj"
    lessons(get_peft_model(make(), LoraConfig(target_parameters=[parameter])))
    assert [f"['image'] of layer {layer}" in message for message in heard.messages] == [True] * warns
