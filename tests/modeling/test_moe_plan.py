"""Rows of each modality, found once a forward."""

import pytest
import torch

from chorus_moe.modeling.moe_plan import ForwardPlan, RoutingOptions, add_rows, take_rows

MIXED = torch.tensor([[0, 1, 3, 0], [1, 0, 0, 3]])
MASK = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])


def test_rows_of_a_modality_are_its_real_tokens_in_order():
    plan = ForwardPlan.build(MIXED, MASK)
    assert plan.rows_of(["text"]).tolist() == [0, 3, 6]
    assert plan.rows_of(["image"]).tolist() == [1]
    assert plan.rows_of(["audio", "image"]).tolist() == [1, 2, 7]


def test_a_bank_open_to_all_gathers_nothing_and_masks_padding():
    plan = ForwardPlan.build(MIXED, MASK)
    assert plan.rows_of(["text", "image", "audio"]) is None
    assert torch.equal(plan.token_mask(["text", "image", "audio"], None), MASK.flatten().bool())


def test_text_alone_gathers_nothing():
    plan = ForwardPlan.build(torch.zeros(2, 4, dtype=torch.long), torch.ones(2, 4))
    assert plan.rows_of(["text"]) is None
    assert plan.token_mask(["text"], None) is None
    assert plan.rows_of(["image"]).numel() == 0


def test_a_cached_step_reads_the_mask_of_its_own_tokens():
    plan = ForwardPlan.build(torch.zeros(2, 1, dtype=torch.long), torch.tensor([[0, 0, 1], [1, 1, 0]]))
    assert plan.rows_of(["text"]).tolist() == [0]


@pytest.mark.parametrize("mask", [None, torch.ones(2, 1, 4, 4), {"full_attention": None}])
def test_masks_of_another_form_say_nothing_about_padding(mask):
    plan = ForwardPlan.build(MIXED, mask)
    assert plan.real_T is None
    assert plan.rows_of(["image"]).tolist() == [1, 4]


def test_an_unknown_modality_is_an_error():
    with pytest.raises(ValueError, match=r"holds \[2, 7\] in 2 of 4 tokens"):
        ForwardPlan.build(torch.tensor([[0, 2, 7, 1]]), None)


def test_a_static_plan_shows_every_row_and_masks_closed_ones():
    plan = ForwardPlan(MIXED.flatten(), MASK.flatten().bool(), is_static=True)
    assert plan.rows_of(["image"]) is None
    assert plan.token_mask(["image"], None).tolist() == [False, True] + [False] * 6


def test_taking_and_adding_rows_are_inverse():
    states, rows = torch.randn(5, 3), torch.tensor([1, 4])
    for start in (torch.zeros(5, 3), None):  # None stands for zeros
        output = add_rows(start, rows, take_rows(states, rows), states)
        assert torch.equal(output[rows], states[rows])
        assert not output[[0, 2, 3]].any()
    assert take_rows(states, None) is states


def test_a_plan_on_its_own_device_is_itself():
    plan = ForwardPlan.build(MIXED, MASK)
    assert plan.to("cpu") is plan
    moved = plan.to("meta")
    assert moved.rows["image"].device.type == moved.modality_T.device.type == "meta"


def test_options_move_with_their_plan():
    options = RoutingOptions(torch.rand(8), {"image": 1}, frozenset(["text"]), torch.zeros(8).long(), {})
    plan = ForwardPlan.build(MIXED, MASK, options)
    plan.row_options("image", ["image"], plan.rows_of(["image"]), None)
    moved = plan.to("meta")
    assert moved.options.complexity_T.device.type == moved.options.sequence_T.device.type == "meta"
    assert (moved.options.budget, moved.options.sampled_banks) == ({"image": 1}, frozenset(["text"]))
    assert moved.options_of_banks == {}


def test_options_are_those_of_the_rows_of_a_bank():
    options = RoutingOptions(torch.arange(8) / 8, {"image": 1}, frozenset(["text"]), None, {})
    plan = ForwardPlan.build(MIXED, MASK, options)
    found = {}
    for name in ("image", "text", "audio"):
        found[name] = plan.row_options(name, [name], plan.rows_of([name]), None)
    assert found["image"].budget_R.tolist() == [1]
    assert found["text"].budget_R is None
    assert found["text"].complexity_R.tolist() == [0.0, 0.375, 0.75]
    assert [found[name].is_sampled for name in found] == [False, True, False]


def test_nothing_asked_is_no_option_at_all():
    plan = ForwardPlan.build(MIXED, MASK, RoutingOptions(None, {"image": 1}, frozenset(), None, {}))
    assert plan.row_options("text", ["text"], plan.rows_of(["text"]), None) is None
    assert ForwardPlan.build(MIXED, MASK).row_options("text", ["text"], None, None) is None


@pytest.mark.parametrize("is_text", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_a_compiled_plan_knows_its_rows_for_text_without_padding_alone(
    is_text: bool, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph can have no shapes that depend on data; text without padding has none."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    mask = torch.ones(2, 4) if padded else None
    plan = ForwardPlan.build(torch.zeros(2, 4, dtype=torch.long), mask, is_text=is_text)
    assert plan.is_static == (not (is_text and not padded))
