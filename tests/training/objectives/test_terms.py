"""The terms that a recipe asks for: which are built, how labelled tokens are weighed, and what is refused."""

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from chorus_moe import ChorusProcessor
from chorus_moe.training.collator import ChorusDataCollator
from chorus_moe.training.objectives.arguments import ObjectiveArguments
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
