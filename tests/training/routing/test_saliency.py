"""Use and saliency of experts, against a count by hand."""

from typing import Any

import pytest
import torch

from chorus_moe import ChorusForConditionalGeneration, ChorusProcessor
from chorus_moe.modeling.moe_banks import ExpertBank
from chorus_moe.surgery import prune_experts
from chorus_moe.training.routing.report import count_rows
from chorus_moe.training.routing.saliency import SaliencyObserver, expert_saliency
from tests.conftest import tiny_batch, tiny_config

Rows = list[dict[str, Any]]


@pytest.mark.parametrize("depth", [1, 2])
def test_saliency_is_the_mean_weighted_norm_of_what_an_expert_adds(depth: int) -> None:
    """What the bank adds when all weights but one expert's are zero, token by token, gives the same numbers."""
    torch.manual_seed(0)
    banks = {"text": {}, "image": {}, "audio": {}, "common": {"expert_depth": depth}}
    model = ChorusForConditionalGeneration(tiny_config(expert_banks=banks)).eval()
    batch = {**tiny_batch(model.config), "attention_mask": None}
    bank, added = model.model.language_model.layers[1].mlp.banks["common"], []
    handle = bank.register_forward_hook(lambda _, inputs, outputs: added.append(outputs[0] - inputs[0]))
    with torch.no_grad():
        with SaliencyObserver(model) as observer:
            model(**batch)
        for stack in bank.stacks:
            stack.down_proj.data[[0, 1, 3]] = 0.0
        added.clear()
        model(**batch)
    handle.remove()
    expected = added[0].norm(dim=-1).sum()
    # The hook subtracts two float32 streams of size 1.
    assert observer.norms[1]["common"][2] == pytest.approx(expected.item(), rel=1e-3)


def test_uses_are_the_counts_of_routing_and_padding_counts_in_neither(
    model: ChorusForConditionalGeneration, processor: ChorusProcessor, rows: Rows
) -> None:
    alone, together = (expert_saliency(model, processor, rows, batch_size=size) for size in (1, len(rows)))
    counters = count_rows(model, processor, rows)
    for layer, banks in counters.banks.items():
        for name, bank in banks.items():
            assert torch.equal(together.uses[layer][name], bank.choices_ME.sum(dim=0))
            # Batch mates change the last bits of a product.
            torch.testing.assert_close(alone.saliency[layer][name], together.saliency[layer][name], rtol=1e-4, atol=0)


def test_an_expert_that_nothing_chose_has_no_saliency_and_goes_first(
    model: ChorusForConditionalGeneration, processor: ChorusProcessor, rows: Rows
) -> None:
    for layer in (1, 2):
        weight = model.model.language_model.layers[layer].mlp.banks["common"].router.weight.data
        weight[[1, 2]] = weight[0].clone()
    found = expert_saliency(model, processor, rows)
    assert found.uses[1]["common"][2] == 0 and found.saliency[1]["common"][2] == 0
    report = prune_experts(model, {"common": 3}, found.saliency)
    assert sum("common" in note and "had 0.0% of the scores" in note for note in report.notes) == 2


def test_nothing_is_left_of_the_observer(
    model: ChorusForConditionalGeneration, processor: ChorusProcessor, rows: Rows
) -> None:
    expert_saliency(model, processor, rows[:1])
    assert not any(module._forward_hooks for module in model.modules() if isinstance(module, ExpertBank))
