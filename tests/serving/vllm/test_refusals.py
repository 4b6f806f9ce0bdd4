"""What vLLM cannot do is refused by name; none of this needs vLLM."""

from types import SimpleNamespace
from typing import Any

import pytest

from chorus_moe.serving.vllm import refusals
from chorus_moe.serving.vllm.refusals import check
from tests.conftest import tiny_config

WINDOWS = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 8}


@pytest.fixture(autouse=True)
def sizes_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's own, which it is asked for where it is installed."""
    monkeypatch.setattr(refusals, "head_sizes", lambda: [32, 64, 80, 96, 112, 128])


def engine(saved: dict[str, Any] | None = None, generation_config: str = "auto", size: int = 1, **text: Any) -> Any:
    served = SimpleNamespace(
        model="tiny",
        hf_config=tiny_config(**{"num_hidden_layers": 2, "head_dim": 32} | text),
        generation_config=generation_config,
        try_get_generation_config=lambda: saved or {},
    )
    return SimpleNamespace(
        model_config=served,
        parallel_config=SimpleNamespace(tensor_parallel_size=size, pipeline_parallel_size=1),
        cache_config=SimpleNamespace(sliding_window=8),
    )


@pytest.mark.parametrize(
    "text",
    [
        {},
        WINDOWS,
        {"sliding_window": 8},
        {"skip_budget": 0.5},
        {"exit_layers": [1]},
        {"expert_banks": {"common": {"expert_capacity": 2.0}}},
    ],
    ids=["plain", "windows", "a window that no layer has", "gates of feed-forwards", "exits", "capacity in training"],
)
def test_what_is_carried_passes_and_the_engine_has_no_window_of_its_own(text: dict[str, Any]) -> None:
    asked = engine(**text)
    check(asked)
    assert asked.cache_config.sliding_window is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({**WINDOWS, "num_global_tokens": 3}, "num_global_tokens=3: vLLM's pages"),
        (
            {"layer_types": ["full_attention", "hybrid_sliding"], "sliding_window": 8, "num_memory_tokens": 2},
            "num_memory_tokens=2: vLLM's pages",
        ),
        ({"skip_budget": 0.5, "skip_scope": "layer"}, "skip_scope='layer'"),
        (
            {"expert_banks": {"common": {"expert_capacity": 2.0, "capacity_in_eval": True}}},
            "capacity_in_eval of bank 'common'",
        ),
        ({"is_causal": False}, "is_causal=False"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}},
            "rope_type='dynamic'",
        ),
        ({"size": 2}, "tensor_parallel_size=2"),
        ({"saved": {"exit_confidence": 0.9}}, "exit_confidence=0.9 of generation_config.json"),
        ({"head_dim": 16}, "head_dim=16"),
    ],
    ids=[
        "global tokens",
        "memory",
        "skipped layers",
        "capacity",
        "bidirectional",
        "angles",
        "ranks",
        "early exit",
        "head size",
    ],
)
def test_what_is_not_carried_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="tiny cannot be served by vLLM: ") as raised:
        check(engine(**options))
    assert message in str(raised.value)


def test_all_that_is_not_carried_stands_in_one_error() -> None:
    with pytest.raises(ValueError, match=r"num_global_tokens=3: .*; tensor_parallel_size=2: "):
        check(engine(size=2, num_global_tokens=3, **WINDOWS))


def test_an_early_exit_that_vllm_was_told_to_leave_out_passes() -> None:
    check(engine(saved={"exit_confidence": 0.9}, generation_config="vllm"))
