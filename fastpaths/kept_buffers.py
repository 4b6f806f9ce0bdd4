"""What a compiled step allocates, kept from step to step.

Inductor's wrapper is Python: for a layer it allocates some thirty buffers and makes some forty views of them, at every
token anew. Weights have pushed all of that code out of the caches by then, and eight layers took up to a millisecond.
Their shapes never change, so one set of tensors serves every step.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Lock
from types import ModuleType
from typing import Any
from unittest.mock import patch

from torch import Tensor

# Larger ones are allocated as ever: kept for each layer they would add up, and their own work takes longer than that.
MOST_BYTES = 2**16
# One step at a time: a buffer is one step's. Kernels hold Python's lock in any case.
RUNNING = Lock()
ALLOCATOR = "_allocator_of_steps"


class _Allocator:
    """In the place of a generated module's own: straight code of fixed shapes, which asks for the same tensors in the
    same order in every run."""

    def __init__(self, module: ModuleType):
        self.next: Iterator[Tensor | None] = iter(())
        self.seen: list[Tensor | None] | None = None
        self.ours: set[int] = set()
        for name, is_view in (("empty_strided_cpu", False), ("reinterpret_tensor", True)):
            setattr(module, name, self._keep(getattr(module, name), is_view))

    def _keep(self, make: Callable[..., Tensor], is_view: bool) -> Callable[..., Tensor]:
        def kept(*args: Any) -> Tensor:
            # An iterator that has ended gives None: outside of a step nothing is kept.
            found = next(self.next, None)
            if found is None:
                found = make(*args)
                if self.seen is not None:
                    # A view of an input, or of a buffer that is not kept, is another one each time.
                    is_ours = id(args[0]) in self.ours if is_view else found.nbytes <= MOST_BYTES
                    self.seen.append(found if is_ours else None)
                    if is_ours:
                        self.ours.add(id(found))
            return found

        return kept

    def start(self, kept: list[Tensor | None]) -> None:
        """Give out what was kept, or note what is made if nothing was."""
        self.next = iter(kept)
        self.seen, self.ours = None if kept else [], set()

    def stop(self) -> list[Tensor | None]:
        """What was made, None where it must be made anew."""
        self.next, seen, self.seen = iter(()), self.seen, None
        return seen or []


@contextmanager
def generated_modules() -> Iterator[list[ModuleType]]:
    """What Inductor generates or loads while it holds: modules that call kernels."""
    from torch._inductor.codecache import PyCodeCache

    found: list[ModuleType] = []
    load = PyCodeCache.load_by_key_path

    def load_and_note(*args: Any, **kwargs: Any) -> ModuleType:
        module = load(*args, **kwargs)
        if hasattr(module, "empty_strided_cpu") and hasattr(module, "reinterpret_tensor"):
            found.append(module)
        return module

    with patch.object(PyCodeCache, "load_by_key_path", load_and_note):
        yield found


def keep_buffers(step: Callable[..., Tensor], modules: Sequence[ModuleType]) -> Callable[..., Tensor]:
    """`step`, whose `modules` take the same buffers in each run.

    Args:
        step: a compiled function of fixed shapes, whose output is one tensor. That one is not kept.
        modules: as found by [`generated_modules`] at its first run.
    """
    for module in modules:
        if not hasattr(module, ALLOCATOR):
            setattr(module, ALLOCATOR, _Allocator(module))
    allocators: list[_Allocator] = [getattr(module, ALLOCATOR) for module in modules]
    kept: list[list[Tensor | None]] = [[] for _ in modules]

    def run(*args: Any, **kwargs: Any) -> Tensor:
        with RUNNING:
            for allocator, tensors in zip(allocators, kept, strict=True):
                allocator.start(tensors)
            try:
                output = step(*args, **kwargs)
            finally:
                made = [allocator.stop() for allocator in allocators]
            for tensors, new in zip(kept, made, strict=True):
                # What is handed out is the caller's.
                tensors.extend(None if each is None or _share_memory(each, output) else each for each in new)
            return output

    return run


def _share_memory(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
