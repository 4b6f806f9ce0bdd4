"""Experts behind which nobody reads image and audio positions: they get no gradient, and the user is told once."""

import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from chorus_moe import ChorusForConditionalGeneration
from chorus_moe.modeling import modeling_generation
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
    modeling_generation.logger.warning_once.__func__.cache_clear()
    return caplog


def test_labels_of_an_answer_do_not_reach_the_media_banks_of_the_last_layer() -> None:
    last = expert_gradients(make(), 2)
    assert (last["image"], last["audio"]) == (0, 0)
    assert min(last["text"], last["common"]) > 0
    assert min(expert_gradients(make(), 1).values()) > 0


def test_training_warns_once_and_names_banks_and_layer(heard: pytest.LogCaptureFixture) -> None:
    model = make()
    model.train()
    model.eval()
    model.train()
    (record,) = heard.records
    assert record.levelno == logging.WARNING
    assert "expert banks ['audio', 'image'] of layer 2: no later layer reads" in record.getMessage()


def test_inference_never_warns(heard: pytest.LogCaptureFixture) -> None:
    model = make().eval()
    model(**tiny_batch(model.config))
    batch = {name: value for name, value in tiny_batch(model.config).items() if name != "labels"}
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
    make(**text).train()
    assert not heard.messages


def test_frozen_experts_give_no_warning(heard: pytest.LogCaptureFixture) -> None:
    make().requires_grad_(False).train()
    assert not heard.messages


@pytest.mark.parametrize(("layer", "warns"), [(1, False), (2, True)])
def test_a_lora_warns_where_it_would_learn_nothing(heard: pytest.LogCaptureFixture, layer: int, warns: bool) -> None:
    parameter = f"language_model.layers.{layer}.mlp.banks.image.experts.down_proj"
    adapted: nn.Module = get_peft_model(make(), LoraConfig(target_parameters=[parameter]))
    adapted.train()
    assert [f"['image'] of layer {layer}" in message for message in heard.messages] == [True] * warns
