"""A calibrated `exit_confidence` changes no more than it promises, on other prompts."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from chorus_moe import ChorusForConditionalGeneration
from chorus_moe.training.exit_confidence import (
    calibrate_exit_confidence,
    p_value,
    prompts_needed,
    share_changed,
)
from tests.modeling.conftest import make_model


@pytest.fixture(scope="module")
def model() -> ChorusForConditionalGeneration:
    return make_model(exit_layers=[1, 2])


def prompts(count: int = 64) -> list[dict[str, Tensor]]:
    ids = torch.randint(5, 128, (count, 4), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(32)]


def test_the_test_errs_no_more_often_than_it_says():
    """Shares of a law whose mean is just over the limit: a promise would be wrong, and at most 5% may be made."""
    generator, limit, wrong, trials = torch.Generator().manual_seed(0), 0.1, {"few": 0, "even": 0}, 2000
    few = (torch.rand(trials, 100, generator=generator) < 0.1001).double()
    # Many texts that change a little: further from a binomial law, so that the bound is wide.
    even = 0.2002 * torch.rand(trials, 100, generator=generator, dtype=torch.float64)
    for name, shares in {"few": few, "even": even}.items():
        wrong[name] = sum(p_value(mean, 100, limit) <= 0.05 for mean in shares.mean(dim=1).tolist())
    assert wrong["few"] <= 0.05 * trials and wrong["even"] <= wrong["few"]
    assert wrong["few"] > 0


def test_the_fewest_prompts_are_those_that_pass_without_a_change():
    for limit, rate in ((0.05, 0.05), (0.01, 0.05), (0.2, 0.1)):
        needed = prompts_needed(limit, rate)
        assert p_value(0.0, needed, limit) <= rate < p_value(0.0, needed - 1, limit)
    assert p_value(0.05, 100, 0.05) == 1
    # (1 - limit) ** prompts, the probability that nothing changes.
    assert math.isclose(p_value(0.0, 20, 0.1), 0.9**20)


def test_changed_tokens_are_counted_up_to_the_end_of_the_plain_text():
    plain = torch.tensor([[5, 6, 2, 0, 0], [5, 6, 7, 8, 9]])
    early = torch.tensor([[5, 7, 2, 9], [5, 6, 7, 8]])
    assert share_changed(plain, early, [2]) == [1 / 3, 1 / 5]
    assert share_changed(plain, plain, [2]) == [0, 0]


def test_what_is_found_is_what_generate_does(model: ChorusForConditionalGeneration):
    options: dict[str, Any] = {"max_new_tokens": 4, "confidences": (0.99, 0.02, 0.01, 0.0)}
    found = calibrate_exit_confidence(model, prompts(), max_changed=0.5, **options)
    assert found.exit_confidence is not None and found.exit_confidence in found.changed
    assert found.changed[0.99] == 0 and found.layers[0.99] == 3
    assert min(found.changed) < 0.99 and found.layers[min(found.changed)] < 3
    # `generate` reads it, and does to these prompts what the calibration says.
    assert model.generation_config.exit_confidence == found.exit_confidence
    shares = []
    for batch in prompts():
        text, plain = (
            model.generate(**batch, max_new_tokens=4, do_sample=False, **o) for o in ({}, {"exit_confidence": 1.0})
        )
        shares += share_changed(plain[:, 4:], text[:, 4:], [])
    assert sum(shares) / len(shares) == pytest.approx(found.changed[found.exit_confidence])


def test_where_none_keeps_the_promise_none_is_set(model: ChorusForConditionalGeneration):
    model.generation_config.exit_confidence = 0.5
    with pytest.warns(UserWarning, match=r"no exit_confidence changes at most 0.05"):
        found = calibrate_exit_confidence(model, prompts(), confidences=(0.0,), max_new_tokens=4)
    assert found.exit_confidence is None and model.generation_config.exit_confidence is None
    assert found.changed[0.0] > 0.05


def test_what_makes_no_sense_is_refused(model: ChorusForConditionalGeneration):
    for options, message in (
        ({"max_changed": 0.0}, "max_changed=0.0 must lie"),
        ({"error_rate": 0.6}, "error_rate=0.6"),
        ({"confidences": (0.5, 0.9)}, "must fall"),
        ({"max_changed": 0.01}, "64 prompts cannot promise max_changed=0.01, .* that takes 299"),
    ):
        with pytest.raises(ValueError, match=message):
            calibrate_exit_confidence(model, prompts(), **options)
    with pytest.raises(ValueError, match="the model has no exits"):
        calibrate_exit_confidence(make_model(), prompts())
