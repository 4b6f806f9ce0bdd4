"""Operations against those that a forward counts; bytes against sums by hand."""

from typing import Any

import pytest
import torch

from chorus_moe import ChorusForConditionalGeneration
from chorus_moe.training.scale.layout import Layout
from chorus_moe.training.scale.plan_memory import Rows
from chorus_moe.training.scale.plan_model import PlannedModel
from chorus_moe.training.scale.plan_rates import Rates
from chorus_moe.training.scale.plan_time import Bytes, Group, Step, decoder_flops, traffic
from tests.conftest import tiny_config

TEXT = {"text": 1.0}
SLIDING = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 6}


@pytest.mark.parametrize("text", [{}, SLIDING, SLIDING | {"is_causal": False, "sliding_window": 3}])
def test_operations_are_those_that_a_forward_counts(text: dict[str, Any]) -> None:
    model = ChorusForConditionalGeneration(tiny_config(**text)).eval()
    ids = torch.randint(5, 100, (2, 24))
    counted = model(input_ids=ids, output_compute=True).compute.flops
    planned = sum(decoder_flops(model.config.text_config, TEXT, 24)) * 24
    assert counted.tolist() == pytest.approx([planned] * 2)


def test_a_ring_over_nodes_sends_each_byte_once_into_a_node() -> None:
    # 16 devices on 2 nodes: 15 of 16 parts reach each device; half come from the other node, shared by 8 cards.
    sent = Group(16, 1, per_node=8).gather(1600.0)
    assert sent == Bytes(1600 * 15 / 16 - 100, 100)
    assert Group(8, 1, per_node=8).gather(800.0) == Bytes(700, 0)
    # One of each node: nothing stays in it.
    assert Group(4, 8, per_node=8).reduce(400.0) == Bytes(0, 600)
    assert Group(16, 1, per_node=8).exchange(1600.0) == Bytes(700, 800)


def test_experts_exchange_every_choice_there_and_back() -> None:
    planned = PlannedModel(tiny_config())
    settings = {"micro_steps": 3, "per_node": 8, "compute_bytes": 2, "gradient_bytes": 4, "checkpointing": False}
    sent = traffic(planned, Layout(fsdp=2, expert=2), Rows(1, 16, TEXT), **settings)["experts"]
    # Two sparse layers with a bank for text and one for all; 2 choices of 64 numbers, half of which leave; there and
    # back in forward and backward.
    assert sent == Bytes(3 * 2 * 2 * 16 * 2 * 64 * 2 / 2 * 4, 0)
    again = traffic(planned, Layout(fsdp=2, expert=2), Rows(1, 16, TEXT), **settings | {"checkpointing": True})
    assert again["experts"].in_node == pytest.approx(1.5 * sent.in_node)


def test_a_tensor_group_sums_what_its_plan_says() -> None:
    planned = PlannedModel(tiny_config(cross_modal_layers=[], num_hidden_layers=2))
    settings = {"micro_steps": 1, "per_node": 8, "compute_bytes": 4, "gradient_bytes": 4, "checkpointing": False}
    sent = traffic(planned, Layout(tensor=2), Rows(1, 16, TEXT), **settings)["tensor"]
    states, logits = 16 * 64 * 4, 16 * 128 * 4
    # Forward: both attentions, the dense layer, shared experts and four banks. Backward: q, k and v, gate and up, and
    # the banks. The embedding is summed, logits are gathered and their gradient is scattered.
    assert sent.in_node == pytest.approx(states * (2 + 1 + 1 + 4) + states * (6 + 2 + 2 + 4) + states + logits)


def test_transfers_of_fsdp_run_beside_the_products() -> None:
    rates = Rates(flops=100.0, in_node=10.0, between_nodes=1.0, memory=1.0, efficiency=0.5, link_efficiency=1.0)
    assert Step(50.0, {"weights": Bytes(5.0, 0.0)}).seconds(rates) == 1.0
    assert Step(50.0, {"weights": Bytes(5.0, 3.0)}).seconds(rates) == 3.0
    assert Step(50.0, {"experts": Bytes(5.0, 3.0)}).seconds(rates) == 4.0


def test_a_context_exchanges_heads_and_gathers_what_the_layers_return() -> None:
    planned = PlannedModel(tiny_config(num_key_value_heads=4))
    settings = {"micro_steps": 1, "per_node": 8, "compute_bytes": 4, "gradient_bytes": 4, "checkpointing": False}
    sent = traffic(planned, Layout(context=4), Rows(1, 16, TEXT), **settings)
    # Of four tokens, queries, keys, values and output of 64 numbers each; three quarters leave. Three layers, forward
    # and backward. Then 12 tokens of the others come in.
    assert sent["context"] == Bytes(3 / 4 * 4 * 4 * 64 * 4 * 3 * 2 + 12 * 64 * 4, 0)
    # Without fsdp each of the four has all weights, and their gradients are summed.
    trained = sum(count * weight.size for unit, count in planned.kinds.items() for weight in unit)
    assert sent["gradients"] == Bytes(2 * 3 / 4 * 4 * trained, 0)
    # The tokens that a device routes are those of its slice.
    for context, part in ((1, 1), (2, 2)):
        experts = traffic(planned, Layout(fsdp=2, expert=2, context=context), Rows(1, 16, TEXT), **settings)["experts"]
        assert experts == Bytes(2 * 2 * 16 / part * 2 * 64 * 4 / 2 * 4, 0)


@pytest.mark.parametrize(("shards", "replicas"), [(1, 2), (1, 4), (2, 2)])
def test_replicas_sum_the_gradients_of_their_shards(shards: int, replicas: int) -> None:
    planned = PlannedModel(tiny_config())
    settings = {"micro_steps": 1, "per_node": 8, "compute_bytes": 2, "gradient_bytes": 4, "checkpointing": False}
    sent = traffic(planned, Layout(data=replicas, fsdp=shards), Rows(1, 16, TEXT), **settings)["gradients"]
    trained = 4 * sum(count * weight.size for unit, count in planned.kinds.items() for weight in unit)
    # A sum over n devices sends 2 (n - 1) / n of its numbers from each; FSDP's own sends half of that, once.
    copies = 2 * (replicas - 1) / replicas * trained / shards
    assert sent.in_node == pytest.approx(copies + (shards - 1) / shards * trained)


@pytest.mark.parametrize(("stage", "gathered", "summed"), [(1, 1, 1), (2, 1, 3), (3, 2 * 3, 3)])
def test_each_stage_of_zero_sends_what_it_does_not_keep(stage: int, gathered: int, summed: int) -> None:
    """Of three micro-batches: stage 1 sums gradients once, others each time; stage 3 fetches weights twice a time."""
    planned = PlannedModel(tiny_config())
    settings = {"micro_steps": 3, "per_node": 8, "compute_bytes": 2, "gradient_bytes": 4, "checkpointing": False}
    sent = traffic(planned, Layout(data=4, zero=stage), Rows(1, 16, TEXT), **settings)
    leaving = 3 / 4 * sum(count * weight.size for unit, count in planned.kinds.items() for weight in unit)
    assert sent["weights"].in_node == pytest.approx(gathered * 2 * leaving)
    assert sent["gradients"].in_node == pytest.approx(summed * 4 * leaving)
