"""One layer on a GPU at 8k to 64k tokens in bfloat16: experts, and attention in windows.

Run as `python -m benchmarks.gpu_layers`. Two parts:

- a sparse layer, forward and forward with backward, against Qwen3-MoE's block through `grouped_mm` (transformers'
  default), the same experts of ours through `grouped_mm`, and a dense SwiGLU of equal *active* parameters; text, image
  and audio banks against ERNIE's boolean masks over three modalities. At decoding sizes also `batched_mm`;
- window attention: `block_local` (ours) against `flex_attention` with a block mask, `flash` over everything, and SDPA
  with the window as a dense mask.

All variants of a case hold the same weights; before anything is timed their outputs are compared.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig

from benchmarks.sparse_layer import (
    SHARES,
    ErnieMasks,
    Sizes,
    copy_bank,
    initialised,
    spans,
)
from benchmarks.timing import OURS, Report, figures, measure, parse
from chorus_moe.fastpaths.attention_blocks import LocalMask, attend_in_blocks
from chorus_moe.modeling.layers import GatedMLP
from chorus_moe.modeling.moe_banks import MixtureOfBanks
from chorus_moe.modeling.moe_plan import ForwardPlan

# experts -> (chosen per token, hidden size, width): Qwen3-30B-A3B's, and few wide experts as Mixtral has.
SHAPES = {128: (8, 2048, 768), 16: (2, 2048, 2048)}
TOLERANCE = 5e-2
WINDOW, NUM_GLOBAL, HEADS, KEY_HEADS, HEAD_DIM = 128, 4, 16, 4, 128


def one_bank(sizes: Sizes, modality_BS: Tensor, device: str) -> dict[str, tuple[nn.Module, Callable]]:
    plan = ForwardPlan.build(modality_BS, None)
    kinds = {OURS: "gpu_mm", "grouped_mm": "grouped_mm"}
    if modality_BS.numel() <= 64:
        kinds["batched_mm"] = "batched_mm"
    ours: dict[str, nn.Module] = {}
    for name, kind in kinds.items():
        with torch.device(device):
            ours[name] = MixtureOfBanks(sizes.chorus(["common"], kind), 0).to(torch.bfloat16)
    initialised(ours[OURS])
    for module in ours.values():
        module.load_state_dict(ours[OURS].state_dict())
    config = Qwen3MoeConfig(
        hidden_size=sizes.hidden,
        num_experts=sizes.experts,
        num_experts_per_tok=sizes.top_k,
        moe_intermediate_size=sizes.width,
        norm_topk_prob=True,
    )
    config._experts_implementation = "grouped_mm"
    with torch.device(device):
        block = qwen.Qwen3MoeSparseMoeBlock(config).to(torch.bfloat16)
        copy_bank(ours[OURS], "common", block)
        dense = initialised(GatedMLP(sizes.chorus(["common"]), sizes.top_k * sizes.width).to(torch.bfloat16))
    calls = {name: (module, lambda x, m=module: m(x, plan)[0]) for name, module in ours.items()}
    return calls | {"qwen3_moe": (block, block), "dense_active": (dense, dense)}


def three_modalities(sizes: Sizes, modality_BS: Tensor, device: str) -> dict[str, tuple[nn.Module, Callable]]:
    plan = ForwardPlan.build(modality_BS, None)
    with torch.device(device):
        ours = initialised(MixtureOfBanks(sizes.chorus(list(SHARES), "gpu_mm"), 0).to(torch.bfloat16))
        masks = ErnieMasks(sizes.ernie(), list(SHARES)).to(torch.bfloat16)
    for name in SHARES:
        copy_bank(ours, name, masks.blocks[name])
    return {OURS: (ours, lambda x: ours(x, plan)[0]), "ernie_masks": (masks, lambda x: masks(x, modality_BS))}


def check_equal(outputs: dict[str, Tensor]) -> None:
    """A choice that rounding turns moves a whole token, so few tokens may differ; the rest are equal."""
    expected = outputs[OURS].float()
    for name, output in outputs.items():
        if name != "dense_active":
            error = ((output.float() - expected).norm(dim=-1) / expected.norm(dim=-1)).median().item()
            if not error <= TOLERANCE:
                raise RuntimeError(f"{name}: the median token differs from {OURS} by {error:.1e} of its norm")


def sparse_layers(parsed: argparse.Namespace, report: Report) -> None:
    for experts, (top_k, hidden, width) in SHAPES.items():
        sizes = Sizes(32, 8, 2, 16) if parsed.quick else Sizes(hidden, experts, top_k, width)
        for build, name in ((one_bank, "one bank"), (three_modalities, "three modalities")):
            for tokens in parsed.tokens:
                modality_BS = (
                    spans(tokens, list(SHARES)) if build is three_modalities else torch.zeros(1, tokens).long()
                )
                variants = build(sizes, modality_BS.to(parsed.device), parsed.device)
                states = torch.randn(1, tokens, sizes.hidden, device=parsed.device, dtype=torch.bfloat16)
                with torch.no_grad():
                    check_equal({key: call(states) for key, (_, call) in variants.items()})
                for kind in ("forward", "training"):
                    if kind == "training" and tokens <= 64:
                        continue
                    calls = {key: passes(kind, module, call, states) for key, (module, call) in variants.items()}
                    timings = measure(calls, parsed.rounds, device=parsed.device)
                    report.add(f"E{experts} T{tokens} {name} {kind}", figures(timings))
                del variants


def passes(kind: str, module: nn.Module, call: Callable, states: Tensor) -> Callable[[], None]:
    gradient = torch.randn_like(states)

    def forward() -> None:
        with torch.no_grad():
            call(states)

    def train() -> None:
        leaf = states.detach().requires_grad_()
        call(leaf).backward(gradient)
        module.zero_grad(set_to_none=True)

    return forward if kind == "forward" else train


def window_attention(parsed: argparse.Namespace, report: Report) -> None:
    compiled = torch.compile(flex_attention, dynamic=False)
    for length in [t for t in parsed.tokens if t > 64]:
        shapes = ((1, HEADS, length), (1, KEY_HEADS, length + NUM_GLOBAL), (1, KEY_HEADS, length + NUM_GLOBAL))
        states = [torch.randn(*s, HEAD_DIM, device=parsed.device, dtype=torch.bfloat16) for s in shapes]
        states = [state.requires_grad_() for state in states]
        mask = LocalMask(WINDOW, True, NUM_GLOBAL)

        def seen(batch: Any, head: Any, query: Any, key: Any) -> Any:
            distance = query + NUM_GLOBAL - key
            return (distance >= 0) & (distance < WINDOW) | (key < NUM_GLOBAL)

        block_mask = create_block_mask(seen, None, None, length, length + NUM_GLOBAL, device=parsed.device)
        attend = {
            OURS: lambda q, k, v, m=mask: attend_in_blocks(q, k, v, m).transpose(1, 2),
            "flash": lambda q, k, v: F.scaled_dot_product_attention(
                q, k[:, :, NUM_GLOBAL:], v[:, :, NUM_GLOBAL:], is_causal=True, enable_gqa=True
            ),
        }
        if parsed.device != "cpu":  # it has no backward there
            attend["flex"] = lambda q, k, v, m=block_mask: compiled(q, k, v, block_mask=m, enable_gqa=True)
        if length <= 16384:
            places = torch.arange(length, device=parsed.device)[:, None]
            matrix = seen(0, 0, places, torch.arange(length + NUM_GLOBAL, device=parsed.device))
            attend["dense_mask"] = lambda q, k, v, m=matrix: F.scaled_dot_product_attention(
                q, k, v, attn_mask=m, enable_gqa=True
            )
        with torch.no_grad():
            check_equal({name: call(*states) for name, call in attend.items() if name != "flash"})
        for kind in ("forward", "training"):
            calls = {name: attention_pass(kind, call, states) for name, call in attend.items()}
            report.add(
                f"window {WINDOW} T{length} {kind}", figures(measure(calls, parsed.rounds, device=parsed.device))
            )


def attention_pass(kind: str, call: Callable, states: list[Tensor]) -> Callable[[], None]:
    gradient = torch.randn_like(states[0])

    def forward() -> None:
        with torch.no_grad():
            call(*states)

    def train() -> None:
        torch.autograd.grad(call(*states), states, gradient)

    return forward if kind == "forward" else train


PARTS = {"sparse": sparse_layers, "window": window_attention}


def main(arguments: list[str] | None = None) -> None:
    parsed = parse(
        "Layers on a GPU.",
        arguments,
        ("--device", {"default": "cuda" if torch.cuda.is_available() else "cpu"}),
        ("--tokens", {"type": int, "nargs": "+", "default": [1, 16, 8192, 32768, 65536]}),
        ("--parts", {"nargs": "+", "default": list(PARTS), "choices": list(PARTS)}),
    )
    if parsed.device == "cpu" and not parsed.quick:
        raise SystemExit("benchmarks.gpu_layers needs a GPU, and found none; --quick runs tiny sizes on the CPU")
    if parsed.quick:
        parsed.tokens = [6, 80]
    report = Report(f"layers on {parsed.device}, bfloat16", parsed)
    for part in parsed.parts:
        PARTS[part](parsed, report)
    report.save()


if __name__ == "__main__":
    main()
