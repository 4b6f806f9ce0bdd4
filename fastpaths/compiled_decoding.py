"""Decoding by compiling the model's own modules: `compile_decoding(model)`, then `model.generate(...)` as ever.

The prefill runs as without it. Steps of one text token for each of a few samples run as one graph. The modules stay the
only description of the model: what cannot be compiled runs through them, and a line says why.

Shape suffixes: B batch, T tokens, K choices of a token, P = T * K choices, E experts, D hidden size, I expert width,
H = 2I.
"""

from collections.abc import Callable, Sequence
from functools import partial
from threading import Lock
from typing import Any, TypeVar
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only
from transformers import CompileConfig, PreTrainedConfig, StaticCache
from transformers.cache_utils import StaticLayer
from transformers.integrations.moe import ExpertsInterface
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import logging

from chorus_moe.fastpaths.compiled_layers import CompiledLayers, are_alike
from chorus_moe.fastpaths.experts_cpu import CPU_EXPERTS
from chorus_moe.fastpaths.module_settings import Snapshot, signature_of
from chorus_moe.fastpaths.quantized_weights import Quantized, row_product, stored_weight, streams
from chorus_moe.fastpaths.replayed_steps import ReplayedSteps, can_replay, generated_modules
from chorus_moe.fastpaths.step_operations import CODE, CPU_OPERATIONS, OPERATIONS
from chorus_moe.fastpaths.supported_experts import GATHERED, GATHERED_TOKENS, StackedExperts
from chorus_moe.fastpaths.traced_functions import TracedFunction
from chorus_moe.modeling.attention_masks import Masks
from chorus_moe.modeling.modeling_generation import ChorusForConditionalGeneration
from chorus_moe.modeling.modeling_outputs import CACHE
from chorus_moe.modeling.moe_banks import LinearExperts

logger = logging.get_logger(__name__)

Model = TypeVar("Model", bound=nn.Module)
SHORTEST_CACHE = 128
# Graphs of one model: one for each batch size, length of the cache and set of options.
MOST_GRAPHS = 16
COMPILING = Lock()
# One thread at a time sees whether a model changed, and says so.
LOOKING = Lock()
# Experts functions that a graph can hold.
TRACEABLE = (CPU_EXPERTS, "grouped_mm", "batched_mm", GATHERED)
# What Inductor is told about a step on the CPU.
INDUCTOR: dict[str, Any] = {
    # A norm is computed once, not anew for each row of the weight that it is multiplied with.
    "realize_reads_threshold": 2,
    # A product and its sum are one instruction.
    "cpp.enable_floating_point_contract_flag": "fast",
    # Shapes were looked at when the graph was made.
    "size_asserts": False,
    "alignment_asserts": False,
    # PyTorch knows the processor's instructions; three test programs of the compiler take 10 s to say the same.
    "cpp.vec_isa_ok": True,
}
# Arguments that a step may have beside tokens, positions, masks and the cache.
OPTIONS = ("complexity_scores", "expert_budget", "closed_banks", "skip_threshold")
ADAPTER_HOOK = "_adapter_names_pre_forward_hook"
# What says nothing about a step; `generate` hands its tokenizers on to the model.
UNREAD = ("use_cache", "logits_to_keep", "tokenizer", "assistant_tokenizer")


def gathered_experts(self: StackedExperts, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Weighted sum of the chosen gated experts, `(T, D)`, written for a compiler: run plainly, it copies them.

    Args:
        self: experts with `gate_up_proj (E, H, D)` and `down_proj (E, D, I)`.
        hidden_states: `(T, D)`.
        top_k_index: `(T, K)`; E or more is a sentinel and adds nothing.
        top_k_weights: `(T, K)`.
    """
    gate_up_EHD, down_EDI = stored_weight(self, "gate_up_proj"), stored_weight(self, "down_proj")
    last, top_k = gate_up_EHD.shape[0] - 1, top_k_index.shape[1]
    weights_TK = top_k_weights.masked_fill(top_k_index > last, 0.0)
    # Indexed inside the product: Inductor fuses gather, product and sum, and copies nothing. Choice by choice: their
    # loops become one over the rows of a matrix, and a row that several tokens chose is read once.
    index_P = top_k_index.clamp(max=last).flatten().split(1)
    hidden_PD = [row for row in hidden_states.unbind() for _ in range(top_k)]
    active_PI = self._apply_gate(_in_streams(gate_up_EHD, index_P, hidden_PD))
    states_PD = _in_streams(down_EDI, index_P, active_PI.unbind())
    output_TD = (states_PD.unflatten(0, top_k_index.shape) * weights_TK[..., None]).sum(1)
    return output_TD.to(hidden_states.dtype)


def _in_streams(weight_ENM: Tensor | Quantized, index_P: Sequence[Tensor], states_PM: Sequence[Tensor]) -> Tensor:
    """Products `(P, N)` of some experts' matrices with a vector each; an index has one element."""
    count = streams(weight_ENM, len(index_P))
    pairs = zip(index_P, states_PM, strict=True)
    return torch.cat([row_product(weight_ENM, states, count, index) for index, states in pairs])


ExpertsInterface.register(GATHERED, gathered_experts)


def _backend(options: dict[str, Any]) -> Callable[..., Any]:
    """Inductor with products of one row, and attention of one token, as sums."""
    from torch._inductor.codecache import torch_key, triton_key
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.decomposition import select_decomp_table

    # Hashes of PyTorch's and Triton's files, which name what lies in Inductor's cache: made while the step is traced.
    for key in torch_key, triton_key:
        getattr(key, "prefetch", lambda: None)()

    def run(graph: Any, inputs: Any) -> Any:
        # A table of its own, handed over, would keep graphs out of Inductor's cache on disk. So the common one is
        # changed while a graph is made, and the cache's key says so.
        is_cpu = all(each.device.type == "cpu" for each in inputs if isinstance(each, Tensor))
        one_row = patch.dict(select_decomp_table(), OPERATIONS | (CPU_OPERATIONS if is_cpu else {}))
        with one_row, torch.compiler.config.patch(cache_key_tag=CODE):  # type: ignore[attr-defined]
            return compile_fx(graph, inputs, config_patches=(INDUCTOR if is_cpu else {}) | options)

    return run


def _guards(entries: Any) -> list[bool]:
    """Which guards are looked at before each token."""
    # Not those on modules, which took 1 ms: `_look` looks at them once per text. Nor those on globals.
    of_modules = torch.compiler.skip_guard_on_all_nn_modules_unsafe(entries)
    of_globals = torch.compiler.skip_guard_on_globals_unsafe(entries)
    return [keep and also for keep, also in zip(of_modules, of_globals, strict=True)]


def _compiler(config: CompileConfig) -> Callable[..., Any]:
    """Makes a callable of a graph and its inputs."""
    if config.backend != "inductor":
        # As `torch.compile` hands them on.
        asked = {name: getattr(config, name) for name in ("mode", "options")}
        asked = {name: value for name, value in asked.items() if value and value != "default"}
        return partial(torch._dynamo.lookup_backend(config.backend), **asked)
    options = dict(torch._inductor.list_mode_options(config.mode) if config.mode else {}) | (config.options or {})
    return _backend(options)


def _compiled(config: CompileConfig, compiler: Callable[..., Any]) -> Callable[..., Tensor]:
    """`_step`, which Dynamo traces at its first call."""
    options: dict[str, Any] = {"fullgraph": True, "dynamic": bool(config.dynamic), "isolate_recompiles": True}
    return torch.compile(_step, backend=compiler, options={"guard_filter_fn": _guards}, **options)


def _step(text_ids: Any, decoder: Any, head: Any, inputs: dict[str, Any]) -> Tensor:
    """Logits `(B, 1, V)`. Without modalities the decoder knows that all is text."""
    input_ids = text_ids(inputs["input_ids"])
    return head(decoder(**inputs | {"input_ids": input_ids}, use_cache=True).last_hidden_state)


def _is_traced(config: CompileConfig, inputs: dict[str, Any]) -> bool:
    """Whether a step is traced by being run. Dynamo alone knows regions, of which a GPU's step has one a layer, and
    sizes that change.
    """
    return inputs["input_ids"].is_cpu and not config.dynamic and are_alike(inputs[CACHE])


class _Graph:
    """`_step`, compiled at its first call, and the layers that it runs."""

    def __init__(self, model: Any, config: CompileConfig):
        compiler = _compiler(config)
        self.layers = layers = CompiledLayers(model, partial(TracedFunction, compiler=compiler))
        text_ids = model.model._text_ids

        def step(decoder: Any, head: Any, inputs: dict[str, Any]) -> Tensor:
            return _step(text_ids, layers.in_one_operation(decoder), head, inputs)

        self.config = config
        self.traced = TracedFunction(step, compiler)
        self.compiled = _compiled(config, compiler)

    def __call__(self, model: Any, **inputs: Any) -> Tensor:
        layers, cache = self.layers, inputs[CACHE]
        if _is_traced(self.config, inputs):
            # Shapes and dtypes are in the graph's key, and now strides follow from them.
            inputs = tree_map_only(Tensor, Tensor.contiguous, inputs)
            with layers.running(cache):
                return self.traced(layers.without_layers, model.lm_head, inputs)
        decoder = layers.in_regions() if are_alike(cache) else layers.decoder
        return self.compiled(model.model._text_ids, decoder, model.lm_head, inputs)


class CompiledDecoding:
    """What takes the place of a model's own methods in `generate`.

    Args:
        model: [`ChorusForConditionalGeneration`].
    """

    def __init__(self, model: ChorusForConditionalGeneration):
        self.model = model
        self.graphs: dict[Any, Callable[..., Tensor]] = {}
        # Keys of the graphs whose kernels can be called one by one.
        self.replayed: set[Any] = set()
        self.signature: tuple[Any, ...] = ()
        self.snapshot: Snapshot | None = None
        self.failure = ""

    def __deepcopy__(self, memo: dict[int, Any]) -> "CompiledDecoding":
        """For a copy of the model: it compiles for itself."""
        return CompiledDecoding(memo[id(self.model)])

    def __reduce__(self) -> tuple[Any, ...]:
        # Graphs cannot be pickled; the copy makes its own.
        return CompiledDecoding, (self.model,)

    def _prepare_generation_config(self, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """A static cache and a compiled step, unless the caller asked for another cache or another way to search."""
        config, model_kwargs = type(self.model)._prepare_generation_config(self.model, *args, **kwargs)
        asks = (config.cache_implementation, config.assistant_early_exit, config.prompt_lookup_num_tokens)
        others = (CACHE, "assistant_model", "custom_generate")
        is_plain = (config.num_beams or 1) == 1 and config.use_cache is not False and not config.disable_compile
        is_plain = is_plain and not any(asks) and all(kwargs.get(name) is None for name in others)
        if self.failure:
            self._look()  # what was in the way may be gone
        if is_plain and not self.failure:
            config.cache_implementation = "static"
        if config.cache_implementation == "static" and not config.disable_compile:
            if config.compile_config is None:
                mode = "default" if self.model.device.type == "cpu" else "reduce-overhead"
                config.compile_config = CompileConfig(mode=mode)
            # transformers compiles on GPUs alone unless told.
            config.compile_config._compile_all_devices = True
        return config, model_kwargs

    def _prepare_static_cache(self, cache_implementation: str, max_cache_len: int, **kwargs: Any) -> StaticCache:
        """A cache with room for a power of two of tokens, also in layers with windows."""
        # One graph serves every step of every text of that size.
        length = max(SHORTEST_CACHE, 1 << (max_cache_len - 1).bit_length())
        text = self.model.config.get_text_config(decoder=True)
        cache = StaticCache(config=text, max_cache_len=length, offloading="offloaded" in cache_implementation)
        # transformers' sliding layers count tokens in Python numbers, for each of which a step would be compiled anew.
        cache.layers = [StaticLayer(length) if layer.is_sliding else layer for layer in cache.layers]
        return cache

    def create_masks_for_generate(
        self, config: PreTrainedConfig, attention_mask: Tensor | None, **inputs: Any
    ) -> Masks:
        """None without padding: the graph makes its own masks."""
        if attention_mask is None:
            return None
        return type(self.model).create_masks_for_generate(self.model, config, attention_mask=attention_mask, **inputs)

    def get_compiled_call(self, compile_config: CompileConfig | None) -> Callable[..., Any]:
        """What `generate` calls for each step."""
        self._look()
        config = compile_config or CompileConfig(mode="default")
        return partial(self, config, str(config.to_dict()), {})

    def _look(self) -> None:
        """At what the model is, once per text, not per token."""
        has_global_hook = bool(nn.modules.module._has_any_global_hook())
        with LOOKING:
            if self.snapshot and self.snapshot.is_current() and has_global_hook == self.signature[0]:
                return
            self.snapshot = Snapshot(self.model)
            signature = has_global_hook, *signature_of(self.model)
            # Steps of modules, adapters or hooks that changed since are compiled anew.
            if signature != self.signature:
                self.graphs.clear()
                self.replayed.clear()
                self.signature, self.failure = signature, _obstacle(self.model)
                if self.failure:
                    self._say(self.failure)

    def _say(self, why: str) -> None:
        logger.warning_once(f"compiled decoding: {why}; the modules run instead")

    def __call__(
        self,
        config: CompileConfig,
        asked: str,
        noted: dict[Any, ReplayedSteps],
        return_dict: bool | None = None,
        **inputs: Any,
    ) -> Any:
        """One step: compiled where it is one of text and asks for nothing but logits, through the modules elsewhere.

        Args:
            noted: steps of this text, by graph.
        """
        step = None if self.failure else self._text_step(inputs)
        if step is None:
            return self.model(**inputs, return_dict=return_dict)
        key = self._key(asked, step)
        if key not in self.graphs and len(self.graphs) >= MOST_GRAPHS:
            self._say(f"{MOST_GRAPHS} graphs are compiled, none of them for {key[1:]}")
            return self.model(**inputs, return_dict=return_dict)
        logits: Tensor | None
        if key in self.graphs:
            # A graph that worked once and fails now is a fault that must be seen, not one to work around.
            run = self.graphs[key]
            if key in self.replayed:
                run = noted.setdefault(key, ReplayedSteps(run))
            logits = run(self.model, **step)
        else:
            logits = self._first_step(key, config, step)
        if logits is None:
            return self.model(**inputs, return_dict=return_dict)
        # Not the model's own output, whose many empty fields took 0.2 ms to set.
        return CausalLMOutputWithPast(logits=logits, **{CACHE: inputs[CACHE]})

    def _first_step(self, key: tuple[Any, ...], config: CompileConfig, step: dict[str, Any]) -> Tensor | None:
        """The logits of a step whose graph is compiled for it; None if that fails."""
        # One thread compiles, since it changes what tracing and Inductor read; others wait for it.
        with COMPILING:
            if (graph := self.graphs.get(key)) is not None:  # another thread compiled it meanwhile
                return graph(self.model, **step)
            graph = _Graph(self.model, config)
            logger.info(f"compiled decoding: graph {len(self.graphs) + 1}, for {key[1:]}")
            try:
                with generated_modules() as modules:
                    logits = graph(self.model, **step)
            except Exception as error:
                self.failure = f"the step cannot be compiled ({type(error).__name__}: {_first_lines(error)})"
                self._say(self.failure)
                return None
            # Other caches keep numbers in Python as well, which no kernel counts up.
            is_fixed = not config.dynamic and all(type(layer) is StaticLayer for layer in step[CACHE].layers)
            if is_fixed and logits.device.type == "cpu" and can_replay(modules):
                self.replayed.add(key)
            self.graphs[key] = graph
            return logits

    def _key(self, asked: str, step: dict[str, Any]) -> tuple[Any, ...]:
        """What a graph is made for."""
        # Tensors are inputs of a graph; numbers and names are built into it.
        options = {name: value for name, value in step.items() if name in OPTIONS and not isinstance(value, Tensor)}
        cache = step[CACHE]
        given = tree_flatten({name: value for name, value in step.items() if name != CACHE})[0]
        return (
            asked,
            # Each in words that a log or a warning can show.
            f"batch {len(step['input_ids'])}",
            f"cache {cache.layers[0].max_cache_len}",
            "padding" if step["attention_mask"] is not None else "no padding",
            str(options),
            # A graph is right for tensors of these kinds alone.
            *[f"{each.dtype} {tuple(each.shape)}" for each in given if isinstance(each, Tensor)],
        )

    def _text_step(self, inputs: dict[str, Any]) -> dict[str, Any] | None:
        """The inputs of `_step`; None if these are not of one text token a sample, or ask for more than logits."""
        rest = dict(inputs)
        input_ids, cache, modality_BS = (rest.pop(n, None) for n in ("input_ids", CACHE, "mm_token_type_ids"))
        step = {name: rest.pop(name, None) for name in ("position_ids", "attention_mask")}
        step |= {name: rest.pop(name) for name in OPTIONS if rest.get(name) is not None}
        others = [
            name for name, value in rest.items() if name not in UNREAD and value is not None and value is not False
        ]
        is_step = input_ids is not None and input_ids.shape[1] == 1 and len(input_ids) <= GATHERED_TOKENS
        is_step = is_step and isinstance(cache, StaticCache) and all(layer.is_initialized for layer in cache.layers)
        if not is_step:
            return None
        if others:
            self._say(f"the step is given {', '.join(others)}")
            return None
        if isinstance(step["attention_mask"], Tensor) or torch.is_grad_enabled():
            return None
        if (modality_BS is not None and modality_BS.any()) or torch.is_autocast_enabled(input_ids.device.type):
            return None
        return {"input_ids": input_ids, CACHE: cache, **step}


def _first_lines(error: Exception) -> str:
    return " ".join(str(error).split("\n\n")[0].split())


def _obstacle(model: Any) -> str:
    """Why a model's steps cannot be compiled; empty if nothing is known."""
    text = model.config.text_config
    if text.num_memory_tokens:
        return f"num_memory_tokens={text.num_memory_tokens} keep sums for which its static cache has no room"
    limited = [name for name, bank in model.model.language_model.banks.items() if bank.limits_capacity(False)]
    if limited:
        return f"expert bank {limited[0]!r} limits its capacity, which a cache does not know"
    if text._experts_implementation not in TRACEABLE:
        return f"experts_implementation={text._experts_implementation!r} looks at its choices"
    if any(isinstance(module, LinearExperts) for module in model.modules()):
        return "experts_layout='linear' looks at its choices"
    return _hook(model)


def _hook(model: Any) -> str:
    """A hook that the kernels of a step would not call; empty if there is none."""
    if nn.modules.module._has_any_global_hook():
        return "a hook on all modules is called by modules alone"
    above = {"the model": model, "model": model.model, "lm_head": model.lm_head}
    decoder = model.model.language_model.named_modules(prefix="model.language_model")
    for name, module in (*above.items(), *decoder):
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        # PEFT's hand each sample its adapter and keep nothing.
        if any(getattr(getattr(hook, "func", None), "__name__", "") != ADAPTER_HOOK for hook in hooks):
            return f"a hook on {name} is called by modules alone"
    return ""


NAMES = (
    "_prepare_generation_config",
    "_prepare_static_cache",
    "create_masks_for_generate",
    "get_compiled_call",
)


def compile_decoding(model: Model) -> Model:
    """Switch compiled decoding on, for `generate` of this model; the model itself is returned.

    The first text of each size waits for the compiler. `generate(disable_compile=True)` skips it, and
    `compile_config` is read as transformers reads it.

    Args:
        model: [`ChorusForConditionalGeneration`], also below an adapter.
    """
    inner: Any = getattr(model, "get_base_model", lambda: model)()
    if isinstance(getattr(inner.get_compiled_call, "__self__", None), CompiledDecoding):
        return model  # its graphs are kept
    decoding = CompiledDecoding(inner)
    for name in NAMES:
        setattr(inner, name, getattr(decoding, name))
    return model
