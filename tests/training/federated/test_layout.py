"""Which tensors are trained, and the hash of all others."""

import pytest
import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from chorus_moe.surgery import freeze, unfreeze
from chorus_moe.training.federated.layout import base_of, freeze_lora_a, layout_of, write_weights
from chorus_moe.training.federated.updates import Refused
from tests.training.conftest import make_model

BIASED = {"text": {"router": "sigmoid", "balance": "bias"}, "image": {"layers": [1]}, "audio": {}, "common": {}}


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerFast) -> nn.Module:
    model = make_model(tokenizer, expert_banks=BIASED)
    freeze(model, "all")
    unfreeze(model, "text", "audio_connector")
    return model


def test_tensors_know_their_bank_their_experts_and_their_modality(model: nn.Module) -> None:
    layout = layout_of(model)
    experts = layout["model.language_model.layers.1.mlp.banks.text.experts.gate_up_proj"]
    assert experts.place == (1, "text") and experts.experts == experts.shape[0] > 1
    router = layout["model.language_model.layers.1.mlp.banks.text.router.weight"]
    assert router.place == (1, "text") and router.experts == 1
    # It moves beside the router's weight, so it is joined as well.
    assert "model.language_model.layers.1.mlp.banks.text.router.e_score_correction_bias" in layout
    assert {found.modality for found in layout.values()} == {None, "audio"}
    assert not any(".banks.image." in name for name in layout)


def test_the_hash_is_of_what_is_not_trained(model: nn.Module) -> None:
    names, parameters = layout_of(model), dict(model.named_parameters())
    before = base_of(model, names)
    with torch.no_grad():
        parameters["model.language_model.layers.1.mlp.banks.text.router.weight"].add_(1)
    assert base_of(model, names) == before
    with torch.no_grad():
        parameters["model.language_model.norm.weight"].add_(1)
    assert base_of(model, names) != before


def test_a_tied_weight_is_trained_under_both_names(tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_model(tokenizer)
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = True
    model.lm_head.weight = model.model.language_model.embed_tokens.weight
    freeze(model, "all")
    unfreeze(model, "embeddings")
    names = layout_of(model)
    before = base_of(model, names)
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    assert len(names) == 1 and base_of(model, names) == before


def test_another_alpha_is_another_base(tokenizer: PreTrainedTokenizerFast) -> None:
    from peft import get_peft_model

    from chorus_moe.training.lora import lora_config

    hashes = set()
    for alpha in (2, 4):
        model = make_model(tokenizer)
        adapter = get_peft_model(model, lora_config(model, banks=["text"], r=2, lora_alpha=alpha, verbose=False))
        names = layout_of(adapter)
        hashes.add(base_of(adapter, names))
        freeze_lora_a(adapter)
        assert {name for name in names if ".lora_B." in name} == set(layout_of(adapter))
    assert len(hashes) == 2


def test_weights_that_do_not_fit_change_nothing(model: nn.Module) -> None:
    name = "model.language_model.norm.weight"
    before = model.state_dict()[name].clone()
    with pytest.raises(Refused, match=r"other has shape \(2,\) at the server and None here"):
        write_weights(model, {name: before + 1, "other": torch.zeros(2)})
    assert torch.equal(model.state_dict()[name], before)
