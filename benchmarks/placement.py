"""What expert placement spares, with the choices of a model trained on handwritten digits.

    python -m benchmarks.placement

A small decoder learns scikit-learn's digits, 8 x 8 pictures as 64 tokens of grey and one of the digit. Its choices on
half of the held-out pictures place the experts; what leaves a device is counted on the other half. Compared are experts
in order and placed by co-activation, with free choice and within groups (`topk_groups`) of the devices. `kept_weight`
is the share of the router's weight that choices within groups still reach.
"""

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.digit_lessons import stepper
from benchmarks.timing import Report, parse
from chorus_moe import ChorusConfig, ChorusForConditionalGeneration
from chorus_moe.training.scale.placement import by_co_activation, choose_in_groups, in_order, travel

EXPERTS, TOP_K, DEVICES, TOPK_GROUPS = 32, 4, 4, 2
GREYS, LENGTH, HELD_OUT = 17, 65, 400


def digits() -> tuple[Tensor, Tensor]:
    """`(pictures, 65)` token ids to learn from, and those of other writers."""
    from sklearn.datasets import load_digits

    found = load_digits()
    pixels = torch.as_tensor(found.data).long()
    rows = torch.cat([pixels, GREYS + torch.as_tensor(found.target)[:, None]], dim=1)
    # In the order of writers: the last ones are held out.
    return rows[:-HELD_OUT], rows[-HELD_OUT:]


def trained(rows: Tensor, steps: int, seed: int) -> ChorusForConditionalGeneration:
    torch.manual_seed(seed)
    text: dict[str, Any] = {
        **{"vocab_size": GREYS + 10, "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 3},
        **{"intermediate_size": 128, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
        "expert_banks": {"common": {"num_experts": EXPERTS, "num_experts_per_tok": TOP_K}},
    }
    model = ChorusForConditionalGeneration(ChorusConfig(text_config=text)).train()
    take_step = stepper(model, steps, 2e-3)
    for _ in range(steps):
        batch = rows[torch.randint(len(rows), (16,))]
        take_step({"input_ids": batch, "labels": batch})
    return model.eval()


@torch.no_grad()
def routed(model: ChorusForConditionalGeneration, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Probabilities `(T, E)` and choices `(T, K)` of each sparse layer."""
    for layer in model(input_ids=rows, output_router_logits=True).routing:
        yield layer["common"].router_logits.softmax(dim=-1), layer["common"].selected_experts


def compare(model: ChorusForConditionalGeneration, rows: Tensor) -> dict[str, float]:
    """Means over the sparse layers."""
    half, sums, count = len(rows) // 2, dict[str, float](), 0
    for (_, known_TK), (scores_TE, chosen_TK) in zip(
        routed(model, rows[:half]), routed(model, rows[half:]), strict=True
    ):
        count += 1
        places = {"in_order": in_order(EXPERTS, DEVICES), "placed": by_co_activation(known_TK, EXPERTS, DEVICES)}
        for name, device_E in places.items():
            grouped_TK = choose_in_groups(scores_TE, TOP_K, device_E, TOPK_GROUPS)
            kept = scores_TE.gather(1, grouped_TK).sum() / scores_TE.gather(1, chosen_TK).sum()
            for kind, choices_TK in ((name, chosen_TK), (f"{name}_groups", grouped_TK)):
                found = travel(choices_TK, device_E, DEVICES)
                values = {"tokens": found.tokens, "copies": found.copies, "choices": found.choices, "load": found.load}
                for key, value in values.items():
                    sums[f"{kind}_{key}"] = sums.get(f"{kind}_{key}", 0.0) + value
            sums[f"{name}_groups_kept_weight"] = sums.get(f"{name}_groups_kept_weight", 0.0) + float(kept)
    return {name: value / count for name, value in sums.items()}


def main(arguments: list[str] | None = None) -> None:
    options = [
        ("--steps", {"type": int, "default": 200}),
        ("--seeds", {"type": int, "nargs": "+", "default": [0, 1, 2]}),
    ]
    parsed = parse(__doc__ or "", arguments, *options)
    report = Report(f"{EXPERTS} experts, {TOP_K} a token, on {DEVICES} devices", parsed)
    rows, test = digits()
    for seed in parsed.seeds[:1] if parsed.quick else parsed.seeds:
        found = compare(trained(rows, 2 if parsed.quick else parsed.steps, seed), test[: 20 if parsed.quick else None])
        report.cases[f"seed {seed}"] = found
        print(f"seed {seed} | " + " | ".join(f"{name} {value:.3f}" for name, value in found.items()), flush=True)
    report.save()


if __name__ == "__main__":
    main(sys.argv[1:])
