"""Capacity against a slow loop over tokens, and that nothing later or beside a token changes its path."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from chorus_moe import ChorusForConditionalGeneration
from chorus_moe.modeling.moe_selection import Places, best_experts, serve, used_parts
from tests.conftest import tiny_batch, tiny_config


def slow_serve(
    scores: Tensor,
    index: Tensor,
    sequence: list[int],
    counted: list[bool],
    capacity: int | float,
    overflow: str,
) -> tuple[list[list[int]], int, int]:
    """One token after the other, as the module docstring says it."""
    num_experts, top_k = scores.shape[1], index.shape[1]
    held: dict[tuple[int, int], int] = {}
    served: dict[int, int] = {}
    result, rerouted, dropped = [], 0, 0
    for row, name in enumerate(sequence):
        if not counted[row]:
            result.append([num_experts] * top_k)
            continue
        served[name] = served.get(name, 0) + 1
        limit = capacity
        if isinstance(capacity, float):
            limit = max(1, math.ceil(served[name] * (capacity * top_k / num_experts) - 1e-9))
        wanted = [e for e in index[row].tolist() if e < num_experts]
        ranking = [e for e in slow_ranking(scores[row]) if scores[row, e] > -torch.inf]
        candidates = wanted if overflow == "drop" else ranking
        room = [e for e in candidates if held.get((name, e), 0) < limit][: len(wanted)]
        for expert in room:
            held[name, expert] = held.get((name, expert), 0) + 1
        rerouted += len(set(room) - set(wanted))
        dropped += len(wanted) - len(room)
        if overflow == "drop":
            result.append([e if e in room else num_experts for e in index[row].tolist()])
        else:
            result.append(room + [num_experts] * (top_k - len(room)))
    return result, rerouted, dropped


def slow_ranking(scores_E: Tensor) -> list[int]:
    return sorted(range(len(scores_E)), key=lambda e: -scores_E[e].item())


@st.composite
def cases(draw: Any) -> dict[str, Any]:
    num_experts = draw(st.integers(2, 7))
    top_k = draw(st.integers(1, num_experts))
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    rows = sum(lengths)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 100_000)))
    # Few distinct scores: ties, and many tokens that want the same expert.
    scores = torch.randint(0, draw(st.sampled_from([2, 4, 1000])), (rows, num_experts), generator=generator).float()
    if draw(st.booleans()):
        scores[:, num_experts - 1] = -torch.inf if top_k < num_experts else 0.0
    kept = torch.randint(1, top_k + 1, (rows,), generator=generator)
    capacity = draw(st.one_of(st.integers(1, 4), st.floats(0.25, 3.0)))
    return {
        "scores": scores,
        "index": best_experts(scores, top_k).masked_fill(used_parts(kept, top_k) == 0, num_experts),
        "sequence": [place for place, length in enumerate(lengths) for _ in range(length)],
        "counted": draw(st.lists(st.booleans(), min_size=rows, max_size=rows)),
        "capacity": capacity,
        "overflow": draw(st.sampled_from(["reroute", "drop"])),
    }


def fast_serve(case: dict[str, Any]) -> tuple[list[list[int]], int, int]:
    places = Places.find(torch.tensor(case["sequence"]) * 5 + 3, torch.tensor(case["counted"]))
    limits = places.capacity(case["capacity"], case["index"].shape[1], case["scores"].shape[1])
    index, rerouted, dropped = serve(case["scores"], case["index"], places, limits, case["overflow"])
    return index.tolist(), int(rerouted), int(dropped)


@settings(max_examples=300, deadline=None)
@given(cases())
def test_all_at_once_serves_as_a_loop_over_tokens_does(case: dict[str, Any]):
    assert fast_serve(case) == slow_serve(**case)


@settings(max_examples=60, deadline=None)
@given(cases(), st.integers(1, 20))
def test_later_tokens_change_no_earlier_tokens_path(case: dict[str, Any], length: int):
    whole, _, _ = fast_serve(case)
    cut = {name: case[name][:length] for name in ("scores", "index", "sequence", "counted")}
    assert fast_serve(case | cut)[0] == whole[:length]


@settings(max_examples=60, deadline=None)
@given(cases())
def test_a_sequence_is_served_as_if_it_were_alone(case: dict[str, Any]):
    whole, _, _ = fast_serve(case)
    for name in set(case["sequence"]):
        rows = [row for row, sequence in enumerate(case["sequence"]) if sequence == name]
        alone = {key: case[key][rows] for key in ("scores", "index")}
        alone |= {key: [case[key][row] for row in rows] for key in ("sequence", "counted")}
        assert fast_serve(case | alone)[0] == [whole[row] for row in rows]


def test_no_rows_are_no_error():
    places = Places.find(torch.zeros(0, dtype=torch.long), None)
    index, *counts = serve(
        torch.zeros(0, 4), torch.zeros(0, 2, dtype=torch.long), places, places.capacity(2, 2, 4), "drop"
    )
    assert index.shape == (0, 2)
    assert [int(count) for count in counts] == [0, 0]


def test_a_factor_counts_against_the_share_so_far():
    places = Places.find(torch.zeros(10, dtype=torch.long), None)
    # 2 of 8 experts a token: a quarter of a token an expert, times 2, rounded up.
    assert places.capacity(2.0, 2, 8).tolist() == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]


def capped(**bank: Any) -> ChorusForConditionalGeneration:
    torch.manual_seed(0)
    config = tiny_config(
        expert_banks={"text": {"expert_capacity": 1.0, **bank}, "common": {"expert_capacity": 3, **bank}}
    )
    return ChorusForConditionalGeneration(config)


def choices(model: ChorusForConditionalGeneration, **inputs: Any) -> Any:
    with torch.no_grad():
        return model(**inputs, output_router_logits=True).routing


def test_capacity_holds_in_training_only_unless_asked():
    model, batch = capped(), tiny_batch(tiny_config())
    assert choices(model.train(), **batch)[0]["common"].num_rerouted > 0
    assert choices(model.eval(), **batch)[0]["common"].num_rerouted is None
    assert choices(capped(capacity_in_eval=True).eval(), **batch)[0]["common"].num_rerouted > 0


@pytest.mark.parametrize("overflow", ["reroute", "drop"])
def test_no_expert_holds_more_tokens_of_a_sequence_than_its_capacity(overflow: str):
    model, batch = capped(capacity_overflow=overflow).train(), tiny_batch(tiny_config())
    routing = choices(model, **batch)[1]["common"]
    for sample in routing.selected_experts.view(3, -1).tolist():
        assert max(sample.count(expert) for expert in range(4)) <= 3
    assert (routing.num_rerouted > 0) == (overflow == "reroute")
    real = int(batch["attention_mask"].sum())
    used = int((routing.selected_experts < 4).sum())
    assert used + int(routing.num_dropped) == 2 * real


def test_dropped_choices_take_their_weight_with_them():
    model, batch = capped(capacity_overflow="drop").train(), tiny_batch(tiny_config())
    routing = choices(model, **batch)[0]["common"]
    weights, chosen = routing.routing_weights, routing.selected_experts
    assert not weights[chosen == 4].any()
    half_dropped = ((chosen == 4).sum(dim=-1) == 1) & (routing.token_mask)
    assert half_dropped.any()
    assert (weights[half_dropped].sum(dim=-1) < 0.999).all()


@pytest.mark.parametrize("overflow", ["reroute", "drop"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_takes_no_room(overflow: str, side: str):
    model = capped(capacity_overflow=overflow, capacity_in_eval=True).eval()
    ids = torch.randint(5, 128, (2, 12), generator=torch.Generator().manual_seed(1))
    pad = torch.zeros(2, 5, dtype=torch.long)
    join = [pad, ids] if side == "left" else [ids, pad]
    mask = torch.cat([torch.zeros_like(part) if part is pad else torch.ones_like(part) for part in join], dim=1)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        found = model(input_ids=torch.cat(join, dim=1), attention_mask=mask).logits[mask.bool()]
    # float32 sums in another order, at logits of size 1.
    torch.testing.assert_close(found, expected.flatten(0, 1), rtol=0, atol=2e-6)


def test_packed_sequences_have_rooms_of_their_own():
    model = capped(capacity_in_eval=True).eval()
    first, second = torch.randint(5, 128, (2, 1, 10), generator=torch.Generator().manual_seed(2))
    positions = torch.arange(10).repeat(2)[None]
    packed = choices(model, input_ids=torch.cat([first, second], dim=1), position_ids=positions)
    apart = choices(model, input_ids=torch.cat([first, second]))
    for layer, other in zip(packed, apart, strict=True):
        for name in layer:
            assert torch.equal(layer[name].selected_experts, other[name].selected_experts), name


def test_a_cache_without_the_choices_of_its_tokens_is_refused():
    model = capped(capacity_in_eval=True).eval()
    ids = torch.randint(5, 128, (1, 6))
    first = model(input_ids=ids, use_cache=True)
    with pytest.raises(ValueError, match="expert bank 'common' limits the capacity.*6 tokens.*use_cache=False"):
        model(input_ids=ids[:, :1], past_key_values=first.past_key_values)
    assert model.generate(ids, max_new_tokens=3, do_sample=False, use_cache=False).shape == (1, 9)


def test_a_compiled_model_says_that_capacity_does_not_compile():
    torch.compiler.reset()
    model = capped(capacity_in_eval=True).eval()
    ids = torch.full((1, 4), 7)
    with torch.no_grad(), pytest.raises(Exception, match="expert_capacity cannot be compiled"):
        torch.compile(model, backend="aot_eager", fullgraph=True)(input_ids=ids, use_cache=False)
    torch.compiler.reset()
