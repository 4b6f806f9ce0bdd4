"""A decoder left at an exit is a model cut off there; exits learn by a loss of their own."""

from typing import Any

import pytest
import torch
from torch import Tensor

from chorus_moe import ChorusForConditionalGeneration
from chorus_moe.training.releases import CHECKPOINTING
from tests.conftest import tiny_config
from tests.modeling.conftest import make_model


def test_an_exit_of_the_decoder_equals_a_model_cut_off_there():
    model = make_model()
    ids = torch.tensor([[5, 6, 7, 8]])
    decoder = model.model.language_model
    with torch.no_grad():
        left = decoder(input_ids=ids, exit_layer=2).last_hidden_state
        whole = decoder(input_ids=ids, output_hidden_states=True)
        torch.testing.assert_close(left, decoder.norm(whole.hidden_states[2]), rtol=0, atol=0)
        with pytest.raises(ValueError, match="exit_layer=4 is outside"):
            decoder(input_ids=ids, exit_layer=4)


def with_exits(**text: Any) -> ChorusForConditionalGeneration:
    torch.manual_seed(0)
    return ChorusForConditionalGeneration(tiny_config(router_aux_loss_coef=0.0, **text)).train()


def test_the_loss_at_the_exits_is_the_language_loss_there(batch: dict[str, Tensor]):
    model = with_exits(exit_layers=[1, 2], exit_loss_coef=0.5)
    outputs = model(**batch)
    with torch.no_grad():
        states = [model.model(**without_labels(batch), exit_layer=layers).last_hidden_state for layers in (1, 2)]
        losses = [model.loss_function(model.lm_head(state), batch["labels"], vocab_size=128) for state in states]
    assert outputs.exit_loss.item() == pytest.approx(sum(losses).item() / 2, rel=1e-6)
    plain = with_exits()(**batch).loss
    assert outputs.loss.item() == pytest.approx(plain.item() + 0.5 * outputs.exit_loss.item(), rel=1e-6)
    assert outputs.hidden_states is None


def without_labels(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in batch.items() if name != "labels"}


def test_the_loss_at_the_exits_is_one_of_training_alone(batch: dict[str, Tensor]):
    model = with_exits(exit_layers=[1], exit_loss_coef=0.5).eval()
    plain = with_exits().eval()
    with torch.no_grad():
        found, expected = model(**batch), plain(**batch)
    assert found.exit_loss is None
    assert torch.equal(found.loss, expected.loss)


def test_accumulation_changes_no_gradient_of_the_exits(batch: dict[str, Tensor]):
    model = with_exits(exit_layers=[1, 2], exit_loss_coef=1.0, mlp_layer_types=["dense"] * 3)
    ids = batch["input_ids"].clamp(min=5)
    rows = {"input_ids": ids, "labels": ids}
    total = rows["labels"][:, 1:].numel()
    gradients = []
    for pieces in ([slice(0, 3)], [slice(0, 1), slice(1, 3)]):
        model.zero_grad()
        for piece in pieces:
            model(**{name: value[piece] for name, value in rows.items()}, num_items_in_batch=total).loss.backward()
        gradients.append(model.model.language_model.layers[0].mlp.up_proj.weight.grad.clone())
    # float32 sums in another order, at gradients up to 0.1.
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-6)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_changes_no_gradient_of_the_exits(use_reentrant: bool, batch: dict[str, Tensor]):
    options = {"exit_layers": [1], "exit_loss_coef": 1.0}
    plain, checkpointed = with_exits(**options), with_exits(**options)
    getattr(checkpointed, f"{CHECKPOINTING}_enable")({"use_reentrant": use_reentrant})
    gradients = []
    for model in (plain, checkpointed):
        model(**batch).exit_loss.backward()
        gradients.append(model.model.language_model.layers[0].mlp.up_proj.weight.grad)
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-7)
