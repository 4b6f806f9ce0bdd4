"""What the doctor changes for a while and puts back, and what it listens to."""

import logging
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import nn
from transformers.utils import logging as transformers_logging

from chorus_moe.training.doctor.inputs import Patient

# transformers' mark on a model whose layers carry hooks that record outputs. They stay once they are there.
CAPTURES = "_output_capturing_hooks_installed"


@contextmanager
def left_as_found(patient: Patient) -> Iterator[None]:
    """Modes, hooks, trained parameters, buffers, implementations and random numbers are afterwards what they were
    before; gradients are dropped, and nothing below an error is logged. Weights are not restored: no check may
    change them."""
    model, decoder = patient.model, patient.decoder
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    # Batch norms move their statistics in training mode.
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    # Asking for routing or hidden states makes transformers install hooks, which stay.
    hooks = [(table, dict(table)) for m in model.modules() for table in (m._forward_hooks, m._forward_pre_hooks)]
    hooked = [module for module in model.modules() if CAPTURES in vars(module)]
    attention = decoder.config._attn_implementation
    experts = decoder.config._experts_implementation
    silenced, has_bars = logging.root.manager.disable, transformers_logging.is_progress_bar_enabled()
    # Warnings would stand between the rows of the table.
    logging.disable(logging.WARNING)
    transformers_logging.disable_progress_bar()
    try:
        # The same noise in every check, and the caller's generator where it was.
        with torch.random.fork_rng():
            torch.manual_seed(0)
            yield
    finally:
        logging.disable(silenced)
        if has_bars:
            transformers_logging.enable_progress_bar()
        decoder.set_attn_implementation(attention)
        decoder.set_experts_implementation(experts)
        for module, mode in modes:
            module.training = mode
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
            parameter.grad = None
        for buffer, before in buffers:
            buffer.copy_(before)
        for table, entries in hooks:
            table.clear()
            table.update(entries)
        for module in model.modules():
            if CAPTURES in vars(module) and module not in hooked:
                # Its hooks are gone; with the mark left, transformers would not install them again.
                delattr(module, CAPTURES)


@contextmanager
def nan_memory() -> Iterator[None]:
    """torch fills uninitialised memory with NaN, so that a tensor that is never set shows."""
    mode = torch.get_deterministic_debug_mode()
    # Fills memory only in this mode. `warn_only`, because some operations have no deterministic form.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)


@contextmanager
def recorded_calls(functions: MutableMapping[str, Callable]) -> Iterator[dict[nn.Module, str]]:
    """Module -> the implementation that computed it last, of those in a table of transformers (attention or experts).
    Where one hands over to another, the other counts. The module's own forward is in no table."""
    calls: dict[nn.Module, str] = {}

    def spy(name: str, function: Callable) -> Callable:
        @wraps(function)
        def record(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            # Written before the call: an implementation that hands over overwrites it with the one that computes.
            calls[module] = name
            return function(module, *args, **kwargs)

        return record

    # The table has a global layer and a local one in front: assigning writes to the local one only, which is put back.
    before = dict(functions._local_mapping)  # type: ignore[attr-defined]
    for name, function in dict(functions).items():
        functions[name] = spy(name, function)
    try:
        yield calls
    finally:
        functions._local_mapping = before  # type: ignore[attr-defined]


@contextmanager
def recorded_inputs(modules: dict[str, nn.Module]) -> Iterator[dict[str, tuple]]:
    """Name -> the positional inputs of the last call of each module."""
    inputs: dict[str, tuple] = {}
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: inputs.__setitem__(name, args))
        for name, module in modules.items()
    ]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()
