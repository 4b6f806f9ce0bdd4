"""`docs/guides/add_a_router.md` to the letter: its line and its class, and all that it says follows by itself."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError

from chorus_moe import ChorusForConditionalGeneration
from chorus_moe.modeling import moe_routers
from chorus_moe.modeling.configuration_banks import ROUTERS
from chorus_moe.modeling.losses import balance_loss, switch_loss
from chorus_moe.modeling.moe_routers import ROUTER_CLASSES, Router
from chorus_moe.surgery import merge_experts, prune_experts
from chorus_moe.training.routing.observer import RoutingObserver
from tests.conftest import ROUNDING, tiny_batch, tiny_config
from tests.guides.pages import code_blocks
from tests.modeling.text_parents import save_parent, text_difference, tiny_towers
from tests.parents import build

NAME = "cosine"


@pytest.fixture(autouse=True)
def cosine(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Router]]:
    """The page's line in the table and its class in the module, for a test."""
    line, class_block = code_blocks("add_a_router.md")
    for name, balance in ast.literal_eval(f"{{{line}}}").items():
        monkeypatch.setitem(ROUTERS, name, balance)
    exec(compile(class_block, "add_a_router.md", "exec"), dict(vars(moe_routers)))
    yield ROUTER_CLASSES[NAME]
    del ROUTER_CLASSES[NAME]


def make(**bank: Any) -> ChorusForConditionalGeneration:
    torch.manual_seed(0)
    banks = {name: {"router": NAME, "num_experts": 8, **bank} for name in ("text", "common")}
    return ChorusForConditionalGeneration(tiny_config(expert_banks=banks)).eval()


def routers(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, Router)]


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**tiny_batch(model.config)).logits


def test_a_step_trains_all_its_parameters_from_where_the_class_starts_them(cosine: type[Router]) -> None:
    model = make().train()
    assert all(type(router) is cosine and router.scale.item() == 10.0 for router in routers(model))
    assert 0 < routers(model)[0].directions.std() < 0.05
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = [parameter.clone() for router in routers(model) for parameter in router.parameters()]
    model(**tiny_batch(model.config)).loss.backward()
    optimizer.step()
    after = [parameter for router in routers(model) for parameter in router.parameters()]
    assert all(not torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_the_loss_and_the_statistics_read_its_probabilities(cosine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    assert {bank.balance for bank in model.config.text_config.banks} == {"switch"}
    with RoutingObserver(model) as observer, torch.no_grad():
        routing = model(**tiny_batch(model.config), output_router_logits=True).routing
    found = observer.counters.banks[1]["common"].probabilities_ME.sum(dim=0)
    expected = cosine.probabilities(routing[0]["common"].router_logits[routing[0]["common"].token_mask]).sum(dim=0)
    torch.testing.assert_close(found, expected.double(), rtol=1e-5, atol=1e-5)  # sums of float32 in another order
    even = staticmethod(lambda logits: torch.full_like(logits, 1 / logits.shape[-1]))
    monkeypatch.setattr(cosine, "probabilities", even)
    banks = {bank.name: bank for bank in model.config.text_config.banks}
    assert balance_loss(routing, banks).item() == pytest.approx(1.0, abs=1e-6)
    assert switch_loss(routing[0]["text"]).item() != pytest.approx(1.0, abs=1e-3)


def test_what_it_costs_is_counted(cosine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()

    def flops() -> int:
        with torch.no_grad():
            return int(model(**tiny_batch(model.config), output_compute=True).compute.flops.sum())

    before = flops()
    assert cosine.flops(64, 8) == 2 * 64 * 8
    monkeypatch.setattr(cosine, "flops", staticmethod(lambda hidden_size, num_experts: 2 * 64 * 8 + 1))
    batch = tiny_batch(model.config)
    real = int(batch["attention_mask"].sum())
    text = int(((batch["mm_token_type_ids"] == 0) & batch["attention_mask"].bool()).sum())
    assert flops() - before == 2 * (real + text)  # two sparse layers; the bank `common` takes every token


def test_experts_are_pruned_and_merged_with_their_rows() -> None:
    model = make()
    directions, scale = routers(model)[0].directions.clone(), routers(model)[0].scale
    score = torch.zeros(8).index_fill(0, torch.tensor([1, 4, 6]), 1.0)
    report = prune_experts(model, {"common": 3}, {layer: {"common": score} for layer in (1, 2)})
    common = model.model.language_model.layers[1].mlp.banks["common"].router
    assert torch.equal(common.directions, directions[[1, 4, 6]]) and common.scale is scale
    assert not any("outputs change" in note for note in report.notes)
    merge_experts(model, "text", 4, similarity="router")
    assert all(len(layer.mlp.banks["text"].router.directions) == 4 for layer in model.model.language_model.layers[1:])
    assert logits_of(model).isfinite().all()
    dependent = prune_experts(make(norm_topk_prob=False), {"common": 3}, {layer: {"common": score} for layer in (1, 2)})
    assert any("softmax over all experts" in note for note in dependent.notes)


@pytest.mark.parametrize(
    "bank",
    [
        {},
        {"balance": "bias"},
        {"num_groups": 2, "topk_groups": 1},
        {"adaptive_experts": True},
        {"expert_capacity": 1.5, "capacity_in_eval": True},
    ],
)
def test_it_is_saved_and_loaded_with_every_option(bank: dict[str, Any], tmp_path: Path) -> None:
    model = make(**bank)
    before = logits_of(model)
    model.save_pretrained(tmp_path)
    loaded = ChorusForConditionalGeneration.from_pretrained(tmp_path)
    torch.testing.assert_close(logits_of(loaded), before, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("split", [1, 2])
def test_upcycling_computes_what_the_parent_computes(split: int, tmp_path: Path) -> None:
    parent = save_parent(tmp_path)
    banks = {name: {"router": NAME, "num_experts": 8, "num_experts_per_tok": 4} for name in ("text", "common")}
    model = build(tmp_path, experts=banks, expert_split=split, audio=tiny_towers()[1], sparse_layers=[1, 2])
    assert text_difference(model, parent) < 1e-5  # as in test_compose_upcycling
    rows = routers(model)[0].directions
    assert torch.equal(rows[::2], rows[1::2]) == (split == 2)


def test_a_misspelt_name_gets_a_hint() -> None:
    with pytest.raises(StrictDataclassClassValidationError, match="unknown router 'cosin'; did you mean 'cosine'"):
        tiny_config(expert_banks={"text": {"router": "cosin"}})
