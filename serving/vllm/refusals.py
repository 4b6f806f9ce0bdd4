"""What vLLM's engine cannot do as `generate` does it: refused by name, before any weight is read."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from chorus_moe.modeling.configuration_chorus import ChorusConfig

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def of_model(config: ChorusConfig) -> Iterator[str]:
    """What a model has that is not carried, each with its setting and the reason."""
    text = config.text_config
    if not text.is_causal:
        yield "is_causal=False: vLLM generates with causal attention alone"
    # These keys belong to a layer, not to a token, and a page holds tokens.
    if text.num_global_tokens:
        yield f"num_global_tokens={text.num_global_tokens}: vLLM's pages have no place for keys in front of a request"
    if text.num_memory_tokens:
        yield f"num_memory_tokens={text.num_memory_tokens}: vLLM's pages have no place for running sums of a request"
    if text.skip_layers and text.skip_scope == "layer":
        yield "skip_scope='layer': keys of tokens that skip would not be written, vLLM does that while it attends"
    for bank in text.banks:
        if bank.limits_capacity(is_training=False):
            yield (
                f"capacity_in_eval of bank {bank.name!r}: capacity is counted over a whole sequence, of which vLLM "
                "shows a part at a time"
            )


def of_engine(vllm_config: "VllmConfig") -> Iterator[str]:
    """What was asked of the engine that the model class does not do."""
    parallel = vllm_config.parallel_config
    for name in ("tensor_parallel_size", "pipeline_parallel_size"):
        if (size := getattr(parallel, name)) > 1:
            yield f"{name}={size}: each engine holds the whole model; start several and share out the requests"
    saved = vllm_config.model_config.try_get_generation_config()
    # Without the file's settings, `vllm` promises its own and nothing else.
    if vllm_config.model_config.generation_config != "vllm":
        for name in ("exit_confidence", "skip_threshold"):
            if saved.get(name) is not None:
                yield (
                    f"{name}={saved[name]} of generation_config.json: vLLM passes it to no model; take it out of the "
                    "file, or start with --generation-config vllm"
                )


def check(vllm_config: "VllmConfig") -> None:
    """Refuse a model or a setting that would answer otherwise than `generate`.

    Raises:
        ValueError: naming everything that is not carried.
    """
    served = vllm_config.model_config
    found = [*of_model(served.hf_config), *of_engine(vllm_config)]
    if found:
        raise ValueError(f"{served.model} cannot be served by vLLM: " + "; ".join(found))
    # vLLM takes a model whose layers are all alike for one with this window in each of them, also where none has one.
    vllm_config.cache_config.sliding_window = None
