"""The correction bias: one fixed step from integer counts, float32 for ever, nothing moved by evaluation."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from chorus_moe import ChorusForConditionalGeneration, ChorusForContrastive, ChorusTextConfig
from chorus_moe.modeling import modeling_heads as modeling_head
from chorus_moe.modeling.moe_routers import SigmoidRouter
from chorus_moe.training.routing.balance import balance_counts, biased_routers, update_balance_bias
from tests.conftest import tiny_batch, tiny_config


def router(**bank: Any) -> SigmoidRouter:
    sizes = {"vocab_size": 32, "hidden_size": 16, "num_attention_heads": 2, "num_experts": 4}
    config = ChorusTextConfig(**sizes, expert_banks={"common": {"router": "sigmoid", **bank}})
    module = SigmoidRouter(16, config.banks[0])
    torch.nn.init.normal_(module.weight, generator=torch.Generator().manual_seed(0))
    return module


def biased(**text: Any) -> ChorusForConditionalGeneration:
    torch.manual_seed(0)
    banks = {"text": {"router": "sigmoid"}, "common": {"balance": "bias", "adaptive_experts": True}, "image": {}}
    return ChorusForConditionalGeneration(tiny_config(expert_banks=banks, **text))


def test_a_step_moves_each_bias_by_the_rate_and_recentres():
    module = router(bias_update_rate=0.25)
    update_balance_bias(module, torch.tensor([6, 2, 0, 0]))
    # Mean 2: down, still, up, up; minus their mean of a quarter of the rate.
    assert module.e_score_correction_bias.tolist() == [-0.3125, -0.0625, 0.1875, 0.1875]


@pytest.mark.parametrize("frozen", [False, True])
def test_no_counts_and_a_frozen_router_move_no_bit(frozen: bool):
    module = router()
    bias = torch.randn(4)
    module.e_score_correction_bias.copy_(bias)
    module.requires_grad_(not frozen)
    update_balance_bias(module, torch.tensor([9, 0, 0, 0]) * frozen)
    assert torch.equal(module.e_score_correction_bias, bias)


def test_sums_of_counts_that_float32_cannot_hold_are_told_apart():
    module = router()
    update_balance_bias(module, torch.tensor([2**40 + 1, 2**40, 2**40, 2**40 - 1]))
    assert module.e_score_correction_bias.sign().tolist() == [-1, 0, 0, 1]


def test_a_router_without_a_bias_is_refused():
    with pytest.raises(ValueError, match="expert bank 'common' has balance='none', so its router has no bias"):
        update_balance_bias(router(balance="none"), torch.ones(4, dtype=torch.long))


def test_counts_of_another_bank_are_refused():
    with pytest.raises(ValueError, match=r"\(5,\) counts for 4 experts"):
        update_balance_bias(router(), torch.ones(5, dtype=torch.long))


def test_repeated_steps_balance_a_collapsed_router():
    module = router(bias_update_rate=0.005, num_experts_per_tok=1)
    hidden = torch.randn(500, 16, generator=torch.Generator().manual_seed(0)) + 0.5 * module.weight[2].detach()
    counts = []
    for _ in range(300):
        counts.append(torch.bincount(module(hidden).selected_experts.flatten(), minlength=4))
        update_balance_bias(module, counts[-1])
    assert counts[0].max() > 300
    # Balance is 125 a piece; a fixed step goes on swinging around it.
    assert counts[-1].max() < 150


def test_counts_are_those_of_real_tokens_without_unused_slots():
    model = biased().train()
    batch = tiny_batch(model.config)
    counts = balance_counts(model(**batch).routing, model.config.text_config.sparse_layers)
    assert list(counts) == [1, 2]
    real, kinds = batch["attention_mask"].bool(), batch["mm_token_type_ids"]
    for layer in counts.values():
        assert layer["text"].dtype == torch.int64
        assert layer["text"].sum() == 2 * (real & (kinds == 0)).sum()
        assert layer["image"].sum() == 2 * (real & (kinds == 1)).sum()
        assert real.sum() <= layer["common"].sum() <= 2 * real.sum()


def test_the_routing_of_a_biased_bank_is_returned_in_training_without_any_loss():
    model = biased(router_aux_loss_coef=0.0).train()
    output = model(**tiny_batch(model.config))
    assert output.aux_loss is None
    assert len(output.routing) == 2
    assert model.eval()(**tiny_batch(model.config)).routing is None


def test_a_bank_with_a_loss_alone_keeps_its_routing_to_itself():
    torch.manual_seed(0)
    model = ChorusForConditionalGeneration(tiny_config()).train()
    output = model(**tiny_batch(model.config))
    assert output.routing is None
    assert output.aux_loss is not None


def test_the_contrastive_head_counts_the_choices_of_all_its_runs():
    torch.manual_seed(0)
    config = tiny_config(expert_banks={"common": {"balance": "bias"}})
    model = ChorusForContrastive(config).train()
    ids = torch.randint(5, 128, (2, 6), generator=torch.Generator().manual_seed(0))
    output = model(input_ids=ids, pixel_values=torch.randn(2, 3, 32, 32))
    counts = balance_counts(output.routing, config.text_config.sparse_layers)
    # Two texts of six tokens and two images of four, two experts each.
    assert [int(layer["common"].sum()) for layer in counts.values()] == [40, 40]
    assert model.eval()(input_ids=ids, pixel_values=torch.randn(2, 3, 32, 32)).routing is None


def test_counts_of_another_number_of_layers_are_refused():
    with pytest.raises(ValueError, match="routing of 0 layers for 2 sparse layers"):
        balance_counts((), [1, 2])


def test_the_routers_with_a_bias_are_found_by_layer_and_bank():
    found = biased_routers(biased())
    assert {layer: sorted(banks) for layer, banks in found.items()} == {1: ["common", "text"], 2: ["common", "text"]}


def shift(model: ChorusForConditionalGeneration) -> dict[str, torch.Tensor]:
    """Give each bias values that bfloat16 cannot hold, and return them by name."""
    biases = {name: buffer for name, buffer in model.named_buffers() if "e_score" in name}
    for buffer in biases.values():
        buffer.copy_(torch.randn(buffer.shape) * 1e-3 + 1.0)
    return {name: buffer.clone() for name, buffer in biases.items()}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_saving_and_loading_keeps_every_bit_of_the_bias(tmp_path: Path, dtype: torch.dtype | None):
    model = biased()
    expected = shift(model)
    if dtype is not None:
        model.to(dtype)
    model.save_pretrained(tmp_path)
    loaded = ChorusForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype or torch.float32)
    assert len(expected) == 4
    for name, bias in expected.items():
        assert torch.equal(loaded.get_buffer(name), bias), name
    assert {p.dtype for p in loaded.model.language_model.parameters()} == {dtype or torch.float32}


def test_neither_a_forward_nor_an_optimizer_moves_the_bias():
    model = biased().train()
    expected = shift(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(**tiny_batch(model.config)).loss.backward()
    optimizer.step()
    model.eval()(**tiny_batch(model.config))
    assert all(torch.equal(model.get_buffer(name), bias) for name, bias in expected.items())


def test_a_bias_that_nobody_moves_is_warned_of_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    modeling_head.logger.warning_once.__func__.cache_clear()

    def warnings(model: ChorusForConditionalGeneration) -> int:
        model(input_ids=torch.tensor([[5, 6, 7]]))
        return sum("update_balance_bias" in record.getMessage() for record in caplog.records)

    model = biased()
    assert warnings(model.eval()) == 0
    assert warnings(model.train().requires_grad_(False)) == 0
    observer = model.requires_grad_(True).model.language_model.register_forward_hook(lambda *_: None)
    assert warnings(model) == 0
    observer.remove()
    assert warnings(model) == 1
    assert warnings(model) == 1
