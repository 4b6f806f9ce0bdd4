"""RMSNorm and rotary positions against those of transformers."""

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from chorus_moe.modeling.attention import rotary_tables, rotate
from chorus_moe.modeling.layers import RMSNorm

# One unit in the last place of values up to 4, in sums of another order.
ATOL = {torch.float32: 2e-6, torch.bfloat16: 3.2e-2}


@pytest.mark.parametrize("dtype", ATOL)
def test_the_norm_equals_llamas(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    ours, theirs = RMSNorm(48, 1e-6).to(dtype), LlamaRMSNorm(48, 1e-6).to(dtype)
    states = torch.randn(5, 48, dtype=dtype)
    torch.testing.assert_close(ours(states), theirs(states), atol=ATOL[dtype], rtol=0)


def test_a_row_of_zeros_has_finite_gradients() -> None:
    states = torch.zeros(2, 8, requires_grad=True)
    RMSNorm(8, 1e-6)(states).sum().backward()
    assert states.grad is not None and states.grad.isfinite().all()


def test_rotation_equals_llamas() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, 3, 16), torch.randn(2, 2, 3, 16)
    angles = torch.randn(2, 3, 8).repeat(1, 1, 2)
    cos, sin = angles.cos(), angles.sin()
    tables = rotary_tables(cos, sin)
    expected = apply_rotary_pos_emb(query, key, cos, sin)
    torch.testing.assert_close((rotate(query, tables), rotate(key, tables)), expected, atol=2e-6, rtol=0)
