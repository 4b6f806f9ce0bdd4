"""What replaces a library's operations in a step gives what they give."""

import pytest
import torch
import torch.nn.functional as F

from chorus_moe.fastpaths.step_operations import MOST_COMPARED, addmm, attention, mm, topk

# Sums in another order.
ATOL = 1e-5


@pytest.mark.parametrize("rows", [1, 2, 8])
def test_products_of_a_few_rows_are_torchs(rows: int) -> None:
    left, right = torch.randn(rows, 48), torch.randn(64, 48).t()
    # Both sum 48 terms, in other orders.
    torch.testing.assert_close(mm(left, right), left @ right, rtol=1e-5, atol=ATOL)
    bias = torch.randn(64)
    torch.testing.assert_close(addmm(bias, left, right), torch.addmm(bias, left, right), rtol=1e-5, atol=ATOL)
    assert addmm(bias, left, right, beta=2) is NotImplemented


def test_products_of_more_rows_are_the_librarys() -> None:
    assert mm(torch.randn(9, 48), torch.randn(64, 48).t()) is NotImplemented


@pytest.mark.parametrize("shape", [(3, 7), (2, 4, 2), (1, MOST_COMPARED)])
def test_the_largest_are_torchs(shape: tuple[int, ...]) -> None:
    values = torch.randn(shape)
    values[..., 0] = -torch.inf  # a closed expert
    for k in (1, 2):
        assert all(map(torch.equal, topk(values, k), values.topk(k)))


def test_the_largest_of_equals_are_different_ones() -> None:
    values, index = topk(torch.full((1, 3), -torch.inf), 3)
    assert index.tolist() == [[0, 1, 2]] and values.isneginf().all()
    assert topk(torch.zeros(1, MOST_COMPARED + 1), 2) is NotImplemented
    assert topk(torch.zeros(3, 2), 2, 0) is NotImplemented
    assert topk(torch.zeros(2), 1, largest=False) is NotImplemented


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_of_one_token_is_torchs(dtype: torch.dtype) -> None:
    query, key, value = (torch.randn(2, 4, length, 16).to(dtype) for length in (1, 9, 9))
    mask = torch.zeros(2, 1, 1, 9).masked_fill(torch.rand(2, 1, 1, 9) < 0.3, float("-inf")).to(dtype)
    mask[..., 0] = 0
    doubles = [each.double() for each in (query, key, value)]
    for given, scale in ((None, None), (mask, 0.3)):
        expected = F.scaled_dot_product_attention(
            *doubles, attn_mask=None if given is None else given.double(), scale=scale
        )
        found, _ = attention(query, key, value, attn_mask=given, scale=scale)
        # Sums in float32, and one rounding to the dtype at the end.
        rtol = 2**-8 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=1e-6)
    assert attention(key, key, value) is NotImplemented
    assert attention(query, key, value, is_causal=True) is NotImplemented
