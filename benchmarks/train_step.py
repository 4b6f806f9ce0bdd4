"""One training step (forward, loss, backward, AdamW) of a whole small decoder, at four batch sizes.

Run as `python -m benchmarks.train_step`. Two tables, all variants with the same sizes, head, loss and optimizer:

- text: one bank against Qwen3-Omni thinker's text stack and against our dense decoder of equal *active* parameters;
- text and images: two banks against the ERNIE 4.5 VL text stack, whose experts are split by modality as well.

The balance loss is left out everywhere except in `with_balance`, ours as it trains by default.

`--compile` compares ours with itself under `torch.compile` instead: the whole stack (`whole`), and a decoder layer at a
time (`by_layer`). The first step waits for the compiler.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.ernie4_5_vl_moe import modeling_ernie4_5_vl_moe as ernie
from transformers.models.ernie4_5_vl_moe.configuration_ernie4_5_vl_moe import Ernie4_5_VLMoeTextConfig
from transformers.models.qwen3_omni_moe import modeling_qwen3_omni_moe as qwen
from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import Qwen3OmniMoeTextConfig

from benchmarks.timing import OURS, Report, figures, measure, parse
from chorus_moe.modeling.configuration_text import ChorusTextConfig
from chorus_moe.modeling.losses import mean_over_banks, switch_loss
from chorus_moe.modeling.modeling_text import ChorusTextModel

BATCHES = ((1, 64), (4, 64), (4, 256), (8, 512))  # sequences, tokens
COMPILED_BATCH = (4, 64)
SIZES = {"vocab_size": 4096, "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "num_experts": 16}
QUICK = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_experts": 4}
TOP_K = 2
WIDTH = 512
IMAGE_SHARE = 2 / 3

Step = Callable[[], Any]


class Decoder(nn.Module):
    """A decoder stack of any make, with the head and the loss that all variants share."""

    def __init__(self, stack: nn.Module, vocab_size: int, hidden_size: int):
        super().__init__()
        self.stack = stack
        self.lm_head = nn.Linear(hidden_size, vocab_size, bias=False)

    def forward(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        outputs = self.stack(input_ids=input_ids, use_cache=False, **inputs)
        logits = self.lm_head(outputs.last_hidden_state[:, :-1]).flatten(0, 1)
        loss = F.cross_entropy(logits, input_ids[:, 1:].flatten())
        if inputs.get("output_router_logits"):
            loss = loss + 0.01 * mean_over_banks(outputs.routing, switch_loss)
        return loss


def chorus_config(sizes: dict[str, int], width: int, banks: list[str], kind: str = "sparse") -> ChorusTextConfig:
    return ChorusTextConfig(
        **sizes,
        num_experts_per_tok=TOP_K,
        moe_intermediate_size=width,
        intermediate_size=TOP_K * width,
        shared_expert_intermediate_size=0,
        mlp_layer_types=[kind] * sizes["num_hidden_layers"],
        cross_modal_layers=[],
        use_qk_norm=True,
        expert_banks={name: {} for name in banks},
    )


def qwen_config(sizes: dict[str, int], width: int) -> Qwen3OmniMoeTextConfig:
    heads = sizes["num_attention_heads"]
    head_dim = sizes["hidden_size"] // heads
    config = Qwen3OmniMoeTextConfig(
        **sizes,
        num_key_value_heads=heads,
        num_experts_per_tok=TOP_K,
        moe_intermediate_size=width,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": sections(head_dim)},
    )
    config.head_dim = head_dim
    return config


def ernie_config(sizes: dict[str, int], width: int) -> Ernie4_5_VLMoeTextConfig:
    named = {name: value for name, value in sizes.items() if name != "num_experts"}
    head_dim = sizes["hidden_size"] // sizes["num_attention_heads"]
    return Ernie4_5_VLMoeTextConfig(
        **named,
        num_key_value_heads=sizes["num_attention_heads"],
        moe_num_experts=sizes["num_experts"],
        moe_k=TOP_K,
        moe_intermediate_size=[width, width],
        moe_num_shared_experts=0,
        mlp_layer_types=["sparse"] * sizes["num_hidden_layers"],
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": sections(head_dim)},
    )


def sections(head_dim: int) -> list[int]:
    """How many of the rotary frequencies follow height, width and time; text has all three equal."""
    third = head_dim // 2 // 3
    return [third, third, head_dim // 2 - 2 * third]


def step_of(stack: nn.Module, sizes: dict[str, int], input_ids: Tensor, dtype: torch.dtype, **inputs: Any) -> Step:
    """One optimizer step of a fresh decoder around the stack, as a call."""
    decoder = Decoder(stack, sizes["vocab_size"], sizes["hidden_size"]).to(dtype).train()
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        decoder(input_ids, **inputs).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def text_case(sizes: dict[str, int], width: int, input_ids: Tensor, dtype: torch.dtype) -> dict[str, Step]:
    def chorus(kind: str = "sparse", **inputs: Any) -> Step:
        config = chorus_config(sizes, width, ["common"], kind)
        return step_of(ChorusTextModel._from_config(config), sizes, input_ids, dtype, **inputs)

    thinker = qwen.Qwen3OmniMoeThinkerTextModel._from_config(qwen_config(sizes, width))
    return {
        OURS: chorus(),
        "with_balance": chorus(output_router_logits=True),
        "qwen3_omni": step_of(thinker, sizes, input_ids, dtype),
        "dense_active": chorus("dense"),
    }


def compiled_case(
    sizes: dict[str, int], width: int, input_ids: Tensor, dtype: torch.dtype, report: Report
) -> dict[str, Step]:
    def chorus(compiles: str = "") -> Step:
        stack = ChorusTextModel._from_config(chorus_config(sizes, width, ["common"]))
        for module in {"whole": [stack], "by_layer": stack.layers}.get(compiles, []):
            module.compile()
        return step_of(stack, sizes, input_ids, dtype)

    calls = {OURS: chorus()} | {name: chorus(name) for name in ("whole", "by_layer")}
    first = {}
    for name, call in calls.items():
        start = time.perf_counter()
        call()
        first[f"{name}_s"] = time.perf_counter() - start
    report.add("first step", first, "s")
    return calls


def mixed_case(sizes: dict[str, int], width: int, input_ids: Tensor, dtype: torch.dtype) -> dict[str, Step]:
    modality_BS = torch.zeros_like(input_ids)
    modality_BS[:, 1 : 1 + round(IMAGE_SHARE * input_ids.shape[1])] = 1
    config = chorus_config(sizes, width, ["text", "image"])
    ours = ChorusTextModel._from_config(config)
    stack = ernie.Ernie4_5_VLMoeTextModel._from_config(ernie_config(sizes, width))
    return {
        OURS: step_of(ours, sizes, input_ids, dtype, mm_token_type_ids=modality_BS),
        "ernie_vl": step_of(stack, sizes, input_ids, dtype, moe_mm_token_type_ids=modality_BS),
    }


def cases(quick: bool) -> Iterator[tuple[str, Callable[..., dict[str, Step]], tuple[int, int]]]:
    for batch in ((1, 8),) if quick else BATCHES:
        yield f"text {batch[0]}x{batch[1]}", text_case, batch
        yield f"text+image {batch[0]}x{batch[1]}", mixed_case, batch


def main(arguments: list[str] | None = None) -> None:
    options = (("--compile", {"action": "store_true", "help": "ours with and without the compiler, 4 x 64 tokens"}),)
    parsed = parse("One training step of a whole small decoder.", arguments, *options)
    sizes, width = (QUICK, 16) if parsed.quick else (SIZES, WIDTH)
    report = Report(f"training step, {parsed.dtype}", parsed)
    if parsed.compile:
        input_ids = torch.randint(sizes["vocab_size"], (1, 8) if parsed.quick else COMPILED_BATCH)
        calls = compiled_case(sizes, width, input_ids, getattr(torch, parsed.dtype), report)
        report.add("text, compiled", figures(measure(calls, parsed.rounds)))
        report.save()
        return
    for name, build, (batch, length) in cases(parsed.quick):
        input_ids = torch.randint(sizes["vocab_size"], (batch, length))
        calls = build(sizes, width, input_ids, getattr(torch, parsed.dtype))
        report.add(name, figures(measure(calls, parsed.rounds)))
    report.save()


if __name__ == "__main__":
    main()
