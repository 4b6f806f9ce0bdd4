"""A compiled step of the CPU as the list of its kernels, noted once a text and called one after the other from then on.

Around its kernels a graph is Python: Dynamo looks at guards, AOT unpacks a hundred tensors, and for a layer Inductor's
wrapper makes some thirty buffers and forty views, at every token anew. Weights have pushed all of that code out of the
caches by then. Its shapes never change, so in the steps of one text only the memory of the inputs does: they are copied
to where the noted ones were. It is for the processor what a CUDA graph is for a GPU.
"""

import ast
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import is_
from pathlib import Path
from threading import local
from types import ModuleType
from typing import Any, NamedTuple
from unittest.mock import patch

from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map_only
from transformers import StaticCache

from chorus_moe.modeling.modeling_outputs import CACHE

Call = tuple[Callable[..., None], tuple[Any, ...]]
# What generated code may do beside calling kernels: make tensors, which the list keeps.
MAKES = {"empty_strided_cpu", "reinterpret_tensor"}
# An operation that runs kernels of a generated module in its turn, which are noted there.
RUNS = {"torch.ops.chorus.decoder_layers.default"}
# The list that the kernels of a thread are noted in, if any.
NOTING = local()


@contextmanager
def generated_modules() -> Iterator[list[ModuleType]]:
    """What Inductor generates or loads while it holds: modules that call kernels."""
    from torch._inductor.codecache import PyCodeCache

    found: list[ModuleType] = []
    load = PyCodeCache.load_by_key_path

    def load_and_note(*args: Any, **kwargs: Any) -> ModuleType:
        module = load(*args, **kwargs)
        if hasattr(module, "empty_strided_cpu"):
            found.append(module)
        return module

    with patch.object(PyCodeCache, "load_by_key_path", load_and_note):
        yield found


class ReplayedSteps:
    """`step` for one text: its first run is noted, later ones call the kernels.

    Weights that are replaced (not changed in place) while it lives are not seen; so it lives for one text.

    Args:
        step: a compiled function of fixed shapes, `(model, **inputs)` to one tensor, whose kernels `can_replay` knows.
    """

    def __init__(self, step: Callable[..., Tensor]):
        self.step = step
        self.noted: _Noted | None = None

    def __call__(self, model: Any, **inputs: Any) -> Tensor:
        """The step's output, which is the caller's."""
        cache = inputs.pop(CACHE)
        memory, (values, tree) = _memory(cache), tree_flatten(inputs)
        noted = self.noted
        if noted is not None and tree == noted.tree and all(map(is_, memory, noted.memory)):
            pairs = [pair for pair in zip(noted.values, values, strict=True) if isinstance(pair[0], Tensor)]
            if all(kept.shape == new.shape for kept, new in pairs):
                for kept, new in pairs:
                    kept.copy_(new)
                for kernel, arguments in noted.calls:
                    kernel(*arguments)
                return noted.output.clone()
        # Copies, since later inputs are written into them.
        inputs = tree_map_only(Tensor, Tensor.clone, inputs)
        calls: list[Call] = []
        NOTING.calls = calls
        try:
            output = self.step(model, **{CACHE: cache}, **inputs)
        finally:
            NOTING.calls = None
        # The output has to be what a kernel wrote, and no copy of it.
        place = _storage(output)
        written = (each for _, arguments in reversed(calls) for each in arguments if isinstance(each, Tensor))
        is_whole = any(_storage(each) == place for each in written)
        self.noted = _Noted(memory, *tree_flatten(inputs), calls, output) if is_whole else None
        return output.clone()


class _Noted(NamedTuple):
    """A run: the memory of its cache, its inputs, its kernels with what they were given, and its output."""

    memory: list[Tensor]
    values: list[Any]
    tree: TreeSpec
    calls: list[Call]
    output: Tensor


def can_replay(modules: Sequence[ModuleType]) -> bool:
    """Whether a step is nothing but the kernels of these `modules`, which note their calls from now on."""
    kernels = [_kernels(module) for module in modules]
    if not modules or None in kernels:
        return False
    for module, names in zip(modules, kernels, strict=True):
        for name in names or ():
            kernel = getattr(module, name)
            # Equal code is loaded once, also for two graphs.
            if not isinstance(kernel, _NotedKernel):
                setattr(module, name, _NotedKernel(kernel))
    return True


class _NotedKernel:
    """In the place of a kernel in a generated module."""

    def __init__(self, kernel: Callable[..., None]):
        self.kernel = kernel

    def __call__(self, *arguments: Any) -> None:
        self.kernel(*arguments)
        if (calls := getattr(NOTING, "calls", None)) is not None:
            calls.append((self.kernel, arguments))


def _kernels(module: ModuleType) -> set[str] | None:
    """Names of the kernels that a generated module calls; None if it calls anything else."""
    tree = ast.parse(Path(module.__file__ or "").read_text())
    functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    kernels, reached = set(), ["call"]
    for name in reached:
        for node in ast.walk(functions[name]):
            if not isinstance(node, ast.Call) or ast.unparse(node.func) == "args.clear":
                continue
            called = ast.unparse(node.func)
            if called in functions:
                # The list grows while it is walked.
                reached += [called] if called not in reached else []
            elif called.startswith("cpp_fused"):
                kernels.add(called)
            elif called not in MAKES | RUNS:
                return None
    return kernels


def _memory(cache: StaticCache) -> list[Tensor]:
    return [each for layer in cache.layers for each in (layer.keys, layer.values, layer.cumulative_length)]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
