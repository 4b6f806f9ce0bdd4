"""Outputs: fields start empty, and the cache goes by both of its names in every release of transformers."""

import inspect
import warnings
from dataclasses import fields
from typing import Any

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutputWithPast

from chorus_moe.modeling import modeling_outputs
from chorus_moe.modeling.modeling_outputs import (
    BankRouting,
    ChorusContrastiveOutput,
    ChorusLossOutput,
    ChorusModelOutput,
    RouterChoice,
    takes_cache,
)


def forward(self: object, ids: int, past_key_values: Any = None, **kwargs: Any) -> tuple:
    """Runs."""
    return ids, past_key_values, kwargs


@pytest.mark.parametrize("kind", [ChorusModelOutput, ChorusLossOutput, ChorusContrastiveOutput])
def test_an_output_holds_what_it_was_given_and_nothing_else(kind: type) -> None:
    assert all(field.default is None for field in fields(kind))
    last = fields(kind)[-1].name
    value = torch.ones(2)
    # Of a None nothing is returned, also not as a tuple.
    assert kind(**{last: value}).to_tuple() == (value,)


def test_a_choice_becomes_the_routing_of_a_bank_by_the_names_of_its_fields() -> None:
    names = RouterChoice._fields
    assert set(names) < set(BankRouting._fields) and names[:3] == BankRouting._fields[:3]
    # `ExpertBank` passes the rest of a choice on by position.
    start = BankRouting._fields.index("log_probs")
    assert BankRouting._fields[start : start + len(names) - 3] == names[3:]
    logits, weights, chosen = torch.zeros(3).split(1)
    assert RouterChoice(logits, weights, chosen)[3:] == (None,) * (len(names) - 3)
    assert BankRouting(logits, weights, chosen, None)[3:] == (None,) * (len(BankRouting._fields) - 3)


def test_the_cache_is_called_as_the_installed_release_calls_it() -> None:
    names = set(inspect.signature(BaseModelOutputWithPast).parameters)
    assert modeling_outputs.CACHE in names & {"cache", "past_key_values"}
    assert ("cache" in names) is (modeling_outputs.CACHE == "cache")


def test_an_older_release_has_one_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modeling_outputs, "CACHE", "past_key_values")
    assert takes_cache(forward) is forward


def test_a_newer_release_has_two_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modeling_outputs, "CACHE", "cache")
    wrapped = takes_cache(forward)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert wrapped(None, 3) == (3, None, {})
        assert wrapped(None, 3, cache="kept", other=1) == (3, "kept", {"other": 1})
        assert wrapped(None, 3, past_key_values=None, cache="kept") == (3, "kept", {})
    with pytest.warns(FutureWarning, match="`past_key_values` is deprecated. Use `cache` instead") as caught:
        assert wrapped(None, 3, past_key_values="kept", cache=None) == (3, "kept", {})
    # The caller's line is meant, not ours.
    assert caught[0].filename == __file__
    with pytest.raises(ValueError, match="`cache` and `past_key_values` are both given"):
        wrapped(None, 3, past_key_values="one", cache="other")
    # `generate` reads the signature, and docs the name.
    assert list(inspect.signature(wrapped).parameters) == ["self", "ids", "cache", "kwargs"]
    assert (wrapped.__name__, wrapped.__doc__) == ("forward", "Runs.")
