"""Banks with another number of experts in each layer, through the whole model."""

from pathlib import Path

import pytest
import torch

from chorus_moe import ChorusConfig, ChorusForConditionalGeneration
from chorus_moe.modeling.moe_banks import ExpertBank
from chorus_moe.surgery import parameter_report
from tests.conftest import tiny_batch, tiny_config

BANKS = {
    "text": {"num_experts": [3, 6]},
    "image": {"layers": [2], "num_experts": [5], "router": "attention"},
    "audio": {"num_experts": [2, 7], "router": "sigmoid"},
    "common": {},
}
COUNTS = {1: {"audio": 2, "common": 4, "text": 3}, 2: {"audio": 7, "common": 4, "image": 5, "text": 6}}


@pytest.fixture
def config() -> ChorusConfig:
    return tiny_config(expert_banks=BANKS)


def banks_of(model: ChorusForConditionalGeneration) -> dict[int, dict[str, ExpertBank]]:
    layers = model.model.language_model.layers
    return {index: dict(layers[index].mlp.banks.items()) for index in COUNTS}


def test_every_layer_is_built_with_its_own_counts(model: ChorusForConditionalGeneration) -> None:
    found = {i: {name: len(bank.experts.gate_up_proj) for name, bank in b.items()} for i, b in banks_of(model).items()}
    assert found == COUNTS


def test_every_expert_of_every_layer_gets_a_gradient_when_all_are_visited(
    model: ChorusForConditionalGeneration,
) -> None:
    for layer in banks_of(model).values():
        for bank in layer.values():
            bank.router.top_k = bank.num_experts
    batch = tiny_batch(model.config)
    output = model.train()(**batch)
    output.loss.backward()
    assert output.aux_loss > 0
    for layer, banks in banks_of(model).items():
        for name, bank in banks.items():
            # What audio positions make of the last layer is read by nobody, whatever its number of experts.
            if (layer, name) != (2, "audio") and (layer, name) != (2, "image"):
                assert (bank.experts.down_proj.grad.abs().amax(dim=(1, 2)) > 0).all(), (layer, name)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_all_ways_to_run_experts_agree(model: ChorusForConditionalGeneration, implementation: str) -> None:
    batch = tiny_batch(model.config)
    with torch.no_grad():
        expected = model(**batch).logits
        model.set_experts_implementation(implementation)
        # Float32 sums in another order, at logits below 1.
        torch.testing.assert_close(model(**batch).logits, expected, rtol=0, atol=1e-5)


def test_generation_with_a_cache_writes_the_text_of_generation_without(model: ChorusForConditionalGeneration) -> None:
    prompt = {"input_ids": torch.tensor([[5, 6, 7, 8]])}
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(**prompt, **options), model.generate(**prompt, **options, use_cache=False))


def test_saved_is_loaded_bit_for_bit(model: ChorusForConditionalGeneration, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    loaded = ChorusForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert loaded.config.text_config.expert_banks["text"]["num_experts"] == [3, 6]
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True)
    )


def test_the_report_equals_the_counted_parameters(config: ChorusConfig, model: ChorusForConditionalGeneration) -> None:
    report = parameter_report(config)
    expert, width, inner, top_k = 3 * 64 * 32, 64, 64, 2
    assert report.total == sum(parameter.numel() for parameter in model.parameters())
    assert report.banks["text"] == {
        "total": (3 + 6) * (expert + width),
        "active": 2 * top_k * expert + (3 + 6) * width,
    }
    assert report.banks["image"]["total"] == 5 * expert + inner * width + 2 * 5 * inner + 2 * (2 * inner * inner)


def test_the_balance_bias_of_every_layer_has_its_length(model: ChorusForConditionalGeneration) -> None:
    biases = {i: len(banks["audio"].router.e_score_correction_bias) for i, banks in banks_of(model).items()}
    assert biases == {1: 2, 2: 7}
