"""Loss terms of a whole model: padding, caches, packing and the way a step is cut up change none of them."""

from typing import Any

import pytest
import torch
from torch import Tensor

from chorus_moe import ChorusForConditionalGeneration
from chorus_moe.modeling.losses import BALANCE_LOSSES, mean_over_banks, share_of_batch
from chorus_moe.modeling.modeling_outputs import BankRouting
from tests.conftest import tiny_batch, tiny_config


def balanced_by(kind: str, **text: Any) -> ChorusForConditionalGeneration:
    """A tiny model whose banks all have one balance."""
    torch.manual_seed(0)
    banks = {name: {"balance": kind} for name in ("text", "image", "audio", "common")}
    return ChorusForConditionalGeneration(tiny_config(expert_banks=banks, **text))


@pytest.mark.parametrize("padding", [1, 50])
@pytest.mark.parametrize("kind", BALANCE_LOSSES)
def test_padding_changes_no_loss_term(kind: str, padding: int):
    model = balanced_by(kind)
    text = model.config.text_config
    text.router_z_loss_coef = text.alignment_loss_coef = 0.1
    batch = tiny_batch(model.config)
    rows = ("input_ids", "attention_mask", "mm_token_type_ids")
    longer = dict(batch)
    for name in (*rows, "labels"):
        fill = batch[name].new_full((3, padding), -100 if name == "labels" else 0)
        longer[name] = torch.cat([batch[name], fill], dim=1)
    model.train()
    with torch.no_grad():
        first, second = model(**batch), model(**longer)
    for name in ("loss", "aux_loss", "z_loss", "alignment_loss"):
        # float32 sums in another order: worst difference seen over four seeds is 4.8e-7 at losses of size 5.
        torch.testing.assert_close(getattr(first, name), getattr(second, name), rtol=0, atol=5e-6)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("kind", BALANCE_LOSSES)
def test_a_cached_step_reports_the_balance_of_its_own_tokens(kind: str, size: int):
    model = balanced_by(kind).eval()
    input_ids = torch.randint(5, 128, (size, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(input_ids)
    with torch.no_grad():
        first = model(input_ids=input_ids[:, :7], use_cache=True)
        step = model(
            input_ids=input_ids[:, 7:],
            attention_mask=mask,
            past_key_values=first.past_key_values,
            output_router_logits=True,
        )
        whole = model(input_ids=input_ids, output_router_logits=True)
    expected = []
    for layer in whole.routing:
        last = {}
        for name, bank in layer.items():
            rows = slice(7, None, 8) if len(bank.router_logits) else slice(0)
            last[name] = BankRouting(*(None if part is None else part[rows] for part in bank))
        expected.append(last)
    # float32 sums in another order (cached keys), at losses of size 1.
    torch.testing.assert_close(step.aux_loss, mean_over_banks(expected, BALANCE_LOSSES[kind]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", BALANCE_LOSSES)
def test_packed_sequences_have_the_balance_of_a_batch(kind: str):
    model = balanced_by(kind).eval()
    input_ids = torch.randint(5, 128, (2, 10), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        apart = model(input_ids=input_ids, output_router_logits=True)
        packed = model(
            input_ids=input_ids.view(1, 20),
            position_ids=torch.arange(10).repeat(2)[None],
            output_router_logits=True,
        )
    # float32 sums in another order, at losses of size 1.
    torch.testing.assert_close(packed.aux_loss, apart.aux_loss, rtol=0, atol=1e-5)


def test_the_share_of_a_micro_batch_is_its_part_of_the_labels():
    labels = torch.tensor([[5, 5, -100, 5], [-100, -100, 5, 5]])
    assert share_of_batch(labels, torch.tensor(8)).item() == 0.5
    assert share_of_batch(labels, None) == 1.0
    assert share_of_batch(labels, 0).item() == 4


def eight_texts() -> dict[str, Tensor]:
    input_ids = torch.randint(5, 128, (8, 12), generator=torch.Generator().manual_seed(3))
    return {"input_ids": input_ids, "labels": input_ids.clone()}


def accumulated(size: int, **coefficients: float) -> dict[str, Tensor]:
    """Gradients of one step over eight texts in micro-batches of `size`, as the Trainer accumulates them."""
    torch.manual_seed(0)
    model = ChorusForConditionalGeneration(tiny_config(**coefficients)).train()
    batch = eight_texts()
    num_items = (batch["labels"][:, 1:] != -100).sum()
    for start in range(0, 8, size):
        part = {name: value[start : start + size] for name, value in batch.items()}
        model(**part, num_items_in_batch=num_items).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("size", [4, 2, 1])
def test_linear_terms_give_the_same_gradient_at_any_number_of_accumulation_steps(size: int):
    options = {"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.1}
    whole, parts = accumulated(8, **options), accumulated(size, **options)
    for name, gradient in whole.items():
        # float32 sums in another order: one micro-batch or several, at gradients of size 0.1.
        torch.testing.assert_close(parts[name], gradient, rtol=1e-4, atol=2e-6, msg=name)


@pytest.mark.parametrize("size", [8, 4, 2, 1])
@pytest.mark.parametrize("kind", BALANCE_LOSSES)
def test_the_balance_loss_of_a_step_is_the_weighted_mean_over_its_micro_batches(kind: str, size: int):
    # The balance loss is a product of two means, so it is not linear in the batch: cut into micro-batches, a step
    # minimises the mean of their losses, weighted by their labels. Its weight does not grow with their number.
    model = balanced_by(kind, router_aux_loss_coef=1.0).train()
    batch = eight_texts()
    num_items = (batch["labels"][:, 1:] != -100).sum()
    total = mean = 0.0
    with torch.no_grad():
        for start in range(0, 8, size):
            part = {name: value[start : start + size] for name, value in batch.items()}
            output = model(**part, num_items_in_batch=num_items)
            model.config.text_config.router_aux_loss_coef = 0.0
            plain = model(**part, num_items_in_batch=num_items)
            model.config.text_config.router_aux_loss_coef = 1.0
            total += float(output.loss - plain.loss)
            mean += float(output.aux_loss) * size / 8
    assert total == pytest.approx(mean, abs=1e-5)
    low = 1.0 if kind == "switch" else 0.0
    assert low < total < low + 0.5
