"""What is traced does what the modules do, with weights as they are at each call."""

from threading import Event, Thread
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._pytree import tree_leaves
from transformers import StaticCache
from transformers.cache_utils import StaticLayer

from chorus_moe.fastpaths.traced_functions import TracedFunction
from chorus_moe.modeling.configuration_text import ChorusTextConfig


class Shared(nn.Module):
    """A module under two names, a buffer, a tensor that is neither, and a list with a module in it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.second = nn.Linear(4, 4)
        self.bias = nn.Buffer(torch.randn(4))
        self.scale = torch.tensor(3.0)
        self.others = [nn.Linear(4, 4), "a name"]
        self.unused = nn.Parameter(torch.randn(5))

    def forward(self, states: Tensor, named: dict[str, Tensor]) -> Tensor:
        states = self.second(self.first(states).relu()) * self.scale + self.bias
        return self.others[0](states) + named["a"] - named["b"] * 2  # type: ignore[operator]


class Compiler:
    """Runs a graph as it is, and keeps it."""

    def __call__(self, graph: GraphModule, inputs: list[Tensor]) -> Any:
        self.graph, self.inputs = graph, inputs
        return graph


def call(module: Any, *args: Any) -> Tensor:
    return module(*args)


@torch.no_grad()
def test_weights_are_read_at_each_call() -> None:
    module, compiler = Shared(), Compiler()
    traced = TracedFunction(call, compiler)
    states, named = torch.randn(2, 4), {"a": torch.randn(4), "b": torch.randn(4)}
    torch.testing.assert_close(traced(module, states, named), module(states, named), rtol=0, atol=0)
    # Two linear layers, of which one has two names, buffer, scale, states and the two named ones.
    assert len(compiler.inputs) == 2 * 2 + 2 + 1 + 2
    module.first.weight = nn.Parameter(torch.randn(4, 4))
    module.bias.add_(1)
    module.scale = torch.tensor(5.0)
    # Named in another order, and another module of the same kind.
    again = {"b": torch.randn(4), "a": torch.randn(4)}
    for each in (module, Shared()):
        torch.testing.assert_close(traced(each, states + 1, again), each(states + 1, again), rtol=0, atol=0)


@torch.no_grad()
def test_a_cache_is_written_to() -> None:
    """Of the call, not of the trace."""
    config = ChorusTextConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=2, head_dim=4)
    caches = [StaticCache(config=config, max_cache_len=6) for _ in range(3)]
    for cache in caches:
        cache.early_initialization(1, 2, 4, torch.float32, torch.device("cpu"))

    def step(cache: StaticCache, key: Tensor) -> Tensor:
        keys, values = cache.update(key, key * 2, 0)
        return keys.sum() + values.sum()

    traced = TracedFunction(step, Compiler())
    keys = [torch.randn(1, 2, 1, 4) for _ in range(3)]
    for key in keys:
        assert torch.equal(traced(caches[0], key), step(caches[1], key))
    traced(caches[2], keys[0])
    for found, expected in zip(caches[0].layers, caches[1].layers, strict=True):
        assert type(found) is StaticLayer and int(found.cumulative_length) == 3  # type: ignore[arg-type]
        assert torch.equal(found.keys, expected.keys) and torch.equal(found.values, expected.values)  # type: ignore
    assert int(caches[2].layers[0].cumulative_length) == 1  # type: ignore[union-attr]


@torch.no_grad()
def test_a_weight_that_is_made_of_tensors() -> None:
    """As torchao's are."""
    module, compiler = nn.Linear(4, 3, bias=False), Compiler()
    first, second = torch.randn(3, 4), torch.randn(3, 4)
    module.weight = nn.Parameter(TwoTensor(first, second))

    def product(module: nn.Linear, states: Tensor) -> Tensor:
        weight: Any = module.weight
        return F.linear(states, weight.a) + F.linear(states, weight.b)

    states = torch.randn(2, 4)
    assert torch.equal(TracedFunction(product, compiler)(module, states), states @ first.t() + states @ second.t())
    assert len(compiler.inputs) == 3 and not any(isinstance(each, TwoTensor) for each in tree_leaves(compiler.inputs))


@torch.no_grad()
def test_other_threads_run_the_modules_meanwhile() -> None:
    module, states = nn.Linear(4, 4), torch.randn(2, 4)
    expected, found = module(states), []
    is_traced, is_checked = Event(), Event()

    def slowly(module: nn.Module, states: Tensor) -> Tensor:
        is_traced.set()
        assert is_checked.wait(30)
        return module(states)

    def check() -> None:
        assert is_traced.wait(30)
        with torch.no_grad():
            found.append(module(states))
        is_checked.set()

    thread = Thread(target=check)
    thread.start()
    traced = TracedFunction(slowly, Compiler())(module, states)
    thread.join()
    assert torch.equal(found[0], expected) and torch.equal(traced, expected)
    assert not torch.compiler.is_compiling()


@torch.no_grad()
def test_what_cannot_be_right_is_refused() -> None:
    hidden = torch.randn(4)
    with pytest.raises(Exception, match="FakeTensor"):
        TracedFunction(lambda states: states + hidden, Compiler())(torch.randn(4))
    with pytest.raises(Exception, match="data-dependent|Boolean|item"):
        TracedFunction(lambda states: states if states.sum() > 0 else -states, Compiler())(torch.randn(4))
    traced = TracedFunction(call, Compiler())
    traced(nn.Linear(4, 4), torch.randn(1, 4))
    with pytest.raises(RuntimeError, match="traced with 3 tensors, called with 2"):
        traced(nn.Linear(4, 4, bias=False), torch.randn(1, 4))
