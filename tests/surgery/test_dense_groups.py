"""Units and where they lie in tensors, against slices written by hand."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from chorus_moe import ChorusForConditionalGeneration
from chorus_moe.surgery.dense_groups import (
    Group,
    Place,
    decoder_groups,
    groups_of,
    magnitude,
    owners_of,
    scores_of,
    tower_depth,
    tower_group,
    tower_layers,
)
from tests.conftest import tiny_config

ROWS, COLUMNS, STACKED = Place("(.*)", 0), Place("(.*)", 1), Place("(.*)", 1, blocks=2)


def test_units_of_several_rows_are_summed_and_cut_together() -> None:
    tensor, group = torch.arange(24.0).view(6, 4), Group(3, (ROWS,))
    assert group.sums(tensor, ROWS).tolist() == [sum(range(0, 8)), sum(range(8, 16)), sum(range(16, 24))]
    assert torch.equal(group.cut(tensor, ROWS, torch.tensor([0, 2])), tensor[[0, 1, 4, 5]])
    assert torch.equal(group.cut(tensor, ROWS, torch.tensor([1])), tensor[2:4])


def test_units_lie_in_columns_and_in_vectors() -> None:
    tensor, group = torch.arange(12.0).view(3, 4), Group(2, (COLUMNS,))
    assert group.sums(tensor, COLUMNS).tolist() == [0 + 1 + 4 + 5 + 8 + 9, 2 + 3 + 6 + 7 + 10 + 11]
    assert torch.equal(group.cut(tensor, COLUMNS, torch.tensor([1])), tensor[:, 2:])
    bias = torch.tensor([1.0, 2.0, 3.0])
    assert Group(3, (ROWS,)).sums(bias, ROWS).tolist() == [1, 2, 3]
    assert Group(3, (ROWS,)).cut(bias, ROWS, torch.tensor([0, 2])).tolist() == [1, 3]


def test_experts_have_units_of_their_own_in_gate_and_up() -> None:
    # Two experts, three units: rows 0 to 2 are gates, 3 to 5 ups.
    tensor, group = torch.arange(24.0).view(2, 6, 2), Group(3, (STACKED,), per_expert=True)
    expected = [[float(tensor[e, [n, 3 + n]].sum()) for n in range(3)] for e in range(2)]
    assert group.sums(tensor, STACKED).tolist() == expected
    cut = group.cut(tensor, STACKED, torch.tensor([[0, 1], [1, 2]]))
    assert torch.equal(cut, torch.stack([tensor[0, [0, 1, 3, 4]], tensor[1, [1, 2, 4, 5]]]))
    down, place = torch.arange(12.0).view(2, 2, 3), Place("(.*)", 2)
    assert torch.equal(group.sums(down, place), down.sum(dim=1))
    cut = group.cut(down, place, torch.tensor([[0], [2]]))
    assert torch.equal(cut, torch.stack([down[0, :, [0]], down[1, :, [2]]]))


def test_a_name_is_found_as_a_whole_in_the_first_place_that_fits() -> None:
    group = Group(1, (Place(r"layers\.(\d+)\.w", 0), Place(r"layers\.(\d+)\.\w+", 1)))
    assert group.find("layers.12.w") == ("12", group.places[0])
    assert group.find("layers.12.v") == ("12", group.places[1])
    assert group.find("layers.12.w.bias") is None and group.find("x.layers.12.w") is None


def test_scores_add_up_over_all_tensors_of_an_owner_in_float64() -> None:
    group = Group(2, (Place(r"(\d)\.in", 0), Place(r"(\d)\.out", 1)))
    values = {
        "0.in": torch.tensor([1.0, 2.0]),
        "0.out": torch.tensor([[10.0, 20.0], [100.0, 200.0]]),
        "1.in": torch.tensor([3.0, 2.0**24]),
        "1.out": torch.tensor([[0.0, 1.0]]),
        "other": torch.ones(7),
    }
    found = scores_of(values, group)
    assert {name: value.tolist() for name, value in found.items()} == {"0": [111, 222], "1": [3, 2**24 + 1]}


def test_magnitudes_order_units_as_torchs_own_pruning() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(5, 4, bias=False)
    found = scores_of(magnitude(linear), Group(4, (Place("()weight", 0),)))[""]
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, linear.weight.detach().double().norm(dim=1).square())
    least = int(found.argmin())
    prune.ln_structured(linear, "weight", amount=1, n=2, dim=0)
    assert not linear.weight[least].any() and linear.weight.any(dim=1).sum() == 3


def made(**text: Any) -> ChorusForConditionalGeneration:
    torch.manual_seed(0)
    return ChorusForConditionalGeneration(tiny_config(**text))


def test_groups_of_the_decoder_hold_each_tensor_of_their_kind() -> None:
    model = made(attention_bias=True, attention_output_bias=True, mlp_bias=True)
    text, decoder = model.config.text_config, model.model.language_model
    groups = decoder_groups(text)
    sizes = {name: group.size for name, group in groups.items()}
    banks = {f"experts:{name}": 32 for name in ("audio", "common", "image", "text")}
    assert sizes == {"heads": 2, "feed_forward": 96, "shared_experts": 32} | banks
    assert {name for name, group in groups.items() if group.per_expert} == set(banks)
    owned: dict[str, set[str]] = {name: set() for name in groups}
    for name, parameter in decoder.named_parameters():
        for kind, group in groups.items():
            if (found := group.find(name)) is not None:
                place = found[1]
                assert parameter.shape[place.dim] % (place.blocks * group.size) == 0
                owned[kind].add(name)
    ends = {
        "heads": ("q_proj", "k_proj", "v_proj", "o_proj.weight", "o_proj.text.weight"),
        "feed_forward": ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj.weight"),
        "shared_experts": ("shared_experts.gate_proj", "shared_experts.up_proj", "shared_experts.down_proj.weight"),
    }
    for kind, marks in ends.items():
        expected = {name for name, _ in decoder.named_parameters() if any(mark in name for mark in marks)}
        assert owned[kind] == expected != set()
    for kind in banks:
        name = kind.partition(":")[2]
        assert owned[kind] == {n for n, _ in decoder.named_parameters() if f".banks.{name}.experts." in n}
    # Each tensor is in one group.
    assert sum(map(len, owned.values())) == len(set().union(*owned.values()))


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ({"mlp_layer_types": ["sparse"] * 3}, "feed_forward"),
        ({"shared_expert_intermediate_size": 0}, "shared_experts"),
        ({"mlp_layer_types": ["dense"] * 3}, "shared_experts"),
    ],
)
def test_a_decoder_has_the_groups_of_its_layers(text: dict[str, Any], missing: str) -> None:
    whole, found = decoder_groups(tiny_config().text_config), decoder_groups(tiny_config(**text).text_config)
    assert missing in whole and missing not in found


class Block(nn.Module):
    def __init__(self, width: int, first: str, second: str, kind: type[nn.Module] = nn.Linear):
        super().__init__()
        ends: Any = ((first, kind(3, width)), (second, kind(width, 3)))
        for name, layer in ends:
            target: nn.Module = self
            *outer, last = name.split(".")
            for step in outer:
                if not hasattr(target, step):
                    target.add_module(step, nn.Module())
                target = getattr(target, step)
            target.add_module(last, layer)


PAIRS = [("fc1", "fc2"), ("intermediate_dense", "output_dense"), ("intermediate.dense", "output.dense"),
         ("sequential.1", "sequential.4")]  # fmt: skip


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_units_of_encoders_lie_between_a_pair_of_layers(first: str, second: str) -> None:
    tower = nn.ModuleDict({"layers": nn.ModuleList([Block(6, first, second), Block(6, first, second)])})
    group = tower_group(tower)
    assert group is not None and group.size == 6 and not group.per_expert
    found = {name: group.find(name) for name, _ in tower.named_parameters()}
    for layer in (0, 1):
        owner = f"layers.{layer}"
        for name, dim in ((f"{first}.weight", 0), (f"{first}.bias", 0), (f"{second}.weight", 1)):
            owner_found, place = found[f"{owner}.{name}"] or ("", ROWS)
            assert (owner_found, place.dim, place.blocks) == (owner, dim, 1)
        assert found[f"{owner}.{second}.bias"] is None


def test_encoders_whose_layers_differ_or_are_no_pairs_have_no_units() -> None:
    assert tower_group(nn.ModuleList([Block(6, "fc1", "fc2"), Block(5, "fc1", "fc2")])) is None
    assert tower_group(nn.ModuleList([Block(6, "fc1", "other")])) is None
    assert tower_group(nn.ModuleList([Block(6, "fc1", "fc2", OddLinear)])) is None
    # The first kind that is there counts.
    both = tower_group(nn.ModuleList([Block(6, "fc1", "fc2"), Block(4, "sequential.1", "sequential.4")]))
    assert both is not None and both.size == 6
    alone = nn.Module()
    alone.add_module("fc1", nn.Linear(3, 3))
    assert tower_group(alone) is None


class OddLinear(nn.Module):
    def __init__(self, a: int, b: int):
        super().__init__()
        self.out_features = b


def config_of(**values: Any) -> Any:
    return SimpleNamespace(**values)


def test_depth_is_what_configurations_of_encoders_call_it() -> None:
    tower = nn.Module()
    assert tower_depth(tower, config_of(num_hidden_layers=3)) == 3
    assert tower_depth(tower, config_of(encoder_layers=2, num_hidden_layers=3)) == 2
    assert tower_depth(tower, config_of(num_hidden_layers=3, backbone_config=config_of(num_hidden_layers=5))) == 5
    assert tower_depth(tower, config_of()) is None
    timm = nn.Module()
    timm.timm_model = nn.Module()
    assert tower_depth(timm, config_of(num_hidden_layers=3)) is None
    timm.timm_model.blocks = nn.Sequential(nn.Identity(), nn.Identity())
    assert tower_depth(timm, config_of(num_hidden_layers=3)) == 2
    timm.timm_model.blocks = nn.ModuleList([nn.Identity()])
    assert tower_depth(timm, config_of()) == 1
    timm.timm_model.blocks = nn.Identity()
    assert tower_depth(timm, config_of()) is None


def tower_with(**lists: int) -> nn.Module:
    """Lists of so many layers, by path with `__` for a dot."""
    tower = nn.Module()
    for path, count in lists.items():
        target, steps = tower, path.split("__")
        for step in steps[:-1]:
            if not hasattr(target, step):
                target.add_module(step, nn.Module())
            target = getattr(target, step)
        target.add_module(steps[-1], nn.ModuleList(nn.Identity() for _ in range(count)))
    return tower


@pytest.mark.parametrize(
    ("lists", "expected"),
    [
        ({"blocks": 2}, "blocks"),
        ({"model__encoder__layers": 2}, "model.encoder.layers"),
        ({"encoder__layer": 2}, "encoder.layer"),
        ({"encoder__layers": 3}, None),
        ({"stages": 2}, None),
        ({"stages": 2, "layers": 2}, "layers"),
        # Which of two it is, nobody says; too deep inside is another thing.
        ({"layers": 2, "encoder__layers": 2}, None),
        ({"a__b__c__layers": 2}, None),
    ],
)
def test_the_list_of_layers_is_found_by_name_and_length(lists: dict[str, int], expected: str | None) -> None:
    assert tower_layers(tower_with(**lists), config_of(num_hidden_layers=2)) == expected


def test_owners_are_the_decoder_and_the_towers_that_are_there() -> None:
    model = made().model
    owners = owners_of(model)
    assert list(owners) == ["language_model", "vision_tower", "audio_tower"]
    assert owners["audio_tower"] is model.audio_tower
    model.vision_tower = None
    assert list(owners_of(model)) == ["language_model", "audio_tower"]


def test_groups_of_a_model_are_named_after_their_tower() -> None:
    model = made()
    owners = owners_of(model.model)
    found = {owner: dict(groups_of(model.config, owner, module)) for owner, module in owners.items()}
    assert found["language_model"] == decoder_groups(model.config.text_config)
    assert list(found["vision_tower"]) == ["vision_tower.feed_forward"]
    assert found["vision_tower"]["vision_tower.feed_forward"].size == 4 * 32
    assert found["audio_tower"]["audio_tower.feed_forward"].size == 64
    assert dict(groups_of(model.config, "vision_tower", nn.Identity())) == {}


def test_each_number_of_a_group_is_in_one_unit() -> None:
    """Sums over units are sums over tensors, whatever the group."""
    model = made()
    for owner, module in owners_of(model.model).items():
        squares: dict[str, Tensor] = magnitude(module)
        for _, group in groups_of(model.config, owner, module):
            expected = sum(float(value.sum()) for name, value in squares.items() if group.find(name))
            found = sum(float(value.sum()) for value in scores_of(squares, group).values())
            assert found == pytest.approx(expected, rel=1e-9)
