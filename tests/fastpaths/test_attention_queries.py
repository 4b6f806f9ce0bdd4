"""A long causal prefill with windows, whose queries are worked on in chunks, equals the one in one piece; so do the
outputs of some tokens alone."""

from typing import Any

import pytest
import torch
from torch import Tensor

from chorus_moe.fastpaths import attention_queries
from chorus_moe.modeling.attention import Attention
from tests.conftest import tiny_config
from tests.modeling.conftest import WINDOW, windowed_model

# float32 sums in another order: worst difference of logits 1.2e-6.
ATOL = 2e-5

pytestmark = pytest.mark.usefixtures("small_blocks")


@pytest.fixture
def chunks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Chunks of ten queries; the lengths of those that were worked on."""
    lengths: list[int] = []
    real = Attention.attend

    def watched(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        lengths.append(hidden_states.shape[1])
        return real(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(attention_queries, "CHUNK", 10)
    monkeypatch.setattr(Attention, "attend", watched)
    return lengths


@pytest.mark.parametrize("num_global", [0, 3])
@pytest.mark.parametrize("padding", [0, 2, 14])
@pytest.mark.parametrize("past", [0, 5, 37])
def test_chunks_equal_a_dense_mask(num_global: int, padding: int, past: int, chunks: list[int]):
    input_ids = torch.randint(5, 128, (2, past + 37), generator=torch.Generator().manual_seed(past))
    mask = torch.ones_like(input_ids)
    mask[0, :padding] = 0
    found = []
    for name in ("eager", "block_local"):
        model = windowed_model(name, num_global_tokens=num_global)
        cache = None
        with torch.no_grad():
            if past:
                cache = model(input_ids[:, :past], attention_mask=mask[:, :past], use_cache=True).past_key_values
            chunks.clear()
            output = model(input_ids[:, past:], attention_mask=mask, past_key_values=cache, use_cache=True)
            longer = torch.nn.functional.pad(mask, (0, 1), value=1)
            following = model(input_ids[:, :1], attention_mask=longer, past_key_values=output.past_key_values).logits
        found.append((output.logits[mask[:, past:].bool()], following))
    assert chunks[:4] == [10, 10, 10, 7] and max(chunks) == 37  # the full layer is not cut
    for ours, dense in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, dense, rtol=0, atol=ATOL)


def test_training_keeps_the_sequence_whole(chunks: list[int]):
    model = windowed_model("block_local").train()
    model(input_ids=torch.randint(5, 128, (1, 37))).logits.sum().backward()
    assert set(chunks) == {37} and WINDOW < 37


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("past", [0, 4])
@pytest.mark.parametrize("has_mask", [False, True])
def test_chosen_tokens_have_the_outputs_that_they_have_among_all(is_causal: bool, past: int, has_mask: bool):
    config = tiny_config().text_config
    config._attn_implementation = "sdpa"
    layer = Attention(config, 0).eval()
    layer.is_causal = is_causal
    draw = torch.Generator().manual_seed(past)
    length, head = 6, config.head_dim
    states = torch.randn(2, length, config.hidden_size, generator=draw)
    tables = tuple(torch.randn(2, 1, length, head, generator=draw) for _ in range(2))
    key, value = (torch.randn(2, config.num_key_value_heads, past + length, head, generator=draw) for _ in range(2))
    seen = torch.ones(length, past + length, dtype=torch.bool)
    seen = seen.tril(past) if is_causal else seen
    mask = seen.expand(2, 1, -1, -1).clone()
    if has_mask:
        mask[1, ..., :2] = False
        mask[1, 0, 0, 0] = mask[1, 0, 1, 0] = True  # no row may be empty
    queries = torch.tensor([[0, 3], [5, 1]])
    given = mask if has_mask else None
    found, _, _ = attention_queries.attend(layer, states, tables, None, key, value, given, None, queries)
    whole, _, _ = layer.attend(states, tables, None, key, value, mask)
    torch.testing.assert_close(found, whole.take_along_dim(queries[..., None], dim=1), rtol=0, atol=1e-5)
