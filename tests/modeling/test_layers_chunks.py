"""A feed-forward in chunks is the feed-forward."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from chorus_moe.modeling import layers as sequence_chunks
from chorus_moe.modeling.layers import GatedMLP, in_chunks
from tests.conftest import tiny_batch
from tests.modeling.conftest import windowed_model

# Products of fewer rows may be summed in another order: worst difference seen is 9.5e-7.
ATOL = 1e-5
CAPACITY: dict[str, Any] = {"expert_capacity": 0.5, "capacity_overflow": "drop", "capacity_in_eval": True}


def test_rows_are_fed_a_chunk_at_a_time_and_come_back_in_order():
    sizes = []

    def double(rows: torch.Tensor) -> torch.Tensor:
        sizes.append(len(rows))
        return rows * 2

    rows = torch.arange(22.0).view(11, 2)
    with torch.no_grad():
        assert torch.equal(in_chunks(double, (rows,), 4), rows * 2)
    assert sizes == [4, 4, 3]


def test_long_inputs_are_cut_by_themselves_at_inference_only(monkeypatch: pytest.MonkeyPatch):
    sizes: list[int] = []
    feed = GatedMLP._feed
    monkeypatch.setattr(GatedMLP, "_feed", lambda self, rows: sizes.append(len(rows)) or feed(self, rows))
    mlp = windowed_model().model.language_model.layers[0].mlp
    rows = torch.randn(1, sequence_chunks.CHUNK + 5, 64)
    whole = GatedMLP.forward(mlp, rows)
    with torch.no_grad():
        found = GatedMLP.forward(mlp, rows)
    assert sizes == [sequence_chunks.CHUNK + 5, sequence_chunks.CHUNK, 5]
    torch.testing.assert_close(found, whole, rtol=0, atol=ATOL)


@pytest.mark.parametrize("banks", [None, {name: CAPACITY for name in ("text", "common")}], ids=["plain", "capacity"])
def test_a_model_in_chunks_equals_the_whole_and_routes_alike(banks: dict[str, Any] | None):
    outputs = []
    for size in (0, 5):
        model = windowed_model(expert_banks=banks, chunk_size_feed_forward=size)
        with torch.no_grad():
            batch = tiny_batch(model.config, length=30)
            outputs.append(model(**batch, use_cache=False, output_router_logits=True))
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(outputs[1].logits[real], outputs[0].logits[real], rtol=0, atol=ATOL)
    for one, other in zip(outputs[0].routing, outputs[1].routing, strict=True):
        for name in one:
            assert torch.equal(one[name].selected_experts, other[name].selected_experts)
            assert banks is None or int(one[name].num_dropped) == int(other[name].num_dropped) > 0 or name != "text"


def test_training_in_chunks_gives_the_same_gradients_and_keeps_less():
    gradients, kept = [], []
    for size in (0, 8):
        model = windowed_model(chunk_size_feed_forward=size).train()
        batch, bytes_kept = tiny_batch(model.config, length=60), [0]

        def keep(state: torch.Tensor, total: list[int] = bytes_kept) -> torch.Tensor:
            total[0] += state.numel() * state.itemsize
            return state

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda state: state):
            loss = model(**batch).loss
        loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
        kept.append(bytes_kept[0])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=ATOL)
    assert kept[1] < kept[0]


def test_an_adapter_on_the_experts_is_heard_in_every_chunk():
    outputs = []
    for size in (0, 5):
        model = windowed_model(chunk_size_feed_forward=size)
        torch.manual_seed(0)
        lora = LoraConfig(target_modules=[], target_parameters=["experts.down_proj"], init_lora_weights=False)
        adapted = get_peft_model(model, lora).eval()
        with torch.no_grad():
            outputs.append(adapted(**tiny_batch(model.config)).logits)
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=ATOL)
