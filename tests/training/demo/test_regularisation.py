"""Smoothed labels and dropped tokens change what they say they change, and only in training."""

from typing import Any

import pytest
import torch
from torch import nn

from chorus_moe.training.demo.data import corpus
from chorus_moe.training.demo.model import build_demo
from chorus_moe.training.demo.regularisation import drop_tokens, smooth_labels


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    return build_demo(corpus())[0].train()


def text_batch() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    input_ids = torch.randint(5, 60, (3, 8))
    labels = input_ids.clone()
    labels[:, :6] = -100
    return {"input_ids": input_ids, "labels": labels}


def test_smoothed_labels_change_the_language_loss_by_exactly_the_smoothing(model: Any) -> None:
    batch = text_batch()
    plain = model(**batch)
    smooth_labels(model, 0.2)
    smoothed = model(**batch)
    scores = plain.logits[:, 5:7].float().log_softmax(-1)
    hit = scores.gather(-1, batch["labels"][:, 6:, None]).mean()
    # What is added: a fifth of the gap between the label's log-probability and that of all words.
    expected = plain.loss + 0.2 * (hit - scores.mean())
    torch.testing.assert_close(smoothed.loss, expected, rtol=0, atol=1e-5)


def test_no_smoothing_is_the_plain_loss_over_any_number_of_items(model: Any) -> None:
    batch = text_batch() | {"num_items_in_batch": torch.tensor(10)}
    plain = model(**batch).loss
    smooth_labels(model, 0.0)
    torch.testing.assert_close(model(**batch).loss, plain, rtol=0, atol=1e-6)


def test_about_the_given_share_of_tokens_reads_zero_and_the_others_stay(model: Any) -> None:
    connector = model.model.audio_connector
    hidden, mask = torch.randn(40, 50, model.config.audio_config.hidden_size), torch.ones(40, 50, dtype=torch.bool)
    whole, _ = connector(hidden, mask)
    drop_tokens(connector, 0.25)
    tokens, kept_mask = connector(hidden, mask)
    dropped = (tokens == 0).all(dim=-1)
    # 1,000 draws: three standard deviations are 0.041.
    assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.042)
    assert torch.equal(tokens[~dropped], whole[~dropped])
    assert kept_mask.all()


def test_nothing_is_dropped_in_evaluation_nor_after_the_handle_is_removed(model: Any) -> None:
    connector: nn.Module = model.model.audio_connector
    hidden, mask = torch.randn(2, 30, model.config.audio_config.hidden_size), torch.ones(2, 30, dtype=torch.bool)
    whole, _ = connector(hidden, mask)
    handle = drop_tokens(connector, 0.9)
    assert torch.equal(connector.eval()(hidden, mask)[0], whole)
    handle.remove()
    assert torch.equal(connector.train()(hidden, mask)[0], whole)
