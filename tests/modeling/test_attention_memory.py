"""Memory tokens: what a plain loop over the tokens gives, on every path, and nothing of what follows."""

from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from torch import Tensor
from transformers import DynamicCache, StaticCache

from chorus_moe import ChorusForConditionalGeneration
from chorus_moe.fastpaths.compiled_decoding import _obstacle
from chorus_moe.modeling import attention_globals
from chorus_moe.modeling.attention_globals import WRITE_CAP, MemoryTokens
from tests.conftest import moved, tiny_batch, tiny_config
from tests.modeling.conftest import WINDOW, windowed_model

# float32 sums in another order: worst difference of logits seen is 1.5e-6.
ATOL = 1e-5
KINDS = ["hybrid_sliding", "full_attention", "hybrid_sliding"]
MEMORY: dict[str, Any] = {"num_memory_tokens": 3, "layer_types": KINDS}

pytestmark = pytest.mark.usefixtures("small_blocks")


@pytest.fixture(autouse=True)
def small_memory_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_globals, "MEMORY_BLOCK", 5)


def text(length: int, batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randint(5, 128, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: Any, ids: Tensor, **inputs: Any) -> Tensor:
    return model(input_ids=ids, **inputs).logits


@torch.no_grad()
def in_pieces(model: Any, ids: Tensor, mask: Tensor, pieces: list[int], cache: Any) -> Tensor:
    found, start = [], 0
    for size in pieces:
        stop = start + size
        inputs = {"input_ids": ids[:, start:stop], "attention_mask": mask[:, :stop]}
        found.append(model(**inputs, past_key_values=cache, use_cache=True).logits)
        start = stop
    return torch.cat(found, dim=1)


def test_what_is_read_is_a_softmax_over_weighted_means():
    torch.manual_seed(0)
    text_config = tiny_config(sliding_window=WINDOW, **MEMORY).text_config
    heads, groups, size = text_config.num_attention_heads, text_config.num_key_value_heads, text_config.head_dim
    memory = MemoryTokens(text_config)
    torch.nn.init.normal_(memory.write, std=0.3)
    torch.nn.init.normal_(memory.gate)
    hidden = torch.randn(1, 13, text_config.hidden_size)
    query, key, value = (torch.randn(1, n, 13, size) for n in (heads, groups, groups))
    found = memory(hidden, key, value, None, None, 0, query)
    for position in range(13):
        for head in range(heads):
            group = head * groups // heads
            rows = memory.write[3 * group : 3 * group + 3]
            weights = (WRITE_CAP * torch.tanh(hidden[0, : position + 1] @ rows.T / WRITE_CAP)).softmax(dim=0)
            keys, values = (weights.T @ states[0, group, : position + 1] for states in (key, value))
            reads = (keys @ query[0, head, position] * size**-0.5).softmax(dim=0)
            expected = memory.gate[head] * (reads @ values)
            torch.testing.assert_close(found[0, position, head], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("pieces", [[20, 1, 1, 1], [1] * 14, [9, 14, 1]])
@pytest.mark.parametrize("attention", ["sdpa", "block_local"])
def test_a_cached_text_equals_the_whole(cache: str, pieces: list[int], attention: str):
    ids = text(sum(pieces))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    expected = logits(windowed_model("eager", **MEMORY), ids, attention_mask=mask)
    model = windowed_model(attention, **MEMORY, num_global_tokens=2)
    plain = windowed_model("eager", **MEMORY, num_global_tokens=2)
    assert not torch.allclose(logits(plain, ids, attention_mask=mask), expected)
    held = StaticCache(model.config, max_cache_len=64) if cache == "static" else DynamicCache(config=model.config)
    found, whole = in_pieces(model, ids, mask, pieces, held), logits(plain, ids, attention_mask=mask)
    torch.testing.assert_close(found[mask.bool()], whole[mask.bool()], rtol=0, atol=ATOL)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_batch_mates_change_nothing(side: str):
    model, ids = windowed_model(**MEMORY), text(23)
    padded = torch.zeros(2, 30, dtype=torch.long)
    mask = torch.zeros_like(padded)
    place = slice(7, 30) if side == "left" else slice(0, 23)
    padded[0, place], mask[0, place] = ids[0], 1
    padded[1], mask[1] = text(30, batch=1, seed=1)[0], 1
    found = logits(model, padded, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
    torch.testing.assert_close(found[0, place], logits(model, ids[:1])[0], rtol=0, atol=ATOL)


def test_nothing_is_read_of_what_follows_and_everything_of_what_was_before():
    ids = text(40, batch=1)
    other = ids.clone()
    other[0, 2] = 9 if ids[0, 2] != 9 else 10
    for kind in ("sliding_attention", "hybrid_sliding"):
        options = {"layer_types": [kind] * 3, "cross_modal_layers": []}
        options |= {"num_memory_tokens": 2} if kind == "hybrid_sliding" else {}
        model = windowed_model(**options)
        reached = moved(logits(model, ids), logits(model, other))[0]
        assert not reached[:2].any()
        assert bool(reached[3 + 3 * WINDOW :].all()) == (kind == "hybrid_sliding")


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static", "disable_compile": True}])
def test_generated_text_is_the_same_with_every_cache_and_with_beams(options: dict[str, Any]):
    model, ids = windowed_model(**MEMORY), text(2 * WINDOW + 3)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    common: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    beams = {"num_beams": options.get("num_beams", 1)}
    expected = model.generate(ids, **common, **beams, use_cache=False)
    assert torch.equal(model.generate(ids, **common, **options), expected)


def test_tokens_that_leave_early_are_remembered():
    model = windowed_model(**MEMORY, exit_layers=[1])
    ids = text(15, batch=1)
    cache = DynamicCache(config=model.config)
    logits(model, ids, past_key_values=cache)
    logits(model, ids[:, :1], past_key_values=cache, exit_confidence=0.0)
    assert cache.layers[2].recurrent_states[0][..., -1].min() > 0
    before = cache.layers[2].recurrent_states[0].clone()
    logits(model, ids[:, :1], past_key_values=cache, exit_confidence=0.0)
    assert (cache.layers[2].recurrent_states[0][..., -1] > before[..., -1]).all()


def test_every_memory_learns_is_saved_and_checkpointing_gives_the_same_gradients(tmp_path: Path):
    gradients = []
    for checkpointed in (False, True):
        model = windowed_model(**MEMORY).train()
        if checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": False})
        batch = tiny_batch(model.config, length=30)
        model(**batch).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert sum("memory_tokens" in name and bool(g.any()) for name, g in gradients[0].items()) == 4
    for name, grad in gradients[0].items():
        assert torch.equal(grad, gradients[1][name]), name
    model.eval().save_pretrained(tmp_path)
    loaded = ChorusForConditionalGeneration.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)


def test_gradients_flow_through_a_cache_as_without():
    model, ids = windowed_model(**MEMORY), text(20)
    grads = []
    for pieces in ([20], [12, 8]):
        model.zero_grad()
        cache, start, total = DynamicCache(config=model.config), 0, torch.zeros(())
        for size in pieces:
            found = model(input_ids=ids[:, start : start + size], past_key_values=cache, use_cache=True).logits
            total, start = total + found.square().sum(), start + size
        total.backward()
        grads.append(model.model.language_model.layers[0].self_attn.memory_tokens.write.grad.clone())
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-3, atol=1e-4)


def test_what_memory_tokens_cannot_do_is_refused():
    model, ids = windowed_model(**MEMORY), text(9)
    with pytest.raises(ValueError, match="no room for memory tokens in layer 0, a DynamicLayer"):
        model(input_ids=ids, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="takes an attention_mask"):
        model(input_ids=ids, attention_mask=torch.ones(2, 1, 9, 9, dtype=torch.bool))
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]] * 2)
    with pytest.raises(ValueError, match="packed sequences would read each other"):
        model(input_ids=ids, position_ids=packed, use_cache=False)
    with pytest.raises(ValueError, match="num_memory_tokens=3: a draft that is refused"):
        model.generate(ids[:1], assistant_early_exit=1, max_new_tokens=2)
    with pytest.raises(ValueError, match="num_memory_tokens=3: a draft that is refused"):
        model.generate(ids[:1], prompt_lookup_num_tokens=2, max_new_tokens=2)
    assert "memory" in _obstacle(model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_memory_tokens": 0}, "num_memory_tokens=0 and 2 hybrid_sliding layers"),
        ({"layer_types": None}, "num_memory_tokens=3 and 0 hybrid_sliding layers"),
        ({"is_causal": False}, "num_memory_tokens=3 with is_causal=False"),
        ({"sliding_window": None}, "asks for hybrid_sliding but sliding_window is None"),
        ({"num_memory_tokens": -1}, "num_memory_tokens=-1 and 2 hybrid_sliding layers"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(changes: dict[str, Any], message: str):
    with pytest.raises(StrictDataclassClassValidationError, match=message):
        tiny_config(**{"sliding_window": WINDOW} | MEMORY | changes)
