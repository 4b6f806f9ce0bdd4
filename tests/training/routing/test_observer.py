"""What is counted: real tokens, once each, whoever calls the model and however it is wrapped."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from chorus_moe import ChorusForConditionalGeneration
from chorus_moe.modeling.moe_selection import count_choices
from chorus_moe.training.lora import lora_config
from chorus_moe.training.routing.counters import BankCounters, RoutingCounters
from chorus_moe.training.routing.observer import RoutingObserver
from tests.conftest import tiny_batch, tiny_config

Batch = dict[str, Tensor]


@pytest.fixture
def batch() -> Batch:
    return tiny_batch(tiny_config())


def make(**text: object) -> ChorusForConditionalGeneration:
    torch.manual_seed(0)
    return ChorusForConditionalGeneration(tiny_config(**text))


def choices(counters: RoutingCounters) -> list[list[list[int]]]:
    return [bank.choices_ME.tolist() for bank in counters.all()]


def counted(model: nn.Module, batch: Batch, training_only: bool = False) -> list[list[list[int]]]:
    with RoutingObserver(model, training_only=training_only) as observer:
        model(**batch)
    return choices(observer.counters)


@contextmanager
def one_process(folder: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def test_counts_are_those_of_the_choices_made(model: ChorusForConditionalGeneration, batch: Batch) -> None:
    with RoutingObserver(model) as observer:
        model(**batch)
    layers = model(**batch, output_router_logits=True).routing
    for banks, layer in zip(observer.counters.banks.values(), layers, strict=True):
        for name, routing in layer.items():
            assert torch.equal(banks[name].choices_ME.sum(dim=0), count_choices(routing))


def test_tokens_are_counted_by_modality_without_padding(model: ChorusForConditionalGeneration, batch: Batch) -> None:
    with RoutingObserver(model) as observer:
        model(**batch)
    real = batch["attention_mask"].bool()
    expected = [int(((batch["mm_token_type_ids"] == value) & real).sum()) for value in (0, 1, 3)]
    assert not real.all()
    for banks in observer.counters.banks.values():
        assert banks["common"].tokens_M.tolist() == expected
        assert banks["audio"].tokens_M.tolist() == [0, 0, expected[2]]


def test_the_weights_of_a_modality_sum_to_its_tokens(model: ChorusForConditionalGeneration, batch: Batch) -> None:
    """Gate and router are softmaxes: over all banks and experts of a layer a token weighs one."""
    with RoutingObserver(model) as observer:
        model(**batch)
    for banks in observer.counters.banks.values():
        weight_M = sum(bank.weights_ME.sum(dim=1) for bank in banks.values())
        # Sums of float32 weights in float64: worst difference seen is 3e-7 a token.
        torch.testing.assert_close(weight_M, banks["common"].tokens_M.double(), rtol=1e-5, atol=0)


def test_unused_slots_are_no_choices(batch: Batch) -> None:
    model = make(expert_banks={"common": {"adaptive_experts": True}}).eval()
    with RoutingObserver(model) as observer:
        model(**batch, complexity_scores=torch.zeros(batch["input_ids"].shape))
    for bank in observer.counters.all():
        assert int(bank.choices_ME.sum()) == int(bank.tokens_M.sum()) > 0


def test_choices_that_found_no_room_are_counted(batch: Batch) -> None:
    model = make(expert_banks={"common": {"expert_capacity": 2, "capacity_overflow": "drop"}}).train()
    with RoutingObserver(model) as observer:
        model(**batch)
    for bank in observer.counters.all():
        assert bank.dropped > 0
        assert int(bank.choices_ME.sum()) + bank.dropped == 2 * int(bank.tokens_M.sum())


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpointed_layer_counts_once(batch: Batch, use_reentrant: bool) -> None:
    plain = counted(make(router_aux_loss_coef=0.0).train(), batch, training_only=True)
    model = make(router_aux_loss_coef=0.0).train()
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    with RoutingObserver(model, training_only=True) as observer:
        model(**batch).loss.backward()
    assert choices(observer.counters) == plain


def test_evaluation_and_baselines_do_not_count_as_training(batch: Batch) -> None:
    model = make()
    nothing = choices(RoutingCounters(model.config.text_config))
    assert counted(model.eval(), batch, training_only=True) == nothing
    with torch.no_grad():
        assert counted(model.train(), batch, training_only=True) == nothing
    assert counted(model, batch, training_only=True) != nothing


def test_adapters_and_distributed_wrappers_are_looked_through(batch: Batch, tmp_path: Path) -> None:
    expected = counted(make().eval(), batch)
    model = make().eval()
    adapted = get_peft_model(model, lora_config(model, banks="all", router="train", verbose=False)).eval()
    assert counted(adapted, batch) == expected
    with one_process(tmp_path):
        assert counted(DistributedDataParallel(make()).eval(), batch) == expected


def test_cached_generation_counts_every_token_once(model: ChorusForConditionalGeneration, batch: Batch) -> None:
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with RoutingObserver(model) as observer:
        tokens = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    # The last token is never fed back.
    grown = {**batch, "input_ids": tokens[:, :-1]}
    more = torch.ones(len(tokens), 3, dtype=torch.long)
    grown["attention_mask"] = torch.cat([batch["attention_mask"], more], dim=1)
    grown["mm_token_type_ids"] = torch.cat([batch["mm_token_type_ids"], 0 * more], dim=1)
    del grown["labels"]
    assert choices(observer.counters) == counted(model, grown)


def test_the_caller_sees_no_difference(model: ChorusForConditionalGeneration, batch: Batch) -> None:
    keys = set(model(**batch).keys())
    with RoutingObserver(model):
        assert set(model(**batch).keys()) == keys
        assert model.model(**{k: v for k, v in batch.items() if k != "labels"}).routing is None
        assert model(**batch, output_router_logits=True).routing is not None


def test_nothing_is_left_after_detaching(model: ChorusForConditionalGeneration, batch: Batch) -> None:
    decoder = model.model.language_model
    with RoutingObserver(model) as observer:
        model(**batch)
    before = choices(observer.counters)
    model(**batch)
    assert choices(observer.counters) == before
    assert not decoder._forward_pre_hooks and not decoder._forward_hooks


def test_counts_stay_exact_where_float32_stops() -> None:
    bank = BankCounters(tiny_config().text_config.banks[0])
    bank.choices_ME += 2**24
    with torch.no_grad():
        model = make().eval()
        routing = model(**tiny_batch(tiny_config()), output_router_logits=True).routing[0]["audio"]
    bank.count(routing, torch.full((len(routing.selected_experts),), 2))
    assert int(bank.choices_ME.sum()) == 12 * 2**24 + routing.selected_experts.numel()


def test_a_model_without_a_decoder_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear holds no ChorusTextModel"):
        RoutingObserver(nn.Linear(2, 2))
