"""The router's weights, choices and arithmetic."""

import pytest
import torch

from chorus_moe import ExpertBankConfig
from chorus_moe.modeling.routers import ROUTER_CLASSES, SoftmaxRouter


def router(num_experts: int = 8, top_k: int = 3, norm: bool = True) -> SoftmaxRouter:
    bank = ExpertBankConfig(
        name="common", num_experts=num_experts, num_experts_per_tok=top_k, intermediate_size=4, norm_topk_prob=norm
    )
    module = ROUTER_CLASSES["softmax"](16, bank)
    torch.manual_seed(0)
    torch.nn.init.normal_(module.weight)
    return module


def test_the_chosen_are_the_most_probable():
    module, hidden = router(), torch.randn(20, 16)
    logits, _, chosen, *_ = module(hidden)
    assert torch.equal(chosen, logits.softmax(dim=-1).topk(3).indices)


def test_normalised_weights_are_probabilities_divided_by_their_sum():
    module, hidden = router(), torch.randn(20, 16)
    logits, weights, chosen, *_ = module(hidden)
    probabilities = logits.softmax(dim=-1).gather(1, chosen)
    # Two float32 softmaxes, a few roundings of 6e-8.
    torch.testing.assert_close(weights, probabilities / probabilities.sum(dim=-1, keepdim=True), rtol=0, atol=1e-6)


def test_plain_weights_are_probabilities():
    module, hidden = router(norm=False), torch.randn(20, 16)
    logits, weights, chosen, *_ = module(hidden)
    torch.testing.assert_close(weights, logits.softmax(dim=-1).gather(1, chosen), rtol=0, atol=1e-6)


def test_all_experts_chosen_is_the_dense_mixture():
    logits, weights, chosen, *_ = router(num_experts=4, top_k=4)(torch.randn(5, 16))
    dense = torch.zeros(5, 4).scatter(1, chosen, weights)
    torch.testing.assert_close(dense, logits.softmax(dim=-1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_arithmetic_is_float32_also_under_autocast(dtype: torch.dtype):
    module, hidden = router().to(dtype), torch.randn(6, 16, dtype=dtype)
    expected = module(hidden)
    with torch.autocast("cpu", torch.bfloat16):
        found = module(hidden)
    assert found[0].dtype == found[1].dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(expected[:3], found[:3], strict=True))


def test_no_tokens_are_no_error():
    logits, weights, chosen, *_ = router()(torch.randn(0, 16))
    assert (logits.shape, weights.shape, chosen.shape) == ((0, 8), (0, 3), (0, 3))


def test_gradients_reach_the_weights_through_the_chosen_only():
    module = router(num_experts=4, top_k=1, norm=False)
    _, weights, *_ = module(torch.randn(3, 16))
    weights.sum().backward()
    assert module.weight.grad.abs().sum() > 0
