"""Rows, options and widths of a plan, each against a loop over the tokens."""

from typing import Any

import pytest
import torch

from chorus_moe.modeling.configuration_banks import read_expert_banks
from chorus_moe.modeling.moe_plan import (
    ForwardPlan,
    RoutingOptions,
    add_rows,
    read_routing_options,
    take_rows,
)

MIXED = torch.tensor([[0, 1, 3, 0], [1, 0, 0, 3]])
MASK = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
IDS = {"text": 0, "image": 1, "audio": 3}
SIZES = {"num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 8}


def banks(**settings: dict[str, Any]) -> dict[str, Any]:
    return {bank.name: bank for bank in read_expert_banks(settings, SIZES)}


def options(**asked: Any) -> RoutingOptions:
    given = {"complexity_T": None, "budget": {}, "sampled_banks": frozenset(), "sequence_T": None, "limited_banks": {}}
    return RoutingOptions(**given | asked)


@pytest.mark.parametrize("mask", [None, MASK, torch.ones_like(MASK)])
@pytest.mark.parametrize("names", [["text"], ["audio", "text"], ["image"], ["image", "audio"]])
def test_rows_are_those_of_a_loop_over_tokens(mask: Any, names: list[str]) -> None:
    plan = ForwardPlan.build(MIXED, mask)
    real = [True] * 8 if mask is None else mask.flatten().bool().tolist()
    kinds = MIXED.flatten().tolist()
    expected = [t for t in range(8) if real[t] and kinds[t] in [IDS[name] for name in names]]
    found = plan.rows_of(names)
    assert found is not None and found.tolist() == expected
    # Found once: banks open to the same modalities share them.
    assert plan.rows_of(list(reversed(names))) is found
    assert (plan.real_T is None) is (all(real))
    closed = ForwardPlan.build(MIXED, mask, options(closed_banks=frozenset(["a"])))
    assert len(closed.rows_of_bank("a", names)) == 0 and closed.rows_of_bank("b", names).tolist() == expected


def test_text_with_padding_knows_its_rows_without_a_look_at_the_modalities() -> None:
    text = torch.zeros(2, 4, dtype=torch.long)
    for is_text in (True, False):
        plan = ForwardPlan.build(text, MASK, is_text=is_text)
        assert plan.rows_of(["text"]).tolist() == [0, 1, 2, 3, 6, 7] and plan.rows["text"] is None
        assert plan.rows_of(["image"]).tolist() == [] == plan.rows["audio"].tolist()
    whole = ForwardPlan.build(text, None, modalities=["text"])
    assert list(whole.rows) == ["text"] and whole.rows_of(["text", "image"]) is None


def test_a_bank_is_open_to_all_where_it_takes_what_the_model_has() -> None:
    kinds = torch.tensor([[0, 1, 0, 1]])
    plan = ForwardPlan.build(kinds, MASK[1:], modalities=["text", "image"])
    assert plan.rows_of(["image", "text", "audio"]) is None
    assert plan.token_mask(["image", "text"], None).tolist() == [False, False, True, True]
    # A modality of another model has no rows here.
    assert plan.rows_of(["image", "audio"]).tolist() == [3]
    assert plan.token_mask(["image"], torch.tensor([3])) is None


@pytest.mark.parametrize("names", [["text"], ["image", "audio"], []])
@pytest.mark.parametrize("mask", [None, MASK])
def test_a_static_plan_masks_what_is_closed_or_padding(names: list[str], mask: Any) -> None:
    real = None if mask is None else mask.flatten().bool()
    plan = ForwardPlan(MIXED.flatten(), real, is_static=True)
    expected = [
        kind in [IDS[name] for name in names] and (mask is None or bool(real[t]))
        for t, kind in enumerate(MIXED.flatten().tolist())
    ]
    assert plan.rows_of(names) is None and plan.token_mask(names, None).tolist() == expected


def test_a_plan_of_some_tokens_is_that_of_a_batch_of_them() -> None:
    given = options(
        complexity_T=torch.arange(8) / 8, sequence_T=torch.arange(8) * 10, limited_banks={"a": "sequence"},
        width_T=torch.arange(8), closed_banks=frozenset(["c"]), budget={"image": 1},
    )  # fmt: skip
    plan = ForwardPlan.build(MIXED, MASK, given)
    plan.open_above = 0.75
    origin = torch.tensor([7, 1, 4, 2])
    part = plan.at(origin)
    assert part.modality_T.tolist() == [3, 1, 1, 3] and part.real_T.tolist() == [True, True, False, True]
    assert part.open_above == 0.75 and part.rows_of(["image"]).tolist() == [1]
    assert part.options.complexity_T.tolist() == [7 / 8, 1 / 8, 4 / 8, 2 / 8]
    assert part.options.sequence_T.tolist() == [70, 10, 40, 20] and part.options.width_T.tolist() == [7, 1, 4, 2]
    assert part.options.budget == {"image": 1} and part.closed_banks == {"c"} and plan.closed_banks == {"c"}
    assert part.in_batch(torch.tensor([0, 2])).tolist() == [7, 4] and part.in_batch(None) is origin
    assert plan.in_batch(origin) is origin and plan.in_batch(None) is None
    plain = ForwardPlan.build(MIXED, None).at(origin)
    assert plain.options is None and plain.real_T is None and plain.closed_banks == frozenset()
    assert options(width_T=1).at(origin).width_T == 1


def test_options_of_a_bank_are_found_once_and_are_those_of_its_rows() -> None:
    given = options(
        complexity_T=torch.arange(8) / 8, budget={"image": 1, "audio": 3}, sampled_banks=frozenset(["b"]),
        sequence_T=torch.tensor([0, 0, 0, 0, 5, 5, 5, 5]), limited_banks={"a": "sequence", "b": "batch"},
        width_T=torch.arange(8),
    )  # fmt: skip
    plan = ForwardPlan.build(MIXED, MASK, given)
    rows = plan.rows_of(["image", "text"])
    found = plan.row_options("a", ["image", "text"], rows, None)
    assert rows.tolist() == [0, 1, 3, 6] and plan.row_options("a", [], None, None) is found
    unlimited = torch.iinfo(torch.int64).max
    assert found.budget_R.tolist() == [unlimited, 1, unlimited, unlimited]
    assert found.complexity_R.tolist() == [0, 1 / 8, 3 / 8, 6 / 8] and found.width_R.tolist() == [0, 1, 3, 6]
    assert found.places.sequence_R.tolist() == [0, 0, 0, 1] and not found.is_sampled
    whole = plan.row_options("b", ["image", "text", "audio"], None, plan.real_T)
    # Over a whole batch there is one sequence, and padding is not counted.
    assert whole.places.shape == (1, 6) and whole.places.rank_R.tolist() == [0, 1, 2, 3, 4, 4, 4, 5]
    assert whole.budget_R.tolist() == [unlimited, 1, 3, unlimited, 1, unlimited, unlimited, 3] and whole.is_sampled
    assert plan.row_options("c", ["text"], plan.rows_of(["text"]), None).places is None


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ({"complexity_T": torch.ones(8)}, "complexity_R"),
        ({"budget": {"text": 1}}, "budget_R"),
        ({"sampled_banks": frozenset(["a"])}, "is_sampled"),
        ({"sequence_T": torch.zeros(8).long(), "limited_banks": {"a": "batch"}}, "places"),
        ({"width_T": 0}, "width_R"),
    ],
)
def test_one_option_alone_is_an_option(asked: dict[str, Any], name: str) -> None:
    found = ForwardPlan.build(MIXED, MASK, options(**asked)).row_options("a", ["text"], None, None)
    assert found is not None and getattr(found, name) is not None and getattr(found, name) is not False
    others = [value for key, value in found._asdict().items() if key != name]
    assert all(value is None or value is False for value in others)


@pytest.mark.parametrize("with_gradients", [True, False])
@pytest.mark.parametrize("rows", [None, [1, 4]])
@pytest.mark.parametrize("start", [True, False])
def test_rows_are_added_in_the_dtype_of_what_they_join(
    with_gradients: bool, rows: list[int] | None, start: bool
) -> None:
    hidden = torch.randn(5, 3, dtype=torch.float64)
    output = torch.randn(5, 3, dtype=torch.float64) if start else None
    places = None if rows is None else torch.tensor(rows)
    states = take_rows(hidden, places).float() * 2
    before = torch.zeros_like(hidden) if output is None else output.clone()
    expected = before.clone()
    expected[list(range(5)) if rows is None else rows] += states.double()
    with torch.set_grad_enabled(with_gradients):
        found = add_rows(output, places, states, hidden)
    assert torch.equal(found.double(), expected)
    # In place spares a tensor, where no gradient needs the old one.
    assert output is None or rows is None or (found is output) is (not with_gradients)
    assert found.dtype == (torch.float32 if rows is None and output is None else torch.float64)


@pytest.mark.parametrize(
    ("settings", "training", "asked", "is_something"),
    [
        ({"a": {}}, True, {}, False),
        ({"a": {"expert_capacity": 2}}, True, {}, True),
        ({"a": {"expert_capacity": 2}}, False, {}, False),
        ({"a": {"closed": True}, "b": {}}, False, {}, True),
        ({"a": {}}, False, {"closed_banks": ("a",)}, True),
        ({"a": {}}, False, {"closed_banks": ()}, False),
        ({"a": {}}, False, {"expert_budget": {"text": 1}}, True),
        ({"a": {}}, False, {"expert_budget": {}}, False),
        ({"a": {}}, False, {"expert_width_share": 0.5, "width_shares": [0.5, 1]}, True),
        ({"a": {"adaptive_experts": True}}, False, {"complexity_scores": torch.zeros(2, 4)}, True),
    ],
)
def test_nothing_asked_for_is_no_object(
    settings: dict, training: bool, asked: dict[str, Any], is_something: bool
) -> None:
    found = read_routing_options(banks(**settings), MIXED, None, training, None, **asked)
    assert (found is not None) is is_something


def test_what_was_asked_for_is_read() -> None:
    settings = banks(
        a={"expert_capacity": 2, "capacity_scope": "batch"}, b={"closed": True}, c={"adaptive_experts": True}
    )
    scores = torch.tensor([[0.0, 1.0, float("nan"), 0.5]] * 2, dtype=torch.float64)
    positions = torch.tensor([[0, 1, 0, 1]])
    found = read_routing_options(
        settings,
        MIXED,
        positions,
        True,
        None,
        scores,
        {"text": 1},
        None,
        ["c"],
        torch.tensor([[0.5, 1] * 2] * 2),
        [0.5, 1],
    )
    assert found.limited_banks == {"a": "batch"} and found.budget == {"text": 1} and found.closed_banks == {"b", "c"}
    assert found.complexity_T.dtype == torch.float32 and found.complexity_T[[0, 1, 3]].tolist() == [0.0, 1.0, 0.5]
    assert found.width_T.tolist() == [0, 1] * 4
    # Packed sequences and rows of the batch have numbers of their own.
    numbers = found.sequence_T.tolist()
    assert [numbers[start] == numbers[start + 1] for start in range(0, 8, 2)] == [True] * 4 and len(set(numbers)) == 4
    unpacked = read_routing_options(settings, MIXED, None, True, None).sequence_T.tolist()
    assert len(set(unpacked[:4])) == 1 and len(set(unpacked)) == 2


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"expert_width_share": 0.5}, "^expert_width_share changes nothing: the model has no expert_width_shares$"),
        (
            {"expert_width_share": 0.25, "width_shares": [0.5, 1]},
            r"^expert_width_share=0.25 is none of expert_width_shares=\[0.5, 1\]$",
        ),
        (
            {"expert_width_share": torch.ones(2, 3), "width_shares": [0.5, 1]},
            r"^expert_width_share has shape \(2, 3\), tokens have \(2, 4\)$",
        ),
        (
            {"expert_width_share": torch.tensor([[1, 1, 0.5, 1], [1, 0.75, 0.3, 1]]), "width_shares": [0.5, 1]},
            r"^expert_width_share holds 0.75, none of expert_width_shares=\[0.5, 1\]$",
        ),
        ({"expert_budget": {"text": True}}, r"^expert_budget\['text'\]=True must be a whole number of at least 1$"),
        ({"expert_budget": {"text": -1}}, r"^expert_budget\['text'\]=-1 must be a whole"),
        (
            {"complexity_scores": torch.full((2, 4), -0.5)},
            "^complexity_scores lie between -0.5 and -0.5; they must lie",
        ),
        (
            {"complexity_scores": torch.tensor([[0.5, 1.25, 0.5, float("nan")]] * 2)},
            "^complexity_scores lie between 0 and 1.25; they must lie between 0 and 1$",
        ),
        ({"closed_banks": "a"}, r"^closed_banks='a' is a string; give the names of banks, as in \('text',\)$"),
        ({"closed_banks": ["x"]}, "^closed_banks: unknown bank 'x'"),
    ],
)
def test_what_cannot_be_kept_is_refused_with_both_numbers(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_routing_options(banks(a={"adaptive_experts": True}), MIXED, None, False, None, **asked)
