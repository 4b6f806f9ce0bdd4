"""A compiled step's decoder layers: each kind is traced and compiled once, however many layers there are of it.

On the CPU a layer is one operation of the step's graph, which runs the compiled layer; elsewhere, where one CUDA graph
holds the whole step, it is a region of the same graph.
"""

from ast import literal_eval
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import is_dataclass
from functools import partial
from threading import local
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations
from transformers import PreTrainedConfig, StaticCache
from transformers.cache_utils import StaticLayer

from chorus_moe.modeling.modeling_generation import ChorusForConditionalGeneration
from chorus_moe.modeling.modeling_outputs import CACHE
from chorus_moe.modeling.modeling_text import ChorusDecoderLayer
from chorus_moe.modeling.moe_plan import ForwardPlan, RoutingOptions

FORWARD = ChorusDecoderLayer.forward
# What names a layer and does not say how it computes: its place, and what PEFT was asked for it.
NUMBERED = ("layer_idx", "kwargs")
# Of states between layers.
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Kinds of settings, by name: as a union they would be put together at each look.
PLAIN = bool, int, float, str
# The layers, and the cache, of the step that a thread runs.
RUNNING = local()


class CompiledLayers:
    """The layers of a model, for one graph.

    A trace is used again where the number of its kind says so, without a look at what it relied on. So the number must
    tell apart whatever the code of a layer reads beside its weights, its states and its part of the cache.

    Args:
        model: [`ChorusForConditionalGeneration`].
        compiled: compiles a function at its first call, without guards.
    """

    def __init__(
        self, model: ChorusForConditionalGeneration, compiled: Callable[[Callable[..., Tensor]], Callable[..., Tensor]]
    ):
        self.layers, self.kinds, self.compiled = model.model.language_model.layers, kinds_of(model), compiled
        self.modalities = tuple(model.config.get_text_config(decoder=True).modalities)
        self.functions: dict[Any, Callable[..., Tensor]] = {}
        self.calls: dict[int, Callable[[StaticLayer, Sequence[Tensor | None]], Tensor]] = {}

    def run(self, number: int, entry: StaticLayer, tensors: Sequence[Tensor | None], above: float, text: str) -> Tensor:
        """States after layer `number`, see [`decoder_layer`]."""
        call = self.calls.get(number)
        # The step's graph fixes what each layer is given, so it is looked at once.
        if call is None:
            forms = tuple(None if each is None else (each.dtype, each.shape, each.stride()) for each in tensors)
            key = self.kinds[number], above, text, forms
            if key not in self.functions:
                self.functions[key] = self.compiled(_run_apart)
            given = {"modalities": self.modalities, "open_above": above, "constants": literal_eval(text)}
            call = self.calls[number] = partial(self.functions[key], self.layers[number], **given)
        return call(entry, tensors)

    @contextmanager
    def running(self, cache: StaticCache) -> Iterator[None]:
        """While it holds, these are the layers of this thread's step."""
        RUNNING.step = self, cache
        try:
            yield
        finally:
            RUNNING.step = None

    @contextmanager
    def traced_once(self, cache: StaticCache, is_cpu: bool) -> Iterator[None]:
        """While it holds, what is traced has each layer as an operation or a region."""
        # A cache of another kind keeps numbers in Python, which only a trace of every layer would count up.
        if cache.offloading or any(type(layer) is not StaticLayer for layer in cache.layers):
            yield
            return
        region = None if is_cpu else self._region()

        def forward(layer: Any, hidden_states: Tensor, plan: ForwardPlan, **attention: Any) -> Tensor:
            if not torch.compiler.is_compiling():  # a thread that runs the modules meanwhile
                return FORWARD(layer, hidden_states, plan, **attention)
            number = layer.self_attn.layer_idx
            entry = attention.pop(CACHE).layers[number]
            tensors, constants = _pack(hidden_states, entry.cumulative_length, plan, **attention)
            if region is None:
                states = decoder_layer(tensors, number, plan.open_above, str(constants))
                # By the graph, which makes its masks from it; the operation counts in a copy.
                entry.cumulative_length.add_(hidden_states.shape[1])
                return states
            kind = self.kinds[number] * len(DTYPES) + DTYPES.index(hidden_states.dtype)
            return region(kind, layer, entry, tensors, self.modalities, plan.open_above, constants)

        with patch.object(ChorusDecoderLayer, "forward", forward):
            yield

    def _region(self) -> Callable[..., Tensor]:
        def run(kind: int, *args: Any) -> Tensor:
            return _run(*args)

        return torch.compiler.nested_compile_region(
            run, max_reuse_entries=len(DTYPES) * len(self.kinds), reuse_hash_fn=lambda kind, *args: kind
        )


def _pack(
    hidden_states: Tensor,
    length: Tensor,
    plan: ForwardPlan,
    attention_mask: Tensor | None,
    position_embeddings: tuple[Tensor, Tensor],
    position_ids: Tensor | None,
    **others: Any,
) -> tuple[list[Tensor | None], tuple[Any, ...]]:
    """Tensors and constants alone: nothing that tracing made. It is traced for each layer, hence its few steps."""
    asked = complexity_T = width_T = None
    if plan.options is not None:
        complexity_T, width = plan.options.complexity_T, plan.options.width_T
        if isinstance(width, Tensor):
            width_T, width = width, None
        asked = plan.options.budget, sorted(plan.options.sampled_banks), sorted(plan.options.closed_banks), width
    tensors = [hidden_states, length, plan.modality_T, plan.real_T, attention_mask, *position_embeddings]
    return [*tensors, position_ids, complexity_T, width_T], (not plan.is_static, asked, others)


def _run(
    layer: Any,
    entry: StaticLayer,
    tensors: Sequence[Any],
    modalities: tuple[str, ...],
    open_above: float,
    constants: tuple[Any, ...],
) -> Tensor:
    """States `(B, 1, D)` after a decoder layer, of what `_pack` has made of its arguments."""
    hidden_states, _, modality_T, real_T, mask, cos, sin, position_ids, complexity_T, width_T = tensors
    is_text, asked, others = constants
    options = None
    if asked is not None:
        budget, sampled, closed, width = asked
        width = width_T if width is None else width
        options = RoutingOptions(complexity_T, budget, frozenset(sampled), None, {}, frozenset(closed), width)
    real_BT = None if real_T is None else real_T.unsqueeze(0)
    plan = ForwardPlan.build(modality_T.unsqueeze(0), real_BT, options, modalities, is_text)
    plan.open_above = open_above
    attention = {"attention_mask": mask, "position_embeddings": (cos, sin), "position_ids": position_ids, **others}
    return FORWARD(layer, hidden_states, plan, **{CACHE: _Entry(entry)}, **attention)


def _run_apart(layer: Any, entry: StaticLayer, tensors: Sequence[Any], **constants: Any) -> Tensor:
    entry.cumulative_length = tensors[1].clone()
    return _run(layer, entry, tensors, **constants)


class _Entry:
    """A layer's own part of a static cache, in the place of the whole."""

    def __init__(self, layer: StaticLayer):
        self.layer = layer

    def update(self, key: Tensor, value: Tensor, layer_idx: int, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self.layer.update(key, value, **kwargs)


@torch.library.custom_op("chorus::decoder_layer", mutates_args=())
def decoder_layer(tensors: Sequence[Tensor | None], number: int, open_above: float, constants: str) -> Tensor:
    """A layer of the step that this thread runs, as one operation of its graph. Keys and values go into the cache,
    which no other operation reads.

    Args:
        tensors, constants: as `_pack` returns them, `constants` in words.
        number: of the layer.
        open_above: see [`ForwardPlan`].
    """
    layers, cache = RUNNING.step
    return layers.run(number, copy(cache.layers[number]), tensors, open_above, constants)


@decoder_layer.register_fake
def _(tensors: Sequence[Tensor], *args: Any) -> Tensor:
    return torch.empty_like(tensors[0])


def kinds_of(model: ChorusForConditionalGeneration) -> tuple[int, ...]:
    """A number for each layer, equal where two layers differ in nothing but the values of weights."""
    found: dict[Any, int] = {}
    layers = [
        tuple(
            (type_before_parametrizations(m), settings_of({k: v for k, v in vars(m).items() if k not in NUMBERED}, id))
            for m in layer.modules()
        )
        for layer in model.model.language_model.layers
    ]
    return tuple(found.setdefault(layer, len(found)) for layer in layers)


def settings_of(value: object, other: Callable[[object], object] = type) -> object:
    """Something to compare; `other` says what of a value of a kind that is not known."""
    if value is None or isinstance(value, PLAIN):
        return value
    if isinstance(value, dict):
        # A module has more than ten kinds of hooks, and most often none of them.
        filled = ((key, entry) for key, entry in value.items() if not isinstance(entry, dict) or entry)
        return tuple((str(key), settings_of(entry, other)) for key, entry in filled)
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device, value.requires_grad
    if isinstance(value, list | tuple | set | frozenset):
        return tuple(settings_of(entry, other) for entry in value)
    # A configuration is in `_signature` already, and slow to print. Modules are looked at one by one.
    if is_dataclass(value) and not isinstance(value, PreTrainedConfig):
        return repr(value)
    return type_before_parametrizations(value) if isinstance(value, nn.Module) else other(value)
