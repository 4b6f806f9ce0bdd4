"""Long inputs: windows with global tokens, experts and chunked feed-forwards against standard dense models.

Run as `python -m benchmarks.long_context [--plot PATH]`. Four parts:

- a whole decoder over 4k, 8k and 16k tokens, last logits only, no cache. `chorus`: window 128, 4 global tokens, 16
  experts of width 512, 2 a token. `flash`: Llama with full attention through SDPA's flash kernel and a feed-forward of
  width 2048, twice what a token uses of `chorus`. `equal_active`: `chorus` with experts of width 1024, as much work a
  token as `flash`. `materialised`: `flash` with its scores as a matrix, what a standard transformer does, at 4k.
  On another device than the CPU the layers are four times as wide.
  `memory_saving` is the share of the other's peak memory that is spared, beyond the loaded model;
- the same decoder without causality, its global tokens in front of the sequence: `chorus` without an attention mask,
  `masked` with one of ones, `flash` with full attention in both layers. `growth` is the time of each length over that
  of the first;
- a training step of the attention alone at 4k and 8k against the flash kernel;
- retrieval: a fact in the text, or in an image, far in front of the question. `windows` alone; `globals`, windows with
  global tokens; `full_layer`, windows and one layer with full attention; `cross_layer`, the same with cross-modal
  attention in it; `chorus`, all of it; `full`, full attention in all layers.
"""

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.timing import OURS, Report, figures, measure, parse, ratio
from chorus_moe import ChorusConfig, ChorusForConditionalGeneration
from chorus_moe.fastpaths.attention_blocks import LocalMask, attend_in_blocks
from chorus_moe.modeling.modeling_text import ChorusTextModel

SIZES: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 32_768,
}
GPU_SIZES: dict[str, Any] = SIZES | {"hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 4}
GPU_SIZES |= {"head_dim": 128, "max_position_embeddings": 131_072}
QUICK: dict[str, Any] = SIZES | {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
WINDOW, NUM_GLOBAL, EXPERTS, TOP_K = 128, 4, 16, 2
PARITY = 1e-4

IMAGE, QUESTIONS, FIRST_ANSWER, FIRST_FILLER, VOCABULARY = 3, (4, 5), 8, 16, 48
ANSWERS, FACT, DISTANCE, NEAR = 8, 6, 80, 8
ARMS: dict[str, dict[str, Any]] = {
    "windows": {"layer_types": ["sliding_attention"] * 3, "sliding_window": NEAR, "cross_modal_layers": []},
    "full": {"cross_modal_layers": [1]},
}
ARMS["globals"] = ARMS["windows"] | {"num_global_tokens": NUM_GLOBAL}
ARMS["full_layer"] = ARMS["windows"] | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
ARMS["cross_layer"] = ARMS["full_layer"] | {"cross_modal_layers": [1]}
ARMS[OURS] = ARMS["cross_layer"] | {"num_global_tokens": NUM_GLOBAL}


def text_settings(sizes: dict[str, Any], layers: int, width: int) -> dict[str, Any]:
    return sizes | {
        "num_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
        "moe_intermediate_size": width,
        "shared_expert_intermediate_size": 0,
        "num_hidden_layers": layers,
        "mlp_layer_types": ["sparse"] * layers,
        "layer_types": ["sliding_attention"] * layers,
        "sliding_window": WINDOW,
        "num_global_tokens": NUM_GLOBAL,
        "cross_modal_layers": [],
        "expert_banks": {"common": {}},
    }


def chorus(sizes: dict[str, Any], layers: int, width: int, attention: str = "sdpa") -> PreTrainedModel:
    torch.manual_seed(0)
    config = ChorusConfig(text_config=text_settings(sizes, layers, width))
    return ChorusForConditionalGeneration._from_config(config, attn_implementation=attention).eval()


def llama(sizes: dict[str, Any], layers: int, width: int, attention: str) -> PreTrainedModel:
    config = LlamaConfig(**sizes, num_hidden_layers=layers, intermediate_size=width)
    return LlamaForCausalLM._from_config(config, attn_implementation=attention).eval()


@torch.no_grad()
def check_parity(sizes: dict[str, Any], layers: int, width: int, device: str) -> None:
    """Blocks and chunks against the dense mask in one piece, before anything is timed."""
    input_ids = torch.randint(1, sizes["vocab_size"], (1, 2 * WINDOW + 77), device=device)
    models = [chorus(sizes, layers, width, name).to(device) for name in ("sdpa", "eager")]
    blocks, dense = (model(input_ids=input_ids).logits for model in models)
    if (blocks - dense).abs().max() > PARITY:
        raise RuntimeError(f"blocks and the dense mask differ by {(blocks - dense).abs().max()}")


def prefill(model: PreTrainedModel, input_ids: Tensor) -> Callable[[], Any]:
    @torch.no_grad()
    def call() -> Any:
        return model(input_ids=input_ids, use_cache=False, logits_to_keep=1).logits

    return call


def whole_model(parsed: argparse.Namespace, report: Report) -> None:
    device, on_cpu = parsed.device, parsed.device == "cpu"
    sizes, lengths = (SIZES if on_cpu else GPU_SIZES), parsed.lengths
    width = sizes["hidden_size"]
    if parsed.quick:
        sizes, lengths, width = QUICK, [300, 600, 1200], 16
    check_parity(sizes, parsed.layers, width, device)
    models = {
        OURS: chorus(sizes, parsed.layers, width),
        "equal_active": chorus(sizes, parsed.layers, 2 * width),
        "flash": llama(sizes, parsed.layers, 4 * width, "sdpa"),
        "materialised": llama(sizes, parsed.layers, 4 * width, "eager"),
    }
    models = {name: model.to(device, getattr(torch, parsed.dtype)) for name, model in models.items()}
    seconds = []
    for length in lengths:
        input_ids = torch.randint(1, sizes["vocab_size"], (1, length), device=device)
        chosen = {name: m for name, m in models.items() if name != "materialised" or length == lengths[0]}
        calls = {name: prefill(model, input_ids) for name, model in chosen.items()}
        timings = measure(calls, parsed.rounds, device=device)
        values = {f"{name}_ms": timing.seconds * 1e3 for name, timing in timings.items()}
        values |= {f"{name}_mib": timing.peak_mib or 0.0 for name, timing in timings.items()}
        values |= {
            "speedup_ratio": ratio(timings["flash"], timings[OURS]),
            "memory_saving": 1 - values[f"{OURS}_mib"] / values["flash_mib"],
            "equal_active_speedup_ratio": ratio(timings["flash"], timings["equal_active"]),
            "equal_active_memory_saving": 1 - values["equal_active_mib"] / values["flash_mib"],
        }
        if "materialised" in timings:
            values["materialised_speedup_ratio"] = ratio(timings["materialised"], timings[OURS])
            values["materialised_memory_saving"] = 1 - values[f"{OURS}_mib"] / values["materialised_mib"]
        seconds.append(timings[OURS].seconds)
        report.add(f"prefill {length}", values)
        print("   ", ", ".join(f"{key} {value:.2f}" for key, value in values.items() if key[-2:] in ("io", "ng")))
    report.add("growth", {"growth_ratio": seconds[-1] / seconds[0]}, "ratio")


def bidirectional(parsed: argparse.Namespace, report: Report) -> None:
    sizes, lengths = (SIZES if parsed.device == "cpu" else GPU_SIZES), parsed.lengths
    if parsed.quick:
        sizes, lengths = QUICK, [300, 600]
    text = text_settings(sizes, parsed.layers, sizes["hidden_size"]) | {"is_causal": False}
    dense = {"layer_types": ["full_attention"] * parsed.layers, "num_global_tokens": 0, "sliding_window": None}
    torch.manual_seed(0)
    local, flash = (
        ChorusTextModel._from_config(ChorusConfig(text_config=text | changes).text_config, attn_implementation="sdpa")
        .eval()
        .to(parsed.device, getattr(torch, parsed.dtype))
        for changes in ({}, dense)
    )
    first: dict[str, float] = {}
    for length in lengths:
        input_ids = torch.randint(1, sizes["vocab_size"], (1, length), device=parsed.device)

        @torch.no_grad()
        def call(model: PreTrainedModel, mask: Tensor | None = None, input_ids: Tensor = input_ids) -> Any:
            return model(input_ids=input_ids, attention_mask=mask, use_cache=False).last_hidden_state

        calls = {
            OURS: partial(call, local),
            "masked": partial(call, local, torch.ones_like(input_ids)),
            "flash": partial(call, flash),
        }
        timings = measure(calls, parsed.rounds, device=parsed.device)
        first = first or {name: timing.seconds for name, timing in timings.items()}
        growth = {f"{name}_growth": timing.seconds / first[name] for name, timing in timings.items()}
        report.add(f"bidirectional {length}", figures(timings) | growth)


def plot(path: Path, cases: Mapping[str, Mapping[str, float]]) -> None:
    """Time and memory of the prefill over its length, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    rows = {int(case.split()[1]): values for case, values in cases.items() if case.startswith("prefill")}
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    panels = {"seconds": ("ms", 1e-3), "peak MiB beyond the weights": ("mib", 1.0)}
    for axis, (title, (unit, scale)) in zip(axes, panels.items(), strict=True):
        for name in (OURS, "equal_active", "flash", "materialised"):
            points = [(n, v[f"{name}_{unit}"] * scale) for n, v in rows.items() if f"{name}_{unit}" in v]
            axis.plot(*zip(*points, strict=True), "o-", label=name)
        axis.set(xlabel="tokens", title=title, xscale="log", yscale="log")
        axis.set_xticks(list(rows), [f"{n // 1024}k" if n >= 1024 else str(n) for n in rows], minor=False)
        axis.xaxis.set_minor_formatter(ticker.NullFormatter())
        axis.grid(alpha=0.3)
    axes[0].legend(loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def attention_training(parsed: argparse.Namespace, report: Report) -> None:
    heads, groups, size = (2, 1, 16) if parsed.quick else (8, 2, 64)
    for length in [300] if parsed.quick else parsed.lengths[:2]:
        query = torch.randn(1, heads, length, size).requires_grad_()
        key, value = (torch.randn(1, groups, length, size).requires_grad_() for _ in range(2))
        learned = [torch.randn(1, groups, NUM_GLOBAL, size).requires_grad_() for _ in range(2)]
        mask = LocalMask(WINDOW, True, NUM_GLOBAL)

        def ours(query=query, key=key, value=value, learned=learned, mask=mask) -> Any:
            states = [torch.cat(pair, dim=2) for pair in zip(learned, (key, value), strict=True)]
            return torch.autograd.grad(attend_in_blocks(query, *states, mask).sum(), (query, key, value, *learned))

        def flash(query=query, key=key, value=value) -> Any:
            output = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
            return torch.autograd.grad(output.sum(), (query, key, value))

        timings = measure({OURS: ours, "flash": flash}, parsed.rounds, memory=False)
        values = {f"{name}_ms": timing.seconds * 1e3 for name, timing in timings.items()}
        report.add(f"attention training {length}", values | {"flash_ratio": ratio(timings["flash"], timings[OURS])})


def retrieval_config(arm: str) -> ChorusConfig:
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_experts": 4,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
        "max_position_embeddings": 256,
        **ARMS[arm],
    }
    vision = {
        "architecture": "vit_tiny_patch16_224",
        "model_args": {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2},
        "image_size": 16,
        "pool_size": 1,
    }
    return ChorusConfig(text_config=text, vision_config=vision, image_token_id=IMAGE)


def facts(batch: int, tokens: int, generator: torch.Generator) -> dict[str, Tensor]:
    """An image and a marked fact, then filler, then a question about one of the two and its answer."""
    told, seen = (torch.randint(ANSWERS, (batch,), generator=generator) for _ in range(2))
    asks_image = torch.arange(batch) % 2
    head = torch.full((batch, tokens + 2), IMAGE)
    head[:, tokens], head[:, tokens + 1] = FACT, FIRST_ANSWER + told
    filler = torch.randint(FIRST_FILLER, VOCABULARY, (batch, DISTANCE), generator=generator)
    question = torch.tensor(QUESTIONS)[asks_image][:, None]
    answer = FIRST_ANSWER + torch.where(asks_image.bool(), seen, told)[:, None]
    input_ids = torch.cat((head, filler, question, answer), dim=1)
    labels = torch.full_like(input_ids, -100)
    labels[:, -1] = answer[:, 0]
    # The bits of the answer light up three stripes of the image.
    bits = (seen[:, None] >> torch.arange(3)) & 1
    stripes = F.pad(bits, (0, 1)).float().repeat_interleave(4, dim=1)[:, None, None] * 2 - 1
    pixels = stripes.expand(batch, 3, 16, 16) + 0.1 * torch.randn(batch, 3, 16, 16, generator=generator)
    return {"input_ids": input_ids, "labels": labels, "pixel_values": pixels, "asks_image": asks_image}


def learn(model: PreTrainedModel, steps: int, batch: int, seed: int) -> tuple[float, float]:
    """Accuracy on new facts of text and of images after training."""
    tokens = model.config.vision_config.num_image_tokens
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    model.train()
    for _ in range(steps):
        lesson = facts(batch, tokens, generator)
        lesson.pop("asks_image")
        model(**lesson).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()
    test = facts(256, tokens, generator)
    asks_image, labels = test.pop("asks_image").bool(), test.pop("labels")
    with torch.no_grad():
        right = model(**test, use_cache=False).logits[:, -2].argmax(dim=-1) == labels[:, -1]
    return right[~asks_image].float().mean().item(), right[asks_image].float().mean().item()


def retrieval(parsed: argparse.Namespace, report: Report) -> None:
    seeds = parsed.seeds[:1] if parsed.quick else parsed.seeds
    found: dict[str, dict[str, list[float]]] = {"text": {}, "image": {}}
    for seed in seeds:
        for arm in ARMS:
            torch.manual_seed(seed)
            model = ChorusForConditionalGeneration(retrieval_config(arm))
            accuracies = learn(model, 2 if parsed.quick else parsed.steps, 4 if parsed.quick else 32, seed)
            for arms, accuracy in zip(found.values(), accuracies, strict=True):
                arms.setdefault(f"{arm}_accuracy", []).append(accuracy)
        for row, arms in found.items():
            values = {name: accuracies[-1] for name, accuracies in arms.items()}
            report.add(f"fact in {row}, {DISTANCE} tokens away, seed {seed}", values, "accuracy")
    for row, arms in found.items():
        values = {name: fmean(accuracies) for name, accuracies in arms.items()}
        report.add(f"fact in {row}, mean", values, "accuracy")


PARTS = {"prefill": whole_model, "bidirectional": bidirectional, "training": attention_training, "retrieval": retrieval}


def main(arguments: list[str] | None = None) -> None:
    options = (
        ("--lengths", {"type": int, "nargs": "+", "default": [4096, 8192, 16_384]}),
        ("--layers", {"type": int, "default": 2, "help": "layers of the timed models (default 2)"}),
        ("--steps", {"type": int, "default": 400, "help": "training steps of the retrieval task (default 400)"}),
        ("--seeds", {"type": int, "nargs": "+", "default": [0, 1, 2], "help": "of the retrieval task (default 0 1 2)"}),
        ("--parts", {"nargs": "+", "choices": list(PARTS), "default": list(PARTS)}),
        ("--plot", {"type": Path, "metavar": "PATH", "help": "also draw time and memory over the length"}),
        ("--device", {"default": "cpu", "help": "where the whole models run (default cpu)"}),
    )
    parsed = parse("Long inputs: windows, global tokens, chunks.", arguments, *options)
    report = Report(f"long context, {parsed.dtype}, window {WINDOW}, {parsed.layers} layers", parsed)
    for part in parsed.parts:
        PARTS[part](parsed, report)
    if parsed.plot is not None:
        plot(parsed.plot, report.cases)
    report.save()


if __name__ == "__main__":
    main()
