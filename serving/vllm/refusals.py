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
        yield "skip_scope='layer': vLLM writes keys while it attends, so those of tokens that skip would be missing"
    kind = (text.rope_parameters or {}).get("rope_type")
    if kind in ("dynamic", "longrope"):
        yield f"rope_type={kind!r}: its angles follow the longest sequence at hand, here that of another request"
    for bank in text.banks:
        if bank.limits_capacity(is_training=False):
            yield (
                f"capacity_in_eval of bank {bank.name!r}: capacity is counted over a whole sequence, of which vLLM "
                "shows a part at a time"
            )


def head_sizes() -> list[int]:
    """Head sizes that vLLM's attention takes here; empty where it says nothing, as on a GPU before it is asked."""
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    return CPUAttentionBackend.get_supported_head_sizes() if current_platform.is_cpu() else []


def of_engine(vllm_config: "VllmConfig") -> Iterator[str]:
    """What was asked of the engine that the model class does not do."""
    parallel = vllm_config.parallel_config
    for name in ("tensor_parallel_size", "pipeline_parallel_size"):
        if (size := getattr(parallel, name)) > 1:
            yield f"{name}={size}: each engine holds the whole model; start several and share out the requests"
    served = vllm_config.model_config
    head_dim, sizes = served.hf_config.text_config.head_dim, head_sizes()
    if head_dim not in (sizes or [head_dim]):
        yield f"head_dim={head_dim}: vLLM's attention on a CPU has kernels for {sizes}"
    confidence = served.try_get_generation_config().get("exit_confidence")
    # With `vllm` nobody expects what the file says.
    if confidence is not None and served.generation_config != "vllm":
        yield (
            f"exit_confidence={confidence} of generation_config.json: tokens that leave early have keys in some layers "
            "alone; start with --generation-config vllm to run them through all layers"
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
