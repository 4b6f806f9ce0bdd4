"""Scores of units and layers against sums by hand, and a model that is left as it was."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerFast

from chorus_moe import ChorusProcessor
from chorus_moe.surgery import freeze, prune_dense
from chorus_moe.training.collator import ChorusDataCollator
from chorus_moe.training.compression.importance import measure_importance
from tests.training.conftest import make_model, make_rows


@pytest.fixture
def batches(processor: ChorusProcessor) -> list[dict[str, Any]]:
    return [dict(ChorusDataCollator(processor)(make_rows(6)[start : start + 3])) for start in (0, 3)]


def test_a_unit_is_worth_its_weights_times_their_gradients(
    tokenizer: PreTrainedTokenizerFast, batches: list[dict[str, Any]]
) -> None:
    model = make_model(tokenizer).eval()
    found = measure_importance(model, batches)
    expected_unit = expected_head = expected_neuron = 0.0
    for batch in batches:
        model.zero_grad()
        model(**batch).loss.backward()
        layers = model.model.language_model.layers
        products = {name: p.detach() * p.grad for name, p in layers.named_parameters() if p.grad is not None}
        up, down = products["1.mlp.banks.common.experts.gate_up_proj"], products["1.mlp.banks.common.experts.down_proj"]
        # Of expert 2, unit 5; gate and up stand one after the other.
        expected_unit += (up[2, 5].sum() + up[2, 32 + 5].sum() + down[2, :, 5].sum()).abs().item()
        attention = {name: products[f"0.self_attn.{name}.weight"] for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
        head = attention["q_proj"][32:].sum() + attention["o_proj"][:, 32:].sum()
        expected_head += (head + attention["k_proj"][16:].sum() + attention["v_proj"][16:].sum()).abs().item()
        block = dict(model.model.vision_tower.timm_model.blocks[0].mlp.named_parameters())
        grads = {name: parameter.detach() * parameter.grad for name, parameter in block.items()}
        neuron = grads["fc1.weight"][7].sum() + grads["fc1.bias"][7] + grads["fc2.weight"][:, 7].sum()
        expected_neuron += neuron.abs().item()
    assert found["experts:common"]["1.mlp.banks.common.experts"][2, 5].item() == pytest.approx(expected_unit, rel=1e-4)
    assert found["heads"]["0"][1].item() == pytest.approx(expected_head, rel=1e-4)
    score = found["vision_tower.feed_forward"]["timm_model.blocks.0.mlp"][7]
    assert score.item() == pytest.approx(expected_neuron, rel=1e-4)


def test_a_layer_is_worth_how_much_it_turns_what_passes_through(
    tokenizer: PreTrainedTokenizerFast, batches: list[dict[str, Any]]
) -> None:
    model = make_model(tokenizer).eval()
    found = measure_importance(model, batches)["layers"][""]
    turned = []
    for batch in batches:
        is_real = batch["attention_mask"].bool()
        states = model(**batch, output_hidden_states=True).hidden_states[:3]
        turned.append(1 - F.cosine_similarity(states[0].double(), states[1].double(), dim=-1)[is_real])
    assert found[0].item() == pytest.approx(torch.cat(turned).mean().item(), rel=1e-5)
    assert found.shape == (3,) and bool((found > 0).all())


def test_what_is_worth_nothing_goes_first(tokenizer: PreTrainedTokenizerFast, batches: list[dict[str, Any]]) -> None:
    model = make_model(tokenizer).eval()
    with torch.no_grad():
        model.model.language_model.layers[0].mlp.down_proj.weight[:, 10:70] = 0
        model.model.language_model.layers[0].mlp.gate_proj.weight[10:70] *= 100
    before = model(**batches[0]).logits
    # By magnitude these units would be the best of all.
    prune_dense(model, {"feed_forward": 36}, measure_importance(model, batches))
    torch.testing.assert_close(model(**batches[0]).logits, before, rtol=0, atol=1e-5)


def test_weights_gradients_and_mode_stay(tokenizer: PreTrainedTokenizerFast, batches: list[dict[str, Any]]) -> None:
    model = make_model(tokenizer).train()
    freeze(model, "towers")
    model(**batches[0]).loss.backward()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    grads = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    measure_importance(model, batches)
    assert model.training and flags == {name: p.requires_grad for name, p in model.named_parameters()}
    assert all(tensor.equal(state[name]) for name, tensor in model.state_dict().items())
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (grads[name] is None), name
        assert parameter.grad is None or parameter.grad.equal(grads[name]), name


def test_no_batches_and_broken_losses_are_refused(
    tokenizer: PreTrainedTokenizerFast, batches: list[dict[str, Any]]
) -> None:
    model = make_model(tokenizer)
    with pytest.raises(ValueError, match="there are no batches"):
        measure_importance(model, [])
    with torch.no_grad():
        model.lm_head.weight[0] = torch.nan
    with pytest.raises(ValueError, match="the loss of batch 0 is nan"):
        measure_importance(model, batches)
    assert model.training
