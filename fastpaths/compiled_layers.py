"""A compiled step's decoder layers: each kind is traced and compiled once, however many layers there are of it.

On the CPU all layers are one operation of the step's graph, which runs compiled layers; elsewhere, where one CUDA graph
holds the whole step, each is a region of it.
"""

from ast import literal_eval
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from functools import partial
from threading import local
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.parametrize import type_before_parametrizations
from transformers import StaticCache
from transformers.cache_utils import StaticLayer

from chorus_moe.fastpaths.module_settings import settings_of
from chorus_moe.modeling.modeling_generation import ChorusForConditionalGeneration
from chorus_moe.modeling.modeling_outputs import CACHE
from chorus_moe.modeling.modeling_text import ChorusTextModel
from chorus_moe.modeling.moe_plan import ForwardPlan, RoutingOptions

# What names a layer and does not say how it computes: its place, and what PEFT was asked for it.
NUMBERED = ("layer_idx", "kwargs")
# Of states between layers.
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
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
        text = model.config.get_text_config(decoder=True)
        self.decoder: ChorusTextModel = model.model.language_model
        # A copy, of which nothing but the list of layers is another: other threads may run the model meanwhile.
        self.without_layers: Any = copy(self.decoder)
        modules = vars(self.decoder)["_modules"]
        self.without_layers._modules = {name: module for name, module in modules.items() if name != "layers"}
        self.kinds, self.compiled = kinds_of(model), compiled
        self.modalities, self.layer_types = tuple(text.modalities), tuple(text.layer_types)
        self.functions: dict[Any, Callable[..., Tensor]] = {}
        self.calls: dict[int, Callable[[StaticLayer, Sequence[Tensor | None]], Tensor]] = {}

        def run(kind: int, *args: Any) -> Tensor:
            return _run(*args)

        self.region = torch.compiler.nested_compile_region(
            run, max_reuse_entries=len(DTYPES) * len(self.kinds), reuse_hash_fn=lambda kind, *args: kind
        )

    def run(self, cache: StaticCache, tensors: Sequence[Tensor | None], above: float, text: str) -> Tensor:
        """States after all layers, see [`decoder_layers`]."""
        hidden_states, shared, masks = _unpack(tensors, self.layer_types)
        for number, mask in enumerate(masks):
            given = [hidden_states, mask, *shared]
            call = self.calls.get(number)
            # The step's graph fixes what each layer is given, so it is looked at once.
            if call is None:
                forms = tuple(None if each is None else (each.dtype, each.shape, each.stride()) for each in given)
                key = self.kinds[number], above, text, forms
                if key not in self.functions:
                    self.functions[key] = self.compiled(_run)
                constants = self.modalities, above, literal_eval(text)
                call = self.calls[number] = partial(self.functions[key], constants, self.decoder.layers[number])
            hidden_states = call(cache.layers[number], given)
        return hidden_states

    def in_one_operation(self, decoder: ChorusTextModel) -> ChorusTextModel:
        """A copy of `without_layers`, changed to have an operation for its layers."""
        return _with_layers(decoder, self._all_in_graph)

    def in_regions(self) -> ChorusTextModel:
        """The decoder with a region for each layer."""
        return _with_layers(copy(self.without_layers), self._regions)

    def _all_in_graph(self, hidden_states: Tensor, plan: ForwardPlan, **attention: Any) -> Tensor:
        attention.pop(CACHE)
        tensors, constants = _pack(hidden_states, plan, **attention)
        return decoder_layers(tensors, plan.open_above, str(constants))

    def _regions(self, hidden_states: Tensor, plan: ForwardPlan, **attention: Any) -> Tensor:
        entries = attention.pop(CACHE).layers
        tensors, constants = _pack(hidden_states, plan, **attention)
        hidden_states, shared, masks = _unpack(tensors, self.layer_types)
        for layer, kind, entry, mask in zip(self.decoder.layers, self.kinds, entries, masks, strict=True):
            given = [hidden_states, mask, *shared]
            kind = kind * len(DTYPES) + DTYPES.index(hidden_states.dtype)
            hidden_states = self.region(kind, (self.modalities, plan.open_above, constants), layer, entry, given)
        return hidden_states

    @contextmanager
    def running(self, cache: StaticCache) -> Iterator[None]:
        """While it holds, these are the layers of this thread's step."""
        RUNNING.step = self, cache
        try:
            yield
        finally:
            RUNNING.step = None


def _pack(
    hidden_states: Tensor,
    plan: ForwardPlan,
    attention_mask: list[Tensor | None],
    position_embeddings: tuple[Tensor, Tensor],
    position_ids: Tensor | None,
    **others: Any,
) -> tuple[list[Tensor | None], tuple[Any, ...]]:
    """Tensors and constants alone: nothing that tracing made. The masks are those of the types of layers, sorted."""
    asked = complexity_T = width_T = None
    if plan.options is not None:
        complexity_T, width = plan.options.complexity_T, plan.options.width_T
        if isinstance(width, Tensor):
            width_T, width = width, None
        asked = plan.options.budget, sorted(plan.options.sampled_banks), sorted(plan.options.closed_banks), width
    tensors = [hidden_states, plan.modality_T, plan.real_T, *position_embeddings, position_ids, complexity_T, width_T]
    return [*tensors, *attention_mask], (not plan.is_static, asked, others)


def _unpack(
    tensors: Sequence[Tensor | None], layer_types: tuple[str, ...]
) -> tuple[Any, Sequence[Tensor | None], list[Tensor | None]]:
    """States, what all layers are given, and the mask of each layer."""
    types = sorted(set(layer_types))
    shared, masks = tensors[1 : -len(types)], tensors[-len(types) :]
    return tensors[0], shared, [masks[types.index(kind)] for kind in layer_types]


def _run(fixed: tuple[Any, ...], layer: Any, entry: StaticLayer, tensors: Sequence[Any]) -> Tensor:
    """States `(B, 1, D)` after a decoder layer, of what `_pack` has made of its arguments."""
    modalities, open_above, constants = fixed
    hidden_states, mask, modality_T, real_T, cos, sin, position_ids, complexity_T, width_T = tensors
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
    return layer(hidden_states, plan, **attention, **{CACHE: _Entry(entry)})


def are_alike(cache: StaticCache) -> bool:
    """Whether the layers' parts of a cache may be taken for one another. Not where one keeps numbers in Python, which
    only a trace of every layer would count up.
    """
    return not cache.offloading and all(type(layer) is StaticLayer for layer in cache.layers)


def _with_layers(decoder: Any, run: Callable[..., Tensor]) -> ChorusTextModel:
    """`decoder` itself, with one function in the place of its layers, which is given the masks of all their types."""
    decoder.layers = [run]
    prepare = decoder._prepare

    def prepare_for_all(*args: Any) -> dict[str, dict[str, Any]]:
        given = prepare(*args)
        masks = [given[kind]["attention_mask"] for kind in sorted(given)]
        return {kind: given[kind] | {"attention_mask": masks} for kind in given}

    decoder._prepare = prepare_for_all
    return decoder


class _Entry:
    """A layer's own part of a static cache, in the place of the whole."""

    def __init__(self, layer: StaticLayer):
        self.layer = layer

    def update(self, key: Tensor, value: Tensor, layer_idx: int, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self.layer.update(key, value, **kwargs)


@torch.library.custom_op("chorus::decoder_layers", mutates_args=())
def decoder_layers(tensors: Sequence[Tensor | None], open_above: float, constants: str) -> Tensor:
    """The layers of the step that this thread runs, as one operation of its graph. They change the cache, of which the
    graph reads nothing once its masks are made.

    Args:
        tensors, constants: as `_pack` returns them, `constants` in words.
        open_above: see [`ForwardPlan`].
    """
    layers, cache = RUNNING.step
    return layers.run(cache, tensors, open_above, constants)


@decoder_layers.register_fake
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
