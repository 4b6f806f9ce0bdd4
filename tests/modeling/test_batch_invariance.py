"""A sample's logits do not depend on its batch mates, on padding, or on which side it is padded."""

import pytest
import torch
from torch import Tensor

from chorus_moe import ChorusForConditionalGeneration
from tests.conftest import tiny_batch, tiny_config

# float32 sums in another order: worst difference seen over four seeds is 2.1e-7.
ATOL = 2e-6
ROWS = ("input_ids", "attention_mask", "mm_token_type_ids")


def alone(batch: dict[str, Tensor], sample: int) -> dict[str, Tensor]:
    """One sample of `tiny_batch` with its own image or clip and without its padding."""
    images, clips = {0: ([0], []), 1: ([], [0]), 2: ([1], [1])}[sample]
    real = batch["attention_mask"][sample].bool()
    single = {name: batch[name][sample : sample + 1, real] for name in ROWS}
    if images:
        single["pixel_values"] = batch["pixel_values"][images]
    if clips:
        frames = int(batch["input_features_mask"][clips[0]].sum())
        single["input_features"] = batch["input_features"][clips, :frames]
        single["input_features_mask"] = batch["input_features_mask"][clips, :frames]
    return single


def real_logits(model: ChorusForConditionalGeneration, batch: dict[str, Tensor], sample: int = 0) -> Tensor:
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        return model(**inputs).logits[sample][batch["attention_mask"][sample].bool()]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("sample", [0, 1, 2])
def test_alone_is_as_in_a_batch(sample: int, attention: str):
    torch.manual_seed(0)
    model = ChorusForConditionalGeneration._from_config(tiny_config(), attn_implementation=attention).eval()
    batch = tiny_batch(model.config)
    expected = real_logits(model, alone(batch, sample))
    torch.testing.assert_close(real_logits(model, batch, sample), expected, rtol=0, atol=ATOL)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("padding", [1, 7, 40])
def test_padding_changes_nothing(model: ChorusForConditionalGeneration, side: str, padding: int):
    batch = tiny_batch(model.config)
    padded = dict(batch)
    for name in ROWS:
        fill = batch[name].new_zeros(3, padding)
        padded[name] = torch.cat([fill, batch[name]] if side == "left" else [batch[name], fill], dim=1)
    for sample in range(3):
        expected = real_logits(model, batch, sample)
        torch.testing.assert_close(real_logits(model, padded, sample), expected, rtol=0, atol=ATOL)


def test_padding_reaches_no_bank_of_one_modality(model: ChorusForConditionalGeneration, batch: dict[str, Tensor]):
    with torch.no_grad():
        layers = model(**batch, output_router_logits=True).routing
    assert len(layers[0]["text"].router_logits) == int(
        ((batch["mm_token_type_ids"] == 0) & (batch["attention_mask"] == 1)).sum()
    )


def test_the_content_of_padding_changes_nothing(model: ChorusForConditionalGeneration, batch: dict[str, Tensor]):
    expected = real_logits(model, batch, 2)
    batch["input_ids"][2, :5] = 99
    torch.testing.assert_close(real_logits(model, batch, 2), expected, rtol=0, atol=ATOL)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("is_causal", [True, False])
def test_rows_that_may_see_nothing_give_no_nan(attention: str, is_causal: bool):
    torch.manual_seed(0)
    config = tiny_config(is_causal=is_causal, router_z_loss_coef=0.1, alignment_loss_coef=0.1)
    model = ChorusForConditionalGeneration._from_config(config, attn_implementation=attention).train()
    output = model(**tiny_batch(config))
    output.loss.backward()
    assert output.logits.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_order_of_the_samples_changes_nothing(model: ChorusForConditionalGeneration, batch: dict[str, Tensor]):
    order = [2, 1, 0]
    shuffled = {name: batch[name][order] for name in ROWS}
    shuffled["pixel_values"] = batch["pixel_values"][[1, 0]]
    shuffled["input_features"] = batch["input_features"][[1, 0]]
    shuffled["input_features_mask"] = batch["input_features_mask"][[1, 0]]
    for place, sample in enumerate(order):
        found, expected = real_logits(model, shuffled, place), real_logits(model, batch, sample)
        torch.testing.assert_close(found, expected, rtol=0, atol=ATOL)
