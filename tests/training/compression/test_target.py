"""Default plans: which steps they have, and that the first which reaches the target is taken."""

from typing import Any

import pytest

from benchmarks.same_bits import AUDIO, AUDIO_TOKEN, TEXT
from chorus_moe import ChorusConfig
from chorus_moe.training.compression import target as module
from chorus_moe.training.compression.plan import CompressionRecipe, Distil, Prune, Quantize
from chorus_moe.training.compression.steps import bytes_on_disk, model_without_memory, outline
from chorus_moe.training.compression.target import (
    DENSE,
    EXPERTS,
    KEPT,
    Outlook,
    default_plans,
    fewer_experts,
    formats,
    look_ahead,
    narrower,
    same_layers,
    sizes_of,
)
from tests.conftest import tiny_config

# A decoder and one encoder: a model without memory is made some hundred times.
CONFIG = ChorusConfig(text_config=TEXT | {"num_hidden_layers": 2}, audio_config=AUDIO, audio_token_id=AUDIO_TOKEN)
INT8 = Quantize({"experts": "int8"})


def bank(**settings: Any) -> Any:
    return tiny_config(expert_banks={"common": {"modalities": ["text", "image", "audio"], **settings}})


@pytest.mark.parametrize(
    ("settings", "share", "expected"),
    [
        ({"num_experts": 8}, 0.75, 6),
        ({"num_experts": 8}, 0.5, 4),
        ({"num_experts": 8}, 0.1, 2),
        ({"num_experts": 3}, 0.75, 2),
        ({"num_experts": 8, "num_experts_per_tok": 3}, 0.25, 3),
        # A router has a choice of two.
        ({"num_experts": 8, "num_experts_per_tok": 1}, 0.1, 2),
        ({"num_experts": [8, 6]}, 0.5, 3),
        ({"num_experts": 12, "num_groups": 3}, 0.4, 6),
        ({"num_experts": 12, "num_groups": 3, "num_experts_per_tok": 4}, 0.1, 6),
        # All K of a token lie in one of two groups.
        ({"num_experts": 8, "num_groups": 2, "topk_groups": 1}, 0.25, 4),
        ({"num_experts": 16, "num_groups": 4, "topk_groups": 2, "num_experts_per_tok": 4}, 0.25, 8),
        ({"num_experts": 4, "num_groups": 2, "topk_groups": 1}, 0.25, 4),
    ],
)
def test_a_bank_keeps_its_share_and_what_it_needs(settings: dict[str, Any], share: float, expected: int) -> None:
    config = bank(**settings)
    kept = fewer_experts(config, share)
    assert kept == {"common": expected}
    # And the model can be built so.
    outline(Prune(experts=kept), model_without_memory(config))


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        (1, {}),
        (1.0, {}),
        (0.75, {"feed_forward": 80, "shared_experts": 32, "experts:common": 48}),
        (0.5, {"feed_forward": 48, "shared_experts": 16, "experts:common": 32}),
        (0.1, {"feed_forward": 16, "shared_experts": 16, "experts:common": 16}),
    ],
)
def test_units_stay_in_steps_that_groups_of_four_bits_divide(share: float, expected: dict[str, int]) -> None:
    banks = {"common": {"modalities": ["text", "image", "audio"], "intermediate_size": 64}}
    config = tiny_config(expert_banks=banks, intermediate_size=112 if share == 0.75 else 96)
    assert narrower(model_without_memory(config), share) == expected


def test_units_fewer_than_a_step_stay() -> None:
    banks = {"common": {"modalities": ["text", "image", "audio"], "intermediate_size": 8}}
    model = model_without_memory(tiny_config(expert_banks=banks, mlp_layer_types=["sparse"] * 3))
    assert narrower(model, 0.5) == {"shared_experts": 16, "experts:common": 8}


@pytest.mark.parametrize(("depth", "expected"), [(1, {1: 1}), (2, {1: 1, 2: 2}), (3, {1: 1, 3: 3}), (4, {2: 2, 4: 4})])
def test_states_are_learned_at_half_the_depth_and_at_its_end(depth: int, expected: dict[int, int]) -> None:
    assert same_layers(tiny_config(num_hidden_layers=depth)) == expected


def test_groups_are_rounded_as_far_as_their_rows_can_be_divided() -> None:
    model = model_without_memory(tiny_config())
    names = ["experts", "attention", "cross_modal", "shared_experts", "dense", "connectors", "head", "embeddings"]
    assert formats(model, ()) == dict.fromkeys([*names, "towers"], "int8")
    assert formats(model, (), with_towers=False) == dict.fromkeys(names, "int8")
    found = formats(model, DENSE)
    assert {name for name, kind in found.items() if kind == "int4"} == set(DENSE)
    assert list(found) == [*names, "towers"]
    # Rows of 24 are no multiple of 16.
    odd = model_without_memory(tiny_config(moe_intermediate_size=24))
    assert formats(odd, DENSE) == found | {"experts": "int8"}
    dense = model_without_memory(tiny_config(mlp_layer_types=["dense"] * 3, expert_banks={}, cross_modal_layers=[]))
    assert list(formats(dense, EXPERTS)) == ["attention", "dense", "connectors", "head", "embeddings", "towers"]


def test_plans_go_from_the_mildest_to_the_harshest() -> None:
    plans = list(default_plans(CONFIG, has_rows=True))
    model = model_without_memory(CONFIG)
    assert model.config.text_config.num_hidden_layers == 2
    mild = [formats(model, (), with_towers=False), *(formats(model, bits) for bits in ((), EXPERTS, DENSE))]
    assert [[step.groups for step in plan] for plan in plans[:4]] == [[groups] for groups in mild]  # type: ignore[union-attr]
    assert list(default_plans(CONFIG, has_rows=False)) == plans[:4]
    assert len(plans) == 4 + 2 * len(KEPT)
    for number, (experts, units) in enumerate(KEPT):
        for plan, bits in zip(plans[4 + 2 * number :][:2], (EXPERTS, DENSE), strict=True):
            prune, distil, rounding = plan
            assert isinstance(prune, Prune) and isinstance(distil, Distil) and isinstance(rounding, Quantize)
            assert prune.experts == fewer_experts(CONFIG, experts) and prune.dense == narrower(model, units)
            assert distil.sections == {"distillation": {"distilled_layers": {1: 1, 2: 2}}}
            smaller = model_without_memory(CONFIG)
            outline(prune, smaller)
            assert rounding.groups == formats(smaller, bits)
    sizes = [sizes_of(plan, CONFIG)[-1] for plan in plans[:4]]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 4


def test_a_dense_model_has_no_experts_to_prune() -> None:
    config = tiny_config(mlp_layer_types=["dense"] * 3, expert_banks={}, cross_modal_layers=[])
    assert all(len(plan) == 1 for plan in default_plans(config, has_rows=True))


def recipe(**values: Any) -> CompressionRecipe:
    return CompressionRecipe(model="m", output_dir="o", **values)


def test_sizes_are_those_after_each_step() -> None:
    model = model_without_memory(CONFIG)
    prune = Prune(experts={"text": 2})
    outline(prune, model)
    first = bytes_on_disk(model)
    outline(INT8, model)
    assert sizes_of((prune, INT8), CONFIG) == (first, bytes_on_disk(model))
    with pytest.raises(ValueError, match=r"^compress, step 2 \(quantize\): .*'expert'"):
        sizes_of((prune, Quantize({"expert": "int8"})), CONFIG)


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of 1,000 bytes, and plans of 900, 700, 800 and 500; with rows one of 300."""
    plans = {(Quantize(f"{size}"),): size for size in (900, 700, 800, 500, 300)}
    monkeypatch.setattr(module, "bytes_on_disk", lambda model: 1000)
    monkeypatch.setattr(module, "default_plans", lambda config, has_rows: list(plans)[: None if has_rows else -1])
    monkeypatch.setattr(module, "sizes_of", lambda steps, config: (1000, plans[steps]))


@pytest.mark.parametrize(
    ("target", "size"),
    # A share is one of the model's bytes, rounded down.
    [(999, 900), (900, 900), (899, 700), (700, 700), (699, 500), (500, 500), (0.9, 900), (0.8999, 700), (0.5, 500)],
)
def test_the_first_plan_that_reaches_the_target_is_taken(made_up: None, target: float, size: int) -> None:
    found = look_ahead(recipe(target_bytes=target), CONFIG)
    assert (found.steps, found.before, found.after) == ((Quantize(f"{size}"),), 1000, (1000, size))
    assert (found.bytes, found.target) == (size, target if isinstance(target, int) else int(target * 1000))


@pytest.mark.parametrize(
    ("target", "has_rows", "said"),
    [
        (499, False, "smallest default plan has 500 bytes; the target is 499; with training rows"),
        (299, True, "smallest default plan has 300 bytes; the target is 299; name steps of your own"),
        (0.2, True, "the target is 200;"),
        (1000, True, "the model has 1,000 bytes, within the target of 1,000: nothing to do"),
        (1001, False, "the model has 1,000 bytes, within the target of 1,001: nothing to do"),
    ],
)
def test_a_target_out_of_reach_is_refused_with_both_numbers(
    made_up: None, target: float, has_rows: bool, said: str
) -> None:
    rows = {"data": {"train_data": "x"}} if has_rows else {"data": {"eval_data": "x"}}
    with pytest.raises(ValueError, match=f"compress: .*{said}"):
        look_ahead(recipe(target_bytes=target, **rows), CONFIG)


def test_steps_of_a_recipe_are_held_to_its_target() -> None:
    (size,) = sizes_of((INT8,), CONFIG)
    for target in (None, size):
        found = look_ahead(recipe(steps=(INT8,), target_bytes=target), CONFIG)
        assert (found.steps, found.after, found.target) == ((INT8,), (size,), target)
    with pytest.raises(ValueError, match=f"compress: the steps come to {size:,} bytes; the target is {size - 1:,}$"):
        look_ahead(recipe(steps=(INT8,), target_bytes=size - 1), CONFIG)


def test_an_outlook_prints_bytes_and_shares() -> None:
    outlook = Outlook((INT8, Distil()), 4_000, (1_500, 1_000), target=1_250)
    assert str(outlook).splitlines() == [
        f"{'plan':<16}{'bytes':>16}{'':>12}{'share':>8}",
        f"{'now':<16}{'4,000':>16}{'4.0 kB':>12}{'1.000':>8}",
        f"{'1 quantize':<16}{'1,500':>16}{'1.5 kB':>12}{'0.375':>8}",
        f"{'2 distil':<16}{'1,000':>16}{'1.0 kB':>12}{'0.250':>8}",
        f"{'target':<16}{'1,250':>16}{'1.2 kB':>12}{'0.312':>8}",
    ]
    assert (outlook.bytes, Outlook((), 7, ()).bytes) == (1_000, 7)
    assert "target" not in str(Outlook((), 7, ()))
