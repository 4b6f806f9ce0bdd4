"""Planned memory against measured; the other cases are those of `python -m benchmarks.plan_memory`."""

import pytest
import torch

from benchmarks.plan_memory import CASES, planned_and_measured
from chorus_moe.training.scale.layout import Layout
from chorus_moe.training.scale.plan_memory import Rows, measure_pieces
from chorus_moe.training.scale.plan_model import PlannedModel
from tests.conftest import tiny_config


@pytest.mark.parametrize("name", ["whole", "lora, checkpointed", "windows, own gates"])
def test_a_plan_is_right_to_15_percent(name: str) -> None:
    found = planned_and_measured(CASES[name])
    assert 0.85 < found["planned_over_measured"] < 1.15
    # Without weights and moments, which no plan counts wrong.
    assert 0.85 < found["activations_ratio"] < 1.15


def test_nothing_is_allocated_and_the_model_stays_on_the_meta_device() -> None:
    planned = PlannedModel(tiny_config())
    rows = Rows(2, 32, {"text": 1.0})
    whole = measure_pieces(planned, Layout(), rows, torch.float32, on_gpu=True)
    assert all(parameter.is_meta for parameter in planned.model.parameters())
    again = measure_pieces(planned, Layout(), rows, torch.float32, on_gpu=True)
    assert whole == again
    # What a layer keeps when it is computed twice is its output, and the routing.
    first = whole.layers[0]
    assert first.kept_checkpointed == 2 * 32 * 64 * 4 < first.kept


def test_rows_of_all_modalities_sum_to_the_tokens() -> None:
    rows = Rows(3, 7, {"text": 0.5, "image": 0.3, "audio": 0.2})
    assert rows.of("text") + rows.of("image") + rows.of("audio") == 21


def test_a_context_cuts_what_the_layers_keep_and_nothing_else() -> None:
    planned = PlannedModel(tiny_config(num_key_value_heads=4))
    rows = Rows(1, 64, {"text": 1.0})
    whole, cut = (measure_pieces(planned, Layout(context=size), rows, torch.float32, on_gpu=True) for size in (1, 4))
    assert (cut.encoders, cut.embeddings, cut.head) == (whole.encoders, whole.embeddings, whole.head)
    for layer, slice_of_it in zip(whole.layers, cut.layers, strict=True):
        assert slice_of_it.kept < 0.3 * layer.kept
