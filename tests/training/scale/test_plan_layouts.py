"""What a device holds, against what transformers leaves it."""

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from chorus_moe import ChorusForConditionalGeneration
from chorus_moe.training.scale.layout import Layout
from chorus_moe.training.scale.plan_layouts import layouts, section
from chorus_moe.training.scale.plan_model import PlannedModel
from chorus_moe.training.scale.spread import shares, spread
from tests.conftest import tiny_config


@pytest.fixture(scope="module")
def planned() -> PlannedModel:
    return PlannedModel(tiny_config())


@pytest.mark.parametrize(
    "layout",
    [
        Layout(fsdp=8),
        Layout(fsdp=4, tensor=2),
        Layout(fsdp=8, expert=4),
        Layout(fsdp=4, tensor=2, expert=4),
        Layout(data=2, fsdp=4, expert=2),
        Layout(fsdp=4, context=2, expert=4),
    ],
    ids=lambda layout: layout.name,
)
def test_a_device_holds_what_transformers_leaves_it(planned: PlannedModel, layout: Layout) -> None:
    size = layout.data * layout.fsdp * layout.copies
    # A group without other processes: collectives do nothing, tensors have no data.
    dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
    try:
        with torch.device("meta"):
            model = ChorusForConditionalGeneration(tiny_config())
        spread(model, layout)
        expected = shares(model)["own"]
    finally:
        dist.destroy_process_group()
    part = planned.shares(layout)
    assert sum(n * part.held(w.name, w.shape) for unit, n in planned.kinds.items() for w in unit) == expected


def test_every_layout_uses_all_devices_once() -> None:
    found = list(layouts(8))
    assert len(found) == len(set(found)) and Layout(fsdp=8, expert=8) in found and Layout(8, zero=3) in found
    assert all(layout.data * layout.fsdp * layout.copies == 8 for layout in found)
    assert Layout(fsdp=2, expert=8, context=4) in found
    # What a recipe refuses: copies of a tensor group without FSDP.
    assert not [layout for layout in found if layout.tensor > 1 and layout.data > 1 and layout.fsdp == 1]
    assert section(Layout(data=2, fsdp=4, expert=2)) == {"data": 2, "fsdp": 4, "expert": 2}


def test_a_refusal_names_both_numbers(planned: PlannedModel) -> None:
    assert planned.refusal(Layout(tensor=4)) == "parallel.tensor=4 does not divide num_key_value_heads=2"
    assert "parallel.expert=8 does not divide the 4 experts" in str(planned.refusal(Layout(fsdp=8, expert=8)))
    assert planned.refusal(Layout(fsdp=4, expert=4)) is None
