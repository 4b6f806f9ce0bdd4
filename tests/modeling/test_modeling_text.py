"""The decoder against its own layers, run one after the other."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from chorus_moe.modeling.modeling_outputs import CACHE
from chorus_moe.modeling.modeling_text import ChorusTextModel
from tests.conftest import tiny_config


def decoder(**text: Any) -> ChorusTextModel:
    torch.manual_seed(0)
    config = tiny_config(num_hidden_layers=3, initializer_range=0.2, **text).text_config
    return ChorusTextModel(config).eval()


def rows(model: ChorusTextModel) -> Tensor:
    return torch.randint(5, model.config.vocab_size, (3, 7), generator=torch.Generator().manual_seed(1))


class Leaving:
    """In the place of exits: which samples go on after a layer."""

    def __init__(self, staying: dict[int, list[int]]):
        self.staying, self.asked = staying, []

    def passes(self, number: int, hidden_states: Tensor) -> Tensor | None:
        self.asked.append((number, len(hidden_states)))
        return torch.tensor(self.staying[number], dtype=torch.long) if number in self.staying else None


@torch.no_grad()
def test_the_decoder_is_its_layers_one_after_the_other() -> None:
    model = decoder()
    ids, states = rows(model), []
    for layer in model.layers:
        layer.register_forward_hook(lambda module, given, output: states.append((given[0], output)))
    found = model(input_ids=ids, use_cache=False).last_hidden_state
    assert torch.equal(states[0][0], model.embed_tokens(ids))
    assert all(torch.equal(after[0], before[1]) for before, after in zip(states, states[1:], strict=False))
    assert torch.equal(found, model.norm(states[2][1]))
    for number in (1, 2):
        left = model(input_ids=ids, exit_layer=number, use_cache=False).last_hidden_state
        assert torch.equal(left, model.norm(states[number - 1][1]))


@torch.no_grad()
def test_samples_that_leave_are_not_seen_by_later_layers() -> None:
    model = decoder()
    ids = rows(model)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    alone = [model(input_ids=ids[i : i + 1], attention_mask=mask[i : i + 1]).last_hidden_state for i in range(3)]
    exits = Leaving({1: [0, 1], 2: [1]})
    found = model(input_ids=ids, attention_mask=mask, exits=exits, use_cache=False).last_hidden_state
    assert exits.asked == [(1, 3), (2, 2), (3, 1)]
    # Products of other shapes sum in another order.
    torch.testing.assert_close(found, alone[1], rtol=0, atol=1e-5)
    everyone = Leaving({})
    whole = model(input_ids=ids, attention_mask=mask, exits=everyone, use_cache=False).last_hidden_state
    torch.testing.assert_close(whole[2:], alone[2], rtol=0, atol=1e-5)
    assert everyone.asked == [(1, 3), (2, 3), (3, 3)]
    nobody = Leaving({2: []})
    assert model(input_ids=ids, exits=nobody, use_cache=False).last_hidden_state.shape == (0, 7, whole.shape[2])
    assert nobody.asked == [(1, 3), (2, 3)]


def test_a_call_of_the_decoder_that_says_nothing_or_too_much_is_refused() -> None:
    model = decoder()
    ids = rows(model)
    for given in ({}, {"input_ids": ids, "inputs_embeds": model.embed_tokens(ids)}):
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            model(**given)
    for layer in (0, 3):
        with pytest.raises(ValueError, match=rf"exit_layer={layer} is outside 1\.\.2 of 3 layers"):
            model(input_ids=ids, exit_layer=layer)
    with pytest.raises(ValueError, match="skip_threshold=0.4 changes nothing"):
        model(input_ids=ids, skip_threshold=0.4)


@torch.no_grad()
def test_a_cache_is_made_where_it_is_wanted_and_rows_are_not_packed() -> None:
    model = decoder()
    ids = rows(model)
    assert model(input_ids=ids, use_cache=False).past_key_values is None
    assert model(input_ids=ids, use_cache=True).past_key_values.get_seq_length() == 7
    packed = torch.tensor([[0, 1, 2, 0, 1, 2, 3]]).expand(3, 7)
    output = model(input_ids=ids, position_ids=packed, use_cache=True)
    assert output.past_key_values is None
    first = model(input_ids=ids[:, :3], use_cache=False).last_hidden_state
    torch.testing.assert_close(output.last_hidden_state[:, :3], first, rtol=0, atol=1e-5)
    second = model(input_ids=ids[:, 3:], use_cache=False).last_hidden_state
    torch.testing.assert_close(output.last_hidden_state[:, 3:], second, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_layer_asked_for_keys_alone_fills_the_cache_and_changes_no_state() -> None:
    model = decoder()
    ids, layers = rows(model), model.layers
    whole = model(input_ids=ids, use_cache=True).past_key_values
    given: list[dict[str, Any]] = []
    for layer in layers:
        layer.register_forward_pre_hook(lambda module, args, kwargs: given.append(kwargs), with_kwargs=True)
    states = model.embed_tokens(ids)
    model(input_ids=ids, use_cache=False)
    cache = DynamicCache(config=model.config)
    shared = {name: value for name, value in given[0].items() if name not in ("past_key_values", "cache")}
    found = layers[0](states, **shared, **{CACHE: cache}, keys_alone=True)
    assert found is states
    assert torch.equal(cache.layers[0].keys, whole.layers[0].keys)
    assert torch.equal(cache.layers[0].values, whole.layers[0].values)
    assert not torch.equal(layers[0](states, **shared), states)


@torch.no_grad()
def test_global_tokens_stand_in_front_and_are_no_part_of_the_output() -> None:
    model = decoder(num_global_tokens=2, is_causal=False, layer_types=["sliding_attention"] * 3, sliding_window=4)
    ids = rows(model)
    found = model(input_ids=ids, use_cache=False).last_hidden_state
    assert found.shape[:2] == ids.shape
    model.global_tokens.weight.mul_(-3)
    assert not torch.allclose(found, model(input_ids=ids, use_cache=False).last_hidden_state)
