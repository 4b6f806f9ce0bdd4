"""Attention in blocks equals the dense mask, forward and backward, wherever blocks and windows end."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from chorus_moe.fastpaths import attention_blocks
from chorus_moe.fastpaths.attention_blocks import LocalMask, attend_in_blocks, block_size
from chorus_moe.modeling.configuration_services import SERVICES
from tests.conftest import tiny_batch
from tests.modeling.conftest import WINDOW, windowed_model

# float32 sums in another order: worst difference of outputs and gradients over all cases here is 2.4e-6; of logits
# between whole models 1.2e-6, of their gradients 4e-6.
ATOL = 2e-5
HEADS, HEAD_DIM = 4, 8

pytestmark = pytest.mark.usefixtures("small_blocks")


def dense(query: Tensor, key: Tensor, value: Tensor, mask: LocalMask) -> Tensor:
    """The rule written out as a matrix."""
    queries, keys, num_global = query.shape[2], key.shape[2], mask.num_global_tokens
    place, seen = torch.arange(keys - queries, keys)[:, None], torch.arange(keys)
    distance = place - seen
    if mask.is_causal:
        visible = (distance >= 0) & (distance < mask.window) | (seen < num_global)
    else:
        visible = (distance.abs() <= mask.window) | (seen < num_global) | (place < num_global)
    if mask.real_BK is not None:
        visible = visible & mask.real_BK[:, None, None]
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=visible).transpose(1, 2)


def states(queries: int, keys: int, key_heads: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(queries)
    shapes = [(2, HEADS, queries, HEAD_DIM)] + [(2, key_heads, keys, HEAD_DIM)] * 2
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("num_global", [0, 3])
@pytest.mark.parametrize(("is_causal", "past"), [(True, 0), (True, 2), (True, 21), (False, 0)])
@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_blocks_equal_the_dense_mask_forward_and_backward(
    num_global: int, is_causal: bool, past: int, padding: int, key_heads: int
):
    for count in (2, WINDOW - 2, WINDOW - 1, WINDOW, WINDOW + 1, WINDOW + 2, 16, 37):
        keys = num_global + past + count
        queries = count + (0 if is_causal else num_global)
        real = torch.ones(2, keys, dtype=torch.bool)
        real[1, num_global : num_global + min(padding, past + count - 1)] = False
        mask = LocalMask(WINDOW, is_causal, num_global, real if padding else None)
        query, key, value = states(queries, keys, key_heads)
        found, expected = attend_in_blocks(query, key, value, mask), dense(query, key, value, mask)
        counted = real[:, -queries:] if padding else torch.ones(2, queries, dtype=torch.bool)
        torch.testing.assert_close(found[counted], expected[counted], rtol=0, atol=ATOL)
        weights = torch.randn_like(found) * counted[..., None, None]
        gradients = [torch.autograd.grad((out * weights).sum(), (query, key, value)) for out in (found, expected)]
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=ATOL)


def test_a_window_wider_than_everything_sees_everything():
    query, key, value = states(9, 9, 2)
    found = attend_in_blocks(query, key, value, LocalMask(100, True))
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(found, expected, rtol=0, atol=ATOL)


@pytest.mark.parametrize("is_causal", [True, False])
def test_blocks_in_bfloat16_are_as_near_to_float32_as_the_dense_mask(is_causal: bool):
    mask = LocalMask(WINDOW, is_causal, 2)
    narrow = states(41, 41, 2, torch.bfloat16)
    exact = dense(*(state.float() for state in narrow), mask)
    errors = [(f(*narrow, mask).float() - exact).square().mean() for f in (attend_in_blocks, dense)]
    # Both round the same sums; over ten seeds the ratio stays between 0.9 and 1.1.
    assert errors[0] < 1.5 * errors[1]


def test_padding_far_from_a_block_leaves_it_untouched_and_finite():
    query, key, value = states(40, 40, 2)
    real = torch.ones(2, 40, dtype=torch.bool)
    real[0, :25] = False
    found = attend_in_blocks(query, key, value, LocalMask(WINDOW, True, 0, real))
    assert found.isfinite().all()
    whole = attend_in_blocks(query, key, value, LocalMask(WINDOW, True))
    torch.testing.assert_close(found[0, 25 + WINDOW :], whole[0, 25 + WINDOW :], rtol=0, atol=ATOL)


@pytest.mark.parametrize("num_global", [0, 3])
@pytest.mark.parametrize("is_causal", [True, False])
def test_a_model_in_blocks_equals_the_model_with_a_dense_mask(
    num_global: int, is_causal: bool, monkeypatch: pytest.MonkeyPatch
):
    results = []
    for attention, windows in (("sdpa", 1000), ("sdpa", 2), ("block_local", 2)):
        monkeypatch.setattr(attention_blocks, "WINDOWS_THAT_PAY", windows)
        model = windowed_model(attention, num_global_tokens=num_global, is_causal=is_causal)
        output = model(**tiny_batch(model.config, length=31))
        output.loss.backward()
        results.append([output.logits, *(p.grad for p in model.parameters() if p.grad is not None)])
    for expected, *found in zip(*results, strict=True):
        for one in found:
            torch.testing.assert_close(one, expected, rtol=1e-4, atol=ATOL)


def test_without_the_package_windows_are_a_dense_mask_and_the_same_numbers(monkeypatch: pytest.MonkeyPatch):
    ids = torch.randint(5, 128, (2, 31), generator=torch.Generator().manual_seed(0))
    model = windowed_model()
    with torch.no_grad():
        in_blocks = model(input_ids=ids).logits
        monkeypatch.delitem(SERVICES, "local_mask")
        monkeypatch.setattr(attention_blocks, "attend_in_blocks", None)
        torch.testing.assert_close(model(input_ids=ids).logits, in_blocks, rtol=0, atol=ATOL)


@pytest.mark.parametrize("length", range(WINDOW - 2, WINDOW + 3))
@pytest.mark.parametrize("num_global", [0, 3])
def test_lengths_around_the_window_equal_the_eager_model(length: int, num_global: int):
    input_ids = torch.randint(5, 128, (2, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(input_ids)
    mask[0, :2] = 0
    with torch.no_grad():
        expected, found, in_blocks = (
            windowed_model(name, num_global_tokens=num_global)(input_ids=input_ids, attention_mask=mask).logits
            for name in ("eager", "sdpa", "block_local")
        )
    for logits in (found, in_blocks):
        torch.testing.assert_close(logits[mask.bool()], expected[mask.bool()], rtol=0, atol=ATOL)


@pytest.mark.parametrize(("window", "fastest"), [(8, 64), (64, 64), (128, 64), (256, 128), (512, 256), (4096, 256)])
def test_blocks_are_half_a_window_between_the_sizes_measured_fastest(window: int, fastest: int) -> None:
    assert block_size(window) == fastest


@pytest.mark.parametrize("num_global", [0, 3])
@pytest.mark.parametrize("padding", [0, 9])
@pytest.mark.parametrize("rows", [1, 2 * 2 * 5, 10**6])
def test_blocks_of_several_calls_equal_the_dense_mask_too(
    rows: int, padding: int, num_global: int, monkeypatch: pytest.MonkeyPatch
):
    query, key, value = states(41, 41 + num_global, 2)
    real = torch.ones(2, 41 + num_global, dtype=torch.bool)
    real[0, num_global : num_global + padding] = False
    mask = LocalMask(WINDOW, True, num_global, real if padding else None)
    counted = real[:, num_global:]
    calls: list[int] = []
    real_call = attention_blocks._call
    monkeypatch.setattr(attention_blocks, "_call", lambda *a: calls.append(a[0].shape[1]) or real_call(*a))
    for name in ("TRAINING_ROWS", "INFERENCE_ROWS"):
        monkeypatch.setattr(attention_blocks, name, rows)
    found, expected = attend_in_blocks(query, key, value, mask), dense(query, key, value, mask)
    torch.testing.assert_close(found[counted], expected[counted], rtol=0, atol=ATOL)
    blocks = -(-41 // attention_blocks.block_size(WINDOW))
    assert sum(calls) == blocks and (len(calls) == 1) == (rows == 10**6)
