"""Memory tokens: what windows alone cannot reach is found again, and what that costs.

Run as `python -m benchmarks.memory_tokens`. Small decoders of two layers with windows of 8 read marked facts, 40 words
of filler, and a question about one of the facts; only its answer is learned. `--facts` says how many kinds of
facts a text holds; the question names the kind.

- `windows` alone reach 14 tokens back; `globals` have constant keys and values besides; `memory` has memory tokens
  (`hybrid_sliding` layers); `full` attends to everything. Chance is an eighth;
- `longer` asks the same models with four times as much filler as they have learned with;
- `prefill` is the time of a whole text, last logits only, of larger decoders with windows of 128; `growth` is the time
  of each length over that of the first.
"""

import argparse
from collections.abc import Callable
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import Report, measure, parse
from chorus_moe import ChorusConfig, ChorusForConditionalGeneration

ANSWERS, FIRST_ANSWER, FIRST_KIND, FIRST_FILLER, VOCABULARY = 8, 4, 12, 32, 64
NEAR, DISTANCE, FAR, MEMORY, LAYERS = 8, 40, 160, 4, 2
WINDOWS: dict[str, Any] = {"sliding_window": NEAR, "layer_types": ["sliding_attention"] * LAYERS}
ARMS: dict[str, dict[str, Any]] = {
    "windows": WINDOWS,
    "globals": WINDOWS | {"num_global_tokens": MEMORY},
    "memory": WINDOWS | {"layer_types": ["hybrid_sliding"] * LAYERS, "num_memory_tokens": MEMORY},
    "full": {},
}


def decoder(changes: dict[str, Any], **sizes: Any) -> ChorusForConditionalGeneration:
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "mlp_layer_types": ["dense"] * LAYERS,
        "cross_modal_layers": [],
        "max_position_embeddings": 32_768,
        "modalities": ["text"],
    }
    return ChorusForConditionalGeneration(ChorusConfig(text_config=text | sizes | changes))


def lesson(batch: int, facts: int, distance: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Texts `(B, S)` and the answers `(B,)` that follow them."""
    told = torch.randint(ANSWERS, (batch, facts), generator=generator)
    kinds = torch.arange(facts).expand(batch, -1)
    head = torch.stack((FIRST_KIND + kinds, FIRST_ANSWER + told), dim=-1).flatten(1)
    filler = torch.randint(FIRST_FILLER, VOCABULARY, (batch, distance), generator=generator)
    asked = torch.randint(facts, (batch, 1), generator=generator)
    # A question is the kind behind a mark, so that it is no fact.
    question = torch.cat((torch.full_like(asked, 1), FIRST_KIND + asked), dim=1)
    return torch.cat((head, filler, question), dim=1), FIRST_ANSWER + told.gather(1, asked).squeeze(1)


def learn(model: ChorusForConditionalGeneration, facts: int, steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    model.train()
    for _ in range(steps):
        texts, answers = lesson(32, facts, DISTANCE, generator)
        logits = model(input_ids=texts, use_cache=False, logits_to_keep=1).logits[:, -1]
        torch.nn.functional.cross_entropy(logits, answers).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()


@torch.no_grad()
def accuracy(model: ChorusForConditionalGeneration, facts: int, distance: int) -> float:
    texts, answers = lesson(256, facts, distance, torch.Generator().manual_seed(10_000))
    logits = model(input_ids=texts, use_cache=False, logits_to_keep=1).logits[:, -1]
    return (logits.argmax(dim=-1) == answers).float().mean().item()


def retrieval(parsed: argparse.Namespace, report: Report) -> None:
    found: dict[str, dict[str, list[float]]] = {}
    for facts in parsed.facts:
        near = f"{facts} fact{'s' if facts > 1 else ''}"
        for seed in parsed.seeds:
            for arm, changes in ARMS.items():
                torch.manual_seed(seed)
                model = decoder(changes)
                learn(model, facts, parsed.steps, seed)
                for case, distance in ((near, DISTANCE), (f"{near}, longer", FAR)):
                    value = accuracy(model, facts, distance)
                    found.setdefault(case, {}).setdefault(f"{arm}_accuracy", []).append(value)
                    report.add(f"{case}, {arm}, seed {seed}", {f"{arm}_accuracy": value}, "accuracy")
    for case, arms in found.items():
        report.add(f"{case}, mean", {arm: fmean(values) for arm, values in arms.items()}, "accuracy")


def cost(parsed: argparse.Namespace, report: Report) -> None:
    window, sizes, lengths = 128, {"hidden_size": 256, "intermediate_size": 512}, parsed.lengths
    if parsed.quick:
        window, sizes, lengths = 8, {}, [64, 128]
    models = {}
    for arm, changes in ARMS.items():
        torch.manual_seed(0)
        wide = {"sliding_window": window} if "sliding_window" in changes else {}
        models[arm] = decoder(changes | wide, **sizes).eval()
    first: dict[str, float] = {}
    for length in lengths:
        texts = torch.randint(FIRST_FILLER, VOCABULARY, (1, length))

        def prefill(model: ChorusForConditionalGeneration, texts: Tensor = texts) -> Callable[[], Any]:
            @torch.no_grad()
            def call() -> Any:
                return model(input_ids=texts, use_cache=False, logits_to_keep=1)

            return call

        timings = measure({arm: prefill(model) for arm, model in models.items()}, parsed.rounds)
        first = first or {arm: timing.seconds for arm, timing in timings.items()}
        values = {f"{arm}_ms": timing.seconds * 1e3 for arm, timing in timings.items()}
        values |= {f"{arm}_mib": timing.peak_mib or 0.0 for arm, timing in timings.items()}
        values |= {f"{arm}_growth": timing.seconds / first[arm] for arm, timing in timings.items()}
        report.add(f"prefill {length}", values)


def main(arguments: list[str] | None = None) -> None:
    options = (
        ("--facts", {"type": int, "nargs": "+", "default": [1, 4], "help": "kinds of facts (default 1 4)"}),
        ("--steps", {"type": int, "default": 300, "help": "training steps (default 300)"}),
        ("--seeds", {"type": int, "nargs": "+", "default": [0, 1, 2]}),
        ("--lengths", {"type": int, "nargs": "+", "default": [2048, 4096, 8192]}),
        ("--parts", {"nargs": "+", "choices": list(PARTS), "default": list(PARTS)}),
    )
    parsed = parse("Memory tokens: what they find again and cost.", arguments, *options)
    if parsed.quick:
        parsed.facts, parsed.steps, parsed.seeds = [1], 2, [0]
    report = Report(f"memory tokens, {MEMORY} a layer, windows of {NEAR}", parsed)
    for part in parsed.parts:
        PARTS[part](parsed, report)
    report.save()


PARTS = {"retrieval": retrieval, "cost": cost}

if __name__ == "__main__":
    main()
