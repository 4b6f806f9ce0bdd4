"""What else `generate` takes: drafts of an assistant, and embeddings in the place of ids."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from chorus_moe import ChorusForConditionalGeneration
from tests.conftest import tiny_batch, tiny_config

Inputs = dict[str, Tensor]
# Sample of `tiny_batch` -> which of the images and clips are its own.
SAMPLES = {"image": (0, slice(0, 1), slice(0, 0)), "sound": (1, slice(0, 0), slice(0, 1))}
SAMPLES["padding, image and sound"] = (2, slice(1, 2), slice(1, 2))


def make(seed: int = 0, **text: Any) -> ChorusForConditionalGeneration:
    torch.manual_seed(seed)
    model = ChorusForConditionalGeneration(tiny_config(cross_modal_layers=[1], **text)).eval()
    model.generation_config.eos_token_id = None
    return model


def one(name: str) -> Inputs:
    """The inputs of one sample."""
    row, images, clips = SAMPLES[name]
    batch = tiny_batch(tiny_config())
    inputs = {key: batch[key][row : row + 1] for key in ("input_ids", "attention_mask", "mm_token_type_ids")}
    if images.stop > images.start:
        inputs["pixel_values"] = batch["pixel_values"][images]
    if clips.stop > clips.start:
        inputs |= {key: batch[key][clips] for key in ("input_features", "input_features_mask")}
    return inputs


def generate(model: ChorusForConditionalGeneration, inputs: Inputs, **options: Any) -> Tensor:
    return model.generate(**inputs, max_new_tokens=8, do_sample=False, **options)


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("seed", [0, 1], ids=["itself", "another"])
def test_drafts_of_an_assistant_change_nothing(name: str, seed: int):
    model, inputs = make(), one(name)
    assert torch.equal(generate(model, inputs, assistant_model=make(seed)), generate(model, inputs))


@pytest.mark.parametrize("name", SAMPLES)
def test_an_assistant_sees_the_media(name: str):
    """The model itself as its assistant drafts what it will say: every draft is taken, in one forward each."""
    model, assistant, calls = make(), make(), []
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.num_assistant_tokens = 3
    assistant.generation_config.assistant_confidence_threshold = 0.0
    model.register_forward_hook(lambda *_: calls.append(1))
    generate(model, one(name), assistant_model=assistant)
    assert len(calls) == 2  # 3 + 1 words, and 3 + 1 words


def test_an_assistant_of_text_takes_part_where_there_are_media():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    assistant = LlamaForCausalLM(LlamaConfig(vocab_size=128, eos_token_id=None, **sizes)).eval()
    model, inputs = make(), one("image")
    words = {"input_ids": torch.tensor([[5, 6, 7, 8]])}
    for given in (inputs, words):
        assert torch.equal(generate(model, given, assistant_model=assistant), generate(model, given))


def test_an_assistant_of_another_width_is_refused_with_media():
    model = make()
    assistant = make(hidden_size=32)
    words = {"input_ids": torch.tensor([[5, 6, 7, 8]])}
    assert torch.equal(generate(model, words, assistant_model=assistant), generate(model, words))
    with pytest.raises(ValueError, match="assistant_model has hidden_size=32 and this model 64"):
        generate(model, one("image"), assistant_model=assistant)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}], ids=str)
@pytest.mark.parametrize("with_ids", [False, True])
def test_embeddings_answer_as_their_ids(options: dict[str, Any], with_ids: bool):
    model, inputs = make(), tiny_batch(tiny_config())
    del inputs["labels"]
    expected = generate(model, inputs, **options)
    ids = inputs.pop("input_ids")
    embeddings = model.get_input_embeddings()(ids)
    given = inputs | {"inputs_embeds": embeddings} | ({"input_ids": ids} if with_ids else {})
    found = generate(model, given, **options)
    assert torch.equal(found, expected if with_ids else expected[:, ids.shape[1] :])
