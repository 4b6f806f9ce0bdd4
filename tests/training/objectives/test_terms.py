"""The terms that a recipe asks for: which are built, how labelled tokens are weighed, and what is refused."""

import math
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from chorus_moe import ChorusProcessor
from chorus_moe.training.collator import ChorusDataCollator
from chorus_moe.training.objectives.arguments import ObjectiveArguments, weights_of
from chorus_moe.training.objectives.served import check_served
from chorus_moe.training.objectives.terms import build_objectives, weigh_tokens
from tests.training.conftest import make_model, make_rows


def test_terms_with_a_weight_are_built(tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_model(tokenizer)
    assert build_objectives(ObjectiveArguments(), model) == []
    given = ObjectiveArguments(masked_image_weight=0.5, masked_audio_weight=2.0, contrast_weight=0.1)
    terms = [(term.name, term.weight) for term in build_objectives(given, model)]
    assert terms == [("masked_image", 0.5), ("masked_audio", 2.0), ("contrast", 0.1)]


@pytest.mark.parametrize("weight", [0.0, 0.25])
def test_labelled_tokens_are_weighed_and_the_balance_of_experts_is_not(
    tokenizer: PreTrainedTokenizerFast, processor: ChorusProcessor, weight: float
) -> None:
    batch = ChorusDataCollator(processor)(make_rows(3))
    model = make_model(tokenizer, router_aux_loss_coef=0.5).train()
    whole, tokens = model(**batch).loss, make_model(tokenizer, router_aux_loss_coef=0.0).train()(**batch).loss
    held_out = model.eval()(**batch).loss
    weigh_tokens(model, weight)
    torch.testing.assert_close(model.train()(**batch).loss, whole - (1 - weight) * tokens, rtol=0, atol=1e-5)
    torch.testing.assert_close(model.eval()(**batch).loss, held_out)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"next_token_weight": 0.0}, "nothing is learned: next_token_weight=0, masked_image_weight=0"),
        ({"masked_image_weight": -1.0}, "masked_image_weight must be 0 or more and finite, found -1.0"),
        ({"masked_audio_weight": math.nan}, "masked_audio_weight must be 0 or more and finite, found nan"),
        ({"mask_share": 1.0}, "mask_share must lie between 0 and 1, found 1.0"),
        ({"mask_share": 0.0}, "mask_share must lie between 0 and 1, found 0.0"),
    ],
)
def test_what_cannot_be_weighed_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        weights_of(ObjectiveArguments(**values))


def test_rows_are_read_until_all_terms_are_served() -> None:
    wanted, read = ObjectiveArguments(masked_image_weight=1.0), []
    part = {"messages": [{"role": "document", "content": [{"type": "image", "path": "a.png"}]}]}
    rows = [{"messages": [{"role": "document", "content": "text"}]}, part, {"images": [1], "messages": []}]
    check_served(wanted, (read.append(row) or row for row in rows), "the rows")  # type: ignore[func-returns-value]
    assert read == rows[:2]
    with pytest.raises(ValueError, match="masked_image_weight=1.0: none of the rows has image to learn from"):
        check_served(wanted, rows[:1], "the rows")
    with pytest.raises(ValueError, match="contrast_weight=1.0: none of the rows has an image or sound"):
        check_served(ObjectiveArguments(contrast_weight=1.0), rows[:1], "the rows")
    check_served(ObjectiveArguments(), iter([]), "no rows are read without such a term")
