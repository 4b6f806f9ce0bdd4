"""Greedy `generate`: milliseconds of the prefill and tokens per second after it.

Run as `python -m benchmarks.decode --threads 1`. Ours, compiled (`chorus`) and through the modules (`modules`), against
`Qwen3MoeForCausalLM` with the same weights, dense Qwen3 of equal *active* parameters and, where `llama-cpp-python` and
`gguf` are installed, llama.cpp on the same weights; ours, Qwen3-MoE and llama.cpp must generate the same tokens. `lora`
is ours with an adapter that is not merged. Decoding is timed as the difference between generating many tokens and
generating one. `bound` is the rate at which this machine could stream the active weights.

`--size billion` is a model of a billion parameters, `--size demo` the demo's decoder, which no peer has. `--options`
compares what routers can be asked for with the plain router, all compiled. `first` is the time of the first text of a
model, which waits for the compiler; run the program twice to see what the compiler's cache on disk saves.
"""

import importlib.util
import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from benchmarks.timing import OURS, Report, figures, measure, parse
from chorus_moe import ChorusConfig, ChorusForConditionalGeneration
from chorus_moe.fastpaths.compiled_decoding import compile_decoding
from chorus_moe.fastpaths.row_products import multiply, operand, weight_operand
from chorus_moe.training.demo.model import build_demo

SIZES = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 2048,
}
BILLION = SIZES | {"hidden_size": 1024, "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 4}
QUICK = SIZES | {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 16}
EXPERTS, TOP_K, WIDTH = 16, 2, 512
# Settings of the bank, and what `generate` is asked for, of each way to route.
ROUTING: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    OURS: ({}, {}),
    "sigmoid": ({"router": "sigmoid"}, {}),
    "groups": ({"router": "sigmoid", "num_groups": 4, "topk_groups": 2}, {}),
    "attention": ({"router": "attention"}, {}),
    "adaptive": ({"adaptive_experts": True}, {}),
    "budget": ({}, {"expert_budget": {"text": 1}}),
    "own_gate": ({"gate": "own"}, {}),
}
Variants = dict[str, Callable[[int], Any]]


def chorus_model(sizes: dict[str, int], width: int, **bank: Any) -> ChorusForConditionalGeneration:
    text = {
        **sizes,
        "num_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
        "moe_intermediate_size": width,
        "shared_expert_intermediate_size": 0,
        "mlp_layer_types": ["sparse"] * sizes["num_hidden_layers"],
        "cross_modal_layers": [],
        "expert_banks": {"common": bank},
        "use_qk_norm": True,
    }
    return ChorusForConditionalGeneration(ChorusConfig(text_config=text))


def qwen_model(sizes: dict[str, int], width: int, ours: ChorusForConditionalGeneration) -> Qwen3MoeForCausalLM:
    """Qwen3-MoE with our weights, which both hold."""
    config = Qwen3MoeConfig(
        **sizes,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        moe_intermediate_size=width,
        norm_topk_prob=True,
        rope_parameters=dict(ours.config.text_config.rope_parameters),
    )
    model = Qwen3MoeForCausalLM(config)
    renamed = {}
    for name, value in ours.state_dict().items():
        name = name.replace("model.language_model.", "model.").replace("mlp.banks.common.router.", "mlp.gate.")
        renamed[name.replace("mlp.banks.common.experts.", "mlp.experts.")] = value
    model.load_state_dict(renamed, assign=True)
    return model


def dense_model(sizes: dict[str, int], width: int) -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(Qwen3Config(**sizes, intermediate_size=TOP_K * width))


def with_lora(model: ChorusForConditionalGeneration) -> PreTrainedModel:
    """A copy with an adapter on attention, compiled for itself and not merged."""
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    return compile_decoding(get_peft_model(deepcopy(model), LoraConfig(r=8, target_modules=targets)).eval())


def generate(model: PreTrainedModel, input_ids: Tensor, new_tokens: int, **options: Any) -> Tensor:
    return model.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
        **options,
    )


def write_gguf(model: Qwen3MoeForCausalLM, path: Path, kind: str | None = None) -> None:
    """The model in the file format of llama.cpp, without a vocabulary: float32 or bfloat16 as it is, or matrices in one
    of its formats of fewer bits, such as `Q8_0`."""
    import gguf

    config, writer = model.config, gguf.GGUFWriter(path, "qwen3moe")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.moe_intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
        "mlp.gate": "ffn_gate_inp",
        "mlp.experts.down_proj": "ffn_down_exps",
    }

    def add(name: str, tensor: Tensor) -> None:
        # Norms and routers are float32 in every file of llama.cpp.
        if kind is not None and tensor.ndim > 1 and "gate_inp" not in name:
            found = gguf.GGMLQuantizationType[kind]
            raw = gguf.quants.quantize(tensor.float().contiguous().numpy(), found)
            writer.add_tensor(name, raw, raw_dtype=found)
        elif tensor.dtype == torch.bfloat16 and tensor.ndim > 1 and "gate_inp" not in name:
            raw = tensor.contiguous().view(torch.uint8).numpy()
            writer.add_tensor(name, raw, raw_shape=raw.shape, raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(name, tensor.float().contiguous().numpy())

    for name, tensor in model.state_dict().items():
        prefix, inner = "", name.removesuffix(".weight")
        if inner.startswith("model.layers."):
            _, _, layer, inner = inner.split(".", 3)
            prefix = f"blk.{layer}."
        if inner == "mlp.experts.gate_up_proj":
            for part, half in zip(("gate", "up"), tensor.chunk(2, dim=1), strict=True):
                add(f"{prefix}ffn_{part}_exps.weight", half)
        else:
            add(f"{prefix}{names[inner]}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_cpp(
    model: Qwen3MoeForCausalLM, input_ids: Tensor, longest: int, kind: str | None = None
) -> Callable[[int], list[int]]:
    """Greedy text of llama.cpp on the same weights, by the number of tokens; `kind` as in `write_gguf`."""
    import llama_cpp as library

    threads, prompt = torch.get_num_threads(), input_ids[0].tolist()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        write_gguf(model, path, kind)
        # Read whole into memory: the file goes with the folder.
        options = {"n_ctx": len(prompt) + longest, "n_threads": threads, "n_threads_batch": threads}
        llama = library.Llama(str(path), use_mmap=False, verbose=False, **options)

    def next_token() -> int:
        logits = library.llama_get_logits_ith(llama.ctx, -1)
        return int(np.ctypeslib.as_array(logits, shape=(model.config.vocab_size,)).argmax())

    def run(count: int) -> list[int]:
        llama.reset()
        llama.eval(prompt)
        found = [next_token()]
        while len(found) < count:
            llama.eval(found[-1:])
            found.append(next_token())
        return found

    return run


def stream_seconds(weights: int, dtype: torch.dtype) -> float:
    """Seconds to read so many weights once with the fastest matrix-vector product, out of a matrix far larger than the
    cache."""
    columns = 1024
    matrix = torch.ones(max(1, weights // columns), columns, dtype=dtype)
    vector, output = torch.ones(columns, dtype=dtype), torch.empty(len(matrix), dtype=dtype)
    operands = weight_operand(matrix), operand(vector), operand(output)
    compiled = torch.compile(lambda: (matrix * vector).sum(-1))
    calls = {
        "product": lambda: torch.mv(matrix, vector),
        "row after row": lambda: multiply(*operands),
        "compiled": compiled,
    }
    return min(timing.seconds for timing in measure(calls, rounds=5, memory=False).values())


def active_weights(model: Qwen3ForCausalLM) -> int:
    """Weights that one token reads: all of the dense model's but the embedding table."""
    return sum(p.numel() for p in model.parameters()) - model.get_input_embeddings().weight.numel()


def run_case(variants: Variants, batch: int, new_tokens: int, rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Figures of the prefill and of decoding."""

    def calls(count: int) -> dict[str, Callable[[], Any]]:
        return {f"{name} {count}": lambda v=variant: v(count) for name, variant in variants.items()}

    timings = measure(calls(1) | calls(1 + new_tokens), rounds, memory=False)
    prefill = figures({name: timings[f"{name} 1"] for name in variants})
    seconds = {
        name: [
            b - a for a, b in zip(timings[f"{name} 1"].rounds, timings[f"{name} {1 + new_tokens}"].rounds, strict=True)
        ]
        for name in variants
    }
    decode = {}
    for name, rounds_of in seconds.items():
        decode[f"{name}_tokens_per_second"] = batch * new_tokens / median(rounds_of)
        if name != OURS:
            decode[f"{name}_ratio"] = median(b / a for a, b in zip(seconds[OURS], rounds_of, strict=True))
    return prefill, decode


def peers(models: dict[str, PreTrainedModel], input_ids: Tensor, new_tokens: int, dtype: torch.dtype) -> Variants:
    """What is compared at one batch size.

    Raises:
        RuntimeError: one that holds the same weights generates other tokens (float32).
    """
    variants: Variants = {
        name: lambda count, m=model: generate(m, input_ids, count) for name, model in models.items() if name != OURS
    }
    ours = models[OURS]
    variants = {
        OURS: lambda count: generate(ours, input_ids, count),
        "modules": lambda count: generate(ours, input_ids, count, disable_compile=True, cache_implementation="dynamic"),
        **variants,
    }
    if len(input_ids) == 1 and "qwen3_moe" in models and importlib.util.find_spec("llama_cpp"):
        variants["llama_cpp"] = llama_cpp(models["qwen3_moe"], input_ids, new_tokens + 1)
    expected = variants["modules"](new_tokens)
    for name in {OURS, "qwen3_moe", "lora"} & variants.keys():
        if dtype == torch.float32 and not torch.equal(variants[name](new_tokens), expected):
            raise RuntimeError(f"{name} and our modules generate different tokens from the same weights")
    if dtype == torch.float32 and "llama_cpp" in variants:
        found = variants["llama_cpp"](new_tokens)
        if found != expected[0, -new_tokens:].tolist():
            raise RuntimeError("llama.cpp and our modules generate different tokens from the same weights")
    return variants


def main(arguments: list[str] | None = None) -> None:
    options = (
        ("--prompt", {"type": int, "default": 64, "help": "tokens of the prompt"}),
        ("--new-tokens", {"type": int, "default": 32}),
        ("--batch", {"type": int, "nargs": "+", "default": [1, 8]}),
        ("--size", {"choices": ["base", "billion", "demo"], "default": "base"}),
        ("--options", {"action": "store_true", "help": "ways to route instead of peers"}),
    )
    parsed = parse("Greedy generate: prefill and tokens per second.", arguments, *options)
    sizes, width = (QUICK, 16) if parsed.quick else (BILLION if parsed.size == "billion" else SIZES, WIDTH)
    prompt, new_tokens = (4, 3) if parsed.quick else (parsed.prompt, parsed.new_tokens)
    batches = [1] if parsed.quick else parsed.batch
    dtype = getattr(torch, parsed.dtype)
    report = Report(f"decode, {parsed.size}, {parsed.dtype}", parsed)
    models: dict[str, PreTrainedModel] = {}
    if parsed.options:
        models = {name: chorus_model(sizes, width, **bank) for name, (bank, _) in ROUTING.items()}
    elif parsed.size == "demo":
        ours, _ = build_demo(["one two three", "four five six"])
        models = {OURS: ours}
    else:
        ours = chorus_model(sizes, width).to(dtype)
        models = {OURS: ours, "qwen3_moe": qwen_model(sizes, width, ours), "dense_active": dense_model(sizes, width)}
    for model in models.values():
        model.to(dtype).eval()
        model.generation_config.eos_token_id = None
        if isinstance(model, ChorusForConditionalGeneration):
            compile_decoding(model)
    if not parsed.options and parsed.size == "base":
        models["lora"] = with_lora(ours)
    for batch in batches:
        vocabulary = models[OURS].get_input_embeddings().num_embeddings
        input_ids = torch.randint(1, vocabulary, (batch, prompt))
        case = f"batch {batch} prompt {prompt}"
        start = time.perf_counter()
        generate(models[OURS], input_ids, new_tokens)
        first = time.perf_counter() - start
        if parsed.options:
            asked = {name: options for name, (_, options) in ROUTING.items()}
            variants: Variants = {
                name: lambda count, m=model, ids=input_ids, o=asked[name]: generate(m, ids, count, **o)
                for name, model in models.items()
            }
        else:
            variants = peers(models, input_ids, new_tokens, dtype)
        prefill, decode = run_case(variants, batch, new_tokens, parsed.rounds)
        if batch == 1 and "dense_active" in models:
            bound = 1 / stream_seconds(active_weights(models["dense_active"]), dtype)
            decode["bound_tokens_per_second"] = bound
            decode["of_bound_ratio"] = decode[f"{OURS}_tokens_per_second"] / bound
        report.add(f"{case} prefill", prefill)
        report.add(f"{case} decode", decode, "tokens_per_second")
        report.add(f"{case} first text", {f"{OURS}_s": first}, "s")
    report.save()


if __name__ == "__main__":
    main()
