"""A function of modules, traced by running it once on tensors without memory, and compiled.

Dynamo reads bytecode, which takes seconds, and makes guards, of which steps of fixed shapes keep none.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._guards import TracingContext, tracing
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import StaticCache
from transformers.cache_utils import StaticLayer

# What holds tensors, beside containers.
HOLDERS = nn.Module, StaticCache, StaticLayer


class TracedFunction:
    """`function(*args)`, which returns one tensor. The first call traces and compiles it.

    What is traced sees copies of the modules and caches among the arguments, so that other threads may run the modules
    meanwhile. The graph is right for arguments that differ from the first in nothing but the values of tensors.

    Args:
        compiler: makes a callable of a graph and its inputs.

    Raises:
        RuntimeError: a later call's arguments hold another number of tensors.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        compiler: Callable[[GraphModule, list[Tensor]], Callable[..., Sequence[Tensor]]],
    ):
        self.function, self.compiler = function, compiler
        self.compiled: Callable[..., Sequence[Tensor]] | None = None
        self.count, self.used = 0, list[int]()

    def __call__(self, *args: object) -> Tensor:
        tensors = list(_tensors(args, {}))
        if self.compiled is None:
            self.compiled = self._compile(args, tensors)
        if len(tensors) != self.count:
            raise RuntimeError(f"traced with {self.count} tensors, called with {len(tensors)}")
        return self.compiled(*[tensors[number] for number in self.used])[0]

    def _compile(self, args: Sequence[Any], tensors: Sequence[Tensor]) -> Callable[..., Sequence[Tensor]]:
        def run(*given: Tensor) -> tuple[Tensor]:
            return (self.function(*_with_tensors(args, iter(given), {})),)

        # Without an environment for shapes, though all are fixed, nothing is looked up in Inductor's cache.
        mode = FakeTensorMode(shape_env=ShapeEnv())
        fakes = [mode.from_tensor(tensor, static_shapes=True) for tensor in tensors]
        # As Dynamo does: modules ask whether they are compiled, and must not look at values then.
        with mode, patch.object(torch.compiler, "_is_compiling_flag", True):
            graph = make_fx(run)(*fakes)
        places = [node for node in graph.graph.nodes if node.op == "placeholder"]
        self.count, self.used = len(places), [number for number, node in enumerate(places) if node.users]
        for node in places:
            if not node.users:
                graph.graph.erase_node(node)
        graph.recompile()
        with tracing(TracingContext(mode)):
            return self.compiler(graph, [fakes[number] for number in self.used])


def _parts(holder: Any) -> Iterator[tuple[dict[str, Any], str]]:
    """Where a module, or a cache, keeps tensors and what holds tensors: a dictionary and a key."""
    fields = vars(holder)
    if isinstance(holder, nn.Module):
        for name in ("_parameters", "_buffers", "_modules"):
            yield from ((fields[name], key) for key in fields[name])
    yield from ((fields, key) for key, value in fields.items() if isinstance(value, Tensor | list))


def _tensors(value: Any, seen: dict[int, Any]) -> Iterator[Tensor]:
    """The tensors of arguments, those of a wrapper instead of it, in an order that their structure alone decides."""
    if isinstance(value, Tensor):
        if is_traceable_wrapper_subclass(value):
            for name in value.__tensor_flatten__()[0]:
                yield from _tensors(getattr(value, name), seen)
        else:
            yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each, seen)
    elif isinstance(value, dict):
        # Arguments by name come in any order.
        for key in sorted(value):
            yield from _tensors(value[key], seen)
    elif isinstance(value, HOLDERS) and id(value) not in seen:
        seen[id(value)] = value
        for fields, key in _parts(value):
            yield from _tensors(fields[key], seen)


def _with_tensors(value: Any, tensors: Iterator[Tensor], seen: dict[int, Any]) -> Any:
    """A copy that holds other tensors, in the order of `_tensors`."""
    if isinstance(value, Tensor):
        if is_traceable_wrapper_subclass(value):
            names, context = value.__tensor_flatten__()
            inner = {name: _with_tensors(getattr(value, name), tensors, seen) for name in names}
            return type(value).__tensor_unflatten__(inner, context, value.shape, value.stride())
        return next(tensors)
    if isinstance(value, list | tuple):
        return type(value)([_with_tensors(each, tensors, seen) for each in value])
    if isinstance(value, dict):
        return {key: _with_tensors(value[key], tensors, seen) for key in sorted(value)}
    if not isinstance(value, HOLDERS):
        return value
    if id(value) not in seen:
        # Not `copy`, which a parametrized module refuses.
        new = seen[id(value)] = object.__new__(type(value))
        fields = dict(vars(value))
        fields |= {name: dict(fields[name]) for name in ("_parameters", "_buffers", "_modules") if name in fields}
        vars(new).update(fields)
        for fields, key in _parts(new):
            fields[key] = _with_tensors(fields[key], tensors, seen)
    return seen[id(value)]
