"""Products of narrow numbers in float32, without the device that has them."""

from typing import Any

import pytest
import torch
from torch import Tensor

from chorus_moe.fastpaths import narrow_product as module
from chorus_moe.modeling.configuration_services import SERVICES


@pytest.fixture(autouse=True)
def products_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """`torch.mm` with `out_dtype`, which a CPU lacks: exact products, summed in that type."""
    asked: list[Any] = []

    def mm(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:
        asked.append((a.dtype, b.dtype, out_dtype))
        return a.to(out_dtype) @ b.to(out_dtype)

    monkeypatch.setattr(torch, "mm", mm)
    return asked


def made(dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(size, generator=generator).to(dtype).requires_grad_() for size in ((5, 6), (3, 6)))
    return hidden, weight, torch.randn(5, 3, generator=generator)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_and_gradients_are_those_of_widened_numbers(dtype: torch.dtype, products_of_a_gpu: list[Any]) -> None:
    (hidden, weight, grad), product = made(dtype), SERVICES["narrow_product"]
    found = product(hidden, weight)
    found.backward(grad)
    assert products_of_a_gpu == [(dtype, dtype, torch.float32)] and found.dtype == torch.float32
    wide_hidden, wide_weight = (x.detach().float().requires_grad_() for x in (hidden, weight))
    expected = torch.nn.functional.linear(wide_hidden, wide_weight)
    expected.backward(grad)
    torch.testing.assert_close(found, expected)
    for narrow, wide in ((hidden, wide_hidden), (weight, wide_weight)):
        # Rounded once, at the end.
        assert narrow.grad is not None and wide.grad is not None and narrow.grad.dtype == dtype
        torch.testing.assert_close(narrow.grad, wide.grad.to(dtype))


@pytest.mark.parametrize("trained", ["hidden", "weight"])
def test_a_side_that_is_not_trained_gets_no_gradient(trained: str) -> None:
    hidden, weight, grad = made(torch.bfloat16)
    frozen = weight if trained == "hidden" else hidden
    frozen.requires_grad_(False)
    SERVICES["narrow_product"](hidden, weight).backward(grad)
    assert frozen.grad is None
    other = hidden if trained == "hidden" else weight
    expected = grad @ weight.float() if trained == "hidden" else grad.t() @ hidden.float()
    torch.testing.assert_close(other.grad, expected.to(torch.bfloat16))


def test_importing_it_registers_it() -> None:
    assert SERVICES["narrow_product"] == module._NarrowProduct.apply
