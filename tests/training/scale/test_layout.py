"""Layouts that cannot work are refused by name, with both sizes, before anything is loaded."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainingArguments

from chorus_moe.training.recipe import build_recipe
from chorus_moe.training.scale.layout import (
    Layout,
    ParallelArguments,
    accumulation,
    check_arguments,
    check_layout,
    layout_of,
)
from tests.conftest import tiny_config

WINDOWS = {"layer_types": ["sliding_attention"] * 3, "sliding_window": 6}
MEMORY = {"layer_types": ["hybrid_sliding"] * 3, "sliding_window": 6, "num_memory_tokens": 2}


@pytest.mark.parametrize(
    ("asked", "processes", "expected"),
    [
        ({}, 1, Layout()),
        ({}, 4, Layout(data=4)),
        ({"fsdp_size": 2}, 4, Layout(data=2, fsdp=2)),
        ({"fsdp_size": 4, "expert_size": 2}, 4, Layout(fsdp=4, expert=2)),
        ({"data_size": 2, "fsdp_size": 2, "tensor_size": 2, "expert_size": 4}, 8, Layout(2, 2, 2, 4)),
        ({"context_size": 2}, 4, Layout(data=2, context=2)),
        ({"context_size": 2, "fsdp_size": 2, "expert_size": 4}, 4, Layout(fsdp=2, expert=4, context=2)),
    ],
)
def test_what_is_left_are_copies(asked: dict[str, int], processes: int, expected: Layout) -> None:
    assert layout_of(ParallelArguments(**asked), processes) == expected


@pytest.mark.parametrize(
    ("asked", "processes", "message"),
    [
        ({"fsdp_size": 3}, 4, "fsdp 3 x tensor 1 = 3 does not divide the 4 processes"),
        ({"data_size": 2, "fsdp_size": 2}, 8, "data 2 x fsdp 2 x tensor 1 = 4, but the run has 8"),
        ({"fsdp_size": 4, "expert_size": 3}, 4, "parallel.expert=3 must divide fsdp 4 x tensor 1 = 4"),
        ({"tensor_size": 4, "expert_size": 2}, 4, "be a multiple of tensor 4"),
        ({"tensor_size": 2}, 4, "data 2 x tensor 2 without fsdp"),
        ({"context_size": 2}, 3, "fsdp 1 x context 2 = 2 does not divide the 3 processes"),
        ({"context_size": 2, "tensor_size": 2}, 4, "parallel.context=2 beside tensor=2"),
        ({"context_size": 2, "expert_size": 2}, 2, "parallel.expert=2 must divide fsdp 1 = 1"),
        ({"context_size": 2, "zero_stage": 1}, 2, "parallel.zero=1 beside context=2"),
        ({"fsdp_size": 0}, 1, "parallel.fsdp must be 1 or more, found 0"),
        ({"zero_stage": 4}, 2, "parallel.zero must be 0 to 3, found 4"),
        ({"zero_stage": 3, "fsdp_size": 2}, 2, "parallel.zero=3 beside fsdp=2"),
    ],
)
def test_sizes_that_do_not_go_together_are_refused(asked: dict[str, int], processes: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layout_of(ParallelArguments(**asked), processes)


@pytest.mark.parametrize(
    ("layout", "options", "message"),
    [
        (Layout(tensor=3), {}, "parallel.tensor=3 does not divide num_attention_heads=4"),
        (Layout(fsdp=3, expert=3), {}, "parallel.expert=3 does not divide the 4 experts of bank"),
        (Layout(fsdp=2, expert=2), {"experts_layout": "linear"}, "experts in linear layers do not travel"),
        (Layout(context=4), {}, "parallel.context=4 does not divide num_key_value_heads=2"),
        (Layout(context=2), MEMORY, "num_memory_tokens=2 are sums over the whole sequence"),
        (Layout(context=2), WINDOWS | {"is_causal": False, "num_global_tokens": 3}, "num_global_tokens=3 of a bidirec"),
        (
            Layout(context=2),
            {"expert_banks": {"common": {"expert_capacity": 2}}},
            "bank 'common' has expert_capacity=2",
        ),
    ],
)
def test_a_model_that_does_not_divide_is_refused(layout: Layout, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_layout(layout, tiny_config(**options))


def test_accumulation_makes_up_the_rows_of_a_step() -> None:
    assert [accumulation(24, 2, processes) for processes in (1, 2, 3, 4)] == [12, 6, 4, 3]
    with pytest.raises(ValueError, match=r"parallel.rows=24 .* 2 x 5 .* = 10"):
        accumulation(24, 2, 5)


def test_a_recipe_writes_sizes_by_their_short_names() -> None:
    sections = {"parallel": {"data": 2, "fsdp": 4, "rows": 64}}
    found = build_recipe(sections, "recipe.yaml", ["--expert_size", "2"]).parallel
    assert found == ParallelArguments(data_size=2, fsdp_size=4, expert_size=2, rows_per_step=64)
    with pytest.raises(ValueError, match="section 'parallel' has no 'tensors'"):
        build_recipe({"parallel": {"tensors": 2}}, "recipe.yaml")


def test_zero_without_deepspeed_says_what_to_install() -> None:
    if __import__("importlib.util").util.find_spec("deepspeed") is not None:
        pytest.skip("deepspeed is installed")
    with pytest.raises(ImportError, match=r"parallel.zero=3: deepspeed is not installed"):
        build_recipe({"parallel": {"zero": 3}}, "recipe.yaml")


@pytest.mark.parametrize(
    ("layout", "settings", "says"),
    [
        (Layout(zero=1), {}, "parallel.zero=1: accelerate starts DeepSpeed on accelerators alone, .* found cpu"),
        (Layout(), {"fsdp": True}, "training.fsdp on a CPU"),
        (Layout(fsdp=2), {"fsdp": True}, "training.fsdp beside parallel"),
        (Layout(context=2), {"fsdp": True}, "training.fsdp beside parallel"),
        (Layout(fsdp=2), {"push_to_hub": True}, "training.push_to_hub: fsdp 2"),
    ],
)
def test_arguments_that_would_do_something_else_are_refused(
    layout: Layout, settings: dict[str, Any], says: str, tmp_path: Path
) -> None:
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", **settings)
    with pytest.raises(ValueError, match=says):
        check_arguments(layout, arguments)


def test_zero_leaves_an_upload_to_the_user_where_no_process_holds_the_model() -> None:
    # As accelerate makes them on accelerators.
    state = SimpleNamespace(backend="nccl", distributed_type="DEEPSPEED")
    arguments: Any = SimpleNamespace(distributed_state=state, fsdp=None, push_to_hub=True)
    check_arguments(Layout(data=2, zero=2), arguments)
    with pytest.raises(ValueError, match="training.push_to_hub: data 2 x zero 3"):
        check_arguments(Layout(data=2, zero=3), arguments)


@pytest.mark.parametrize(
    "state",
    [
        None,
        SimpleNamespace(backend=None, distributed_type="DEEPSPEED"),
        SimpleNamespace(backend="nccl", distributed_type="MULTI_GPU"),
    ],
)
def test_zero_is_refused_where_accelerate_does_not_start_deepspeed(state: Any) -> None:
    device = SimpleNamespace(type="cuda")
    arguments: Any = SimpleNamespace(distributed_state=state, fsdp=None, push_to_hub=False, device=device)
    check_arguments(Layout(data=2), arguments)
    with pytest.raises(ValueError, match="parallel.zero=2: accelerate starts DeepSpeed .* found cuda"):
        check_arguments(Layout(data=2, zero=2), arguments)
