"""Greedy `generate`: milliseconds of the prefill and tokens per second after it, batch 1 and 8.

Run as `python -m benchmarks.decode`. Ours against `Qwen3MoeForCausalLM` with the same weights and dense Qwen3 of
equal *active* parameters; ours and Qwen3-MoE must generate the same tokens. Decoding is timed as the difference
between generating many tokens and generating one. `bound` is the rate at which this machine could stream the active
weights.
"""

from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from benchmarks.timing import OURS, Report, figures, measure, parse
from chorus_moe import ChorusConfig, ChorusForConditionalGeneration
from chorus_moe.fastpaths.row_products import multiply, operand, weight_operand

SIZES = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 2048,
}
QUICK = SIZES | {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 16}
EXPERTS, TOP_K, WIDTH = 16, 2, 512


def chorus_model(sizes: dict[str, int], width: int) -> ChorusForConditionalGeneration:
    text = {
        **sizes,
        "num_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
        "moe_intermediate_size": width,
        "shared_expert_intermediate_size": 0,
        "mlp_layer_types": ["sparse"] * sizes["num_hidden_layers"],
        "cross_modal_layers": [],
        "expert_banks": {"common": {}},
        "use_qk_norm": True,
    }
    return ChorusForConditionalGeneration(ChorusConfig(text_config=text))


def qwen_model(sizes: dict[str, int], width: int, ours: ChorusForConditionalGeneration) -> Qwen3MoeForCausalLM:
    """Qwen3-MoE with our weights."""
    rope = ours.config.text_config.rope_parameters
    config = Qwen3MoeConfig(
        **sizes,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        moe_intermediate_size=width,
        norm_topk_prob=True,
        rope_parameters=dict(rope),
    )
    model = Qwen3MoeForCausalLM(config)
    renamed = {}
    for name, value in ours.state_dict().items():
        name = name.replace("model.language_model.", "model.").replace("mlp.banks.common.router.", "mlp.gate.")
        renamed[name.replace("mlp.banks.common.experts.", "mlp.experts.")] = value
    model.load_state_dict(renamed)
    return model


def dense_model(sizes: dict[str, int], width: int) -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(Qwen3Config(**sizes, intermediate_size=TOP_K * width))


def generate(model: PreTrainedModel, input_ids: Tensor, new_tokens: int) -> Tensor:
    return model.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
    )


def stream_seconds(weights: int, dtype: torch.dtype) -> float:
    """Seconds to read so many weights once with the fastest matrix-vector product, out of a matrix far larger than the
    cache."""
    columns = 1024
    matrix = torch.ones(max(1, weights // columns), columns, dtype=dtype)
    vector, output = torch.ones(columns, dtype=dtype), torch.empty(len(matrix), dtype=dtype)
    operands = weight_operand(matrix), operand(vector), operand(output)
    calls = {"product": lambda: torch.mv(matrix, vector), "row after row": lambda: multiply(*operands)}
    return min(timing.seconds for timing in measure(calls, rounds=5, memory=False).values())


def active_weights(model: Qwen3ForCausalLM) -> int:
    """Weights that one token reads: all of the dense model's but the embedding table."""
    return sum(p.numel() for p in model.parameters()) - model.get_input_embeddings().weight.numel()


def run_case(
    models: dict[str, PreTrainedModel], input_ids: Tensor, new_tokens: int, rounds: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Figures of the prefill and of decoding."""

    def calls(count: int) -> dict[str, Callable[[], Any]]:
        return {f"{name} {count}": lambda m=model: generate(m, input_ids, count) for name, model in models.items()}

    timings = measure(calls(1) | calls(1 + new_tokens), rounds, memory=False)
    prefill = figures({name: timings[f"{name} 1"] for name in models})
    seconds = {
        name: [
            b - a for a, b in zip(timings[f"{name} 1"].rounds, timings[f"{name} {1 + new_tokens}"].rounds, strict=True)
        ]
        for name in models
    }
    decode = {}
    for name, rounds_of in seconds.items():
        decode[f"{name}_tokens_per_second"] = len(input_ids) * new_tokens / median(rounds_of)
        if name != OURS:
            decode[f"{name}_ratio"] = median(b / a for a, b in zip(seconds[OURS], rounds_of, strict=True))
    return prefill, decode


def main(arguments: list[str] | None = None) -> None:
    options = (
        ("--prompt", {"type": int, "default": 64, "help": "tokens of the prompt"}),
        ("--new-tokens", {"type": int, "default": 32}),
        ("--batch", {"type": int, "nargs": "+", "default": [1, 8]}),
    )
    parsed = parse("Greedy generate: prefill and tokens per second.", arguments, *options)
    sizes, width = (QUICK, 16) if parsed.quick else (SIZES, WIDTH)
    prompt, new_tokens = (4, 3) if parsed.quick else (parsed.prompt, parsed.new_tokens)
    dtype = getattr(torch, parsed.dtype)
    report = Report(f"decode, {parsed.dtype}", parsed)
    ours = chorus_model(sizes, width)
    models = {OURS: ours, "qwen3_moe": qwen_model(sizes, width, ours), "dense_active": dense_model(sizes, width)}
    for model in models.values():
        model.to(dtype).eval()
        model.generation_config.eos_token_id = None
    for batch in parsed.batch:
        input_ids = torch.randint(1, sizes["vocab_size"], (batch, prompt))
        texts = [generate(models[name], input_ids, new_tokens) for name in (OURS, "qwen3_moe")]
        if dtype == torch.float32 and not torch.equal(*texts):
            raise RuntimeError("ours and Qwen3-MoE generate different tokens from the same weights")
        prefill, decode = run_case(models, input_ids, new_tokens, parsed.rounds)
        if batch == 1:
            bound = 1 / stream_seconds(active_weights(models["dense_active"]), dtype)
            decode["bound_tokens_per_second"] = bound
            decode["of_bound_ratio"] = decode[f"{OURS}_tokens_per_second"] / bound
        report.add(f"batch {batch} prompt {prompt} prefill", prefill)
        report.add(f"batch {batch} prompt {prompt} decode", decode, "tokens_per_second")
    report.save()


if __name__ == "__main__":
    main()
