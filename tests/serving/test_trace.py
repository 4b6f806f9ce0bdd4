"""Parts of a trace against sums by hand; the whole is in test_chat.py."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from chorus_moe.modeling.modeling_outputs import BankRouting
from chorus_moe.serving.trace import NAMES, Trace, expert_weights, experts_by_layer, mean_attention, shares


def trace(**fields: Any) -> Trace:
    empty = dict.fromkeys(("layers", "visits", "flops", "prompt_length"), 0)
    nothing = {"words": [], "modalities": [], "experts": {}, "attention_AS": None, "attention_layers": []}
    return Trace(**nothing | empty | fields)  # type: ignore[arg-type]


def routing(weights: list[list[float]], chosen: list[list[int]], experts: int = 3, **fields: Any) -> BankRouting:
    logits = torch.zeros(len(weights), experts)
    return BankRouting(logits, torch.tensor(weights), torch.tensor(chosen), None)._replace(**fields)


def test_weights_lie_at_their_experts_and_unused_slots_nowhere() -> None:
    found = expert_weights(routing([[0.6, 0.4], [1.0, 0.5]], [[2, 0], [1, 3]]), length=2)
    torch.testing.assert_close(found, torch.tensor([[0.4, 0.0, 0.6], [0.0, 1.0, 0.0]]))


def test_a_bank_of_some_tokens_leaves_the_others_at_zero_and_its_gate_counts() -> None:
    part = routing([[0.5], [1.0]], [[0], [2]], rows=torch.tensor([1, 3]), bank_weights=torch.tensor([0.5, 0.25]))
    found = expert_weights(part, length=4)
    expected = torch.zeros(4, 3)
    expected[1, 0], expected[3, 2] = 0.25, 0.25
    torch.testing.assert_close(found, expected)


def test_layers_are_the_sparse_ones() -> None:
    config: Any = SimpleNamespace(sparse_layers=[1, 3])
    banks = [{"text": routing([[1.0]], [[0]])}, {"text": routing([[1.0]], [[2]])}]
    found = experts_by_layer(config, banks, 1)
    assert {layer: bank["text"].tolist() for layer, bank in found.items()} == {1: [[1, 0, 0]], 3: [[0, 0, 1]]}
    assert experts_by_layer(config, None, 1) == {}


def test_shares_are_of_visits_in_all_banks() -> None:
    experts = {"text": torch.tensor([[0.9, 0.0], [0.2, 0.3]]), "image": torch.tensor([[0.0, 0.1], [0.0, 0.0]])}
    found = shares(experts)
    assert found["text"].tolist() == [0.5, 0.25] and found["image"].tolist() == [0, 0.25]
    assert shares({"text": torch.zeros(2, 3)})["text"].tolist() == [0, 0, 0]


def test_the_strongest_comes_first_over_all_banks() -> None:
    experts = {"text": torch.tensor([[0.0, 0.0], [0.2, 0.0]]), "image": torch.tensor([[0.5, 0.0], [0.1, 0.7]])}
    found = trace(experts={2: experts}).strongest(1, 2)
    assert [(bank, expert) for bank, expert, _ in found] == [("image", 1), ("text", 0), ("image", 0)]
    assert [weight for _, _, weight in found] == pytest.approx([0.7, 0.2, 0.1])


def test_spans_of_items() -> None:
    modalities = ["text", "image", "image", "image", "image", "text", "audio", "image", "image"]
    found = trace(modalities=modalities)
    assert found.spans("image", [4, 2]) == [range(1, 5), range(7, 9)]
    assert found.spans("image", [2, 2, 2]) == [range(1, 3), range(3, 5), range(7, 9)]
    assert found.spans("image", [1, 3, 2]) == [range(1, 2), range(2, 5), range(7, 9)]
    assert found.spans("audio", [1]) == [range(6, 7)] and found.spans("video", []) == []


def maps(*values: float, heads: int = 2, length: int = 4, keys: int = 4) -> list[torch.Tensor]:
    """Attention of each layer, `(1, heads, length, keys)`; row r of head h has (r + h) times the value."""
    rows = torch.arange(length)[:, None] + torch.arange(heads)[:, None, None]
    return [value * (rows * torch.ones(keys))[None] for value in values]


def test_attention_is_the_mean_of_heads_and_cross_modal_layers_before_each_written_token() -> None:
    config: Any = SimpleNamespace(cross_modal_layers=[0, 2])
    layers, found = mean_attention(config, tuple(maps(1.0, 100.0, 3.0)), written=2)
    # Rows 1 and 2 are made into the last two tokens; a mean over the heads adds a half.
    assert layers == [0, 2] and found is not None
    torch.testing.assert_close(found, torch.tensor([[3.0] * 4, [5.0] * 4]))


def test_without_cross_modal_layers_all_count_that_have_a_map_and_global_tokens_are_left_out() -> None:
    config: Any = SimpleNamespace(cross_modal_layers=None)
    wide = torch.cat([torch.full((1, 2, 4, 1), 9.0), maps(3.0)[0]], dim=-1)
    layers, found = mean_attention(config, (maps(1.0)[0], None, wide), written=1)
    assert layers == [0, 2] and found is not None and found.tolist() == [[5.0] * 4]


@pytest.mark.parametrize(("attentions", "written"), [((None, None), 2), ((), 1), (tuple(maps(1.0)), 0)])
def test_no_map_and_no_answer_is_nothing(attentions: tuple, written: int) -> None:
    config: Any = SimpleNamespace(cross_modal_layers=[])
    assert mean_attention(config, attentions, written) == ([], None)


def test_names_of_modalities() -> None:
    assert NAMES[0] == "text" and set(NAMES.values()) >= {"text", "image", "audio"}
