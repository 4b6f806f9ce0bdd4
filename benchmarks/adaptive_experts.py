"""Adaptive experts: the matrix work that unused slots save, and what that does to quality at equal training.

Run as `python -m benchmarks.adaptive_experts`. Two parts:

- a sparse layer whose tokens may visit up to four experts, with complexities given by the caller: all tokens as simple
  as can be (one expert), of all degrees (two and a half in the mean), all as complex as can be (four). `chorus` is the
  layer with four experts for every token, `used` the measured share of its slots, `mflops` the work of the experts;
- three decoders learn the demo's questions in as many steps: `chorus` with four experts for every token, `adaptive`
  with one to four by the entropy of its router, `half` with two. `mflops` is the computation of the decoder on a token,
  in the mean, with the slots used on the held-out questions; `experts` is how many a token visits in a bank. The loss
  is given again with budgets that the models were not trained with.
"""

import argparse
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from benchmarks.computation import TokenMix, decoder_mflops
from benchmarks.digit_lessons import Batch, Lesson, LessonSettings, lesson_options, media, score, unit_of, with_text
from benchmarks.routing_options import BANK, NO_BALANCE, QUICK, SEQUENCE, SIZES, Option, Variant
from benchmarks.timing import OURS, Report, figures, measure, parse
from chorus_moe.modeling.configuration_modalities import MODALITY_IDS
from chorus_moe.modeling.modeling_generation import ChorusForConditionalGeneration
from chorus_moe.modeling.modeling_outputs import BankRouting

TOKENS = (1, 16, 256, 2048)
TOP_K = 4
ADAPTIVE = NO_BALANCE | {"adaptive_experts": True}
BUDGETS = {
    "held-out, 2 experts": dict.fromkeys(MODALITY_IDS, 2),
    "held-out, 2 for media": {"image": 2, "audio": 2},
    "held-out, 1 expert": dict.fromkeys(MODALITY_IDS, 1),
}
EXPERTS: dict[str, Any] = {"num_experts": 8, "moe_intermediate_size": 64}


def banks(**settings: Any) -> dict[str, dict[str, Any]]:
    """The demo's banks: none in the last layer for positions that nothing reads."""
    layers = {"text": None, "image": [1], "audio": [1], "common": None}
    return {name: {"layers": chosen, **settings} for name, chosen in layers.items()}


def slots_used(routing: BankRouting) -> Tensor:
    """`(T,)`: how many experts each row visits."""
    return (routing.selected_experts < routing.router_logits.shape[-1]).sum(dim=-1)


def layer_case(count: int, kind: str, parsed: argparse.Namespace) -> dict[str, float]:
    """Times, used share of the slots and work of the experts, by complexity of the tokens."""
    sizes = (QUICK if parsed.quick else SIZES) | {"num_experts_per_tok": TOP_K}
    batch = max(1, count // SEQUENCE)
    hidden_BSD = torch.randn(batch, count // batch, sizes["hidden_size"], dtype=getattr(torch, parsed.dtype))
    complexities = {
        "adaptive_simple": torch.zeros(hidden_BSD.shape[:2]),
        "adaptive_mixed": torch.linspace(0, 1, count).view(hidden_BSD.shape[:2]),
        "adaptive_complex": torch.ones(hidden_BSD.shape[:2]),
    }
    options = {OURS: Option(NO_BALANCE)}
    options |= {name: Option(ADAPTIVE, {"complexity_scores": scores}) for name, scores in complexities.items()}
    calls, result, experts = {}, {}, None
    for name, option in options.items():
        variant = Variant(option, sizes, hidden_BSD, experts)
        experts = variant.layer.banks[BANK].experts
        calls[name] = variant.forward() if kind == "forward" else variant.training()
        used = slots_used(variant.forward()()[1][BANK]).float().mean().item()
        variant.layer.train(kind == "training")
        result[f"{name}_used"] = used / TOP_K
        result[f"{name}_mflops"] = 6 * used * count * sizes["hidden_size"] * sizes["moe_intermediate_size"] / 1e6
    return figures(measure(calls, parsed.rounds)) | result


@torch.no_grad()
def experts_used(model: ChorusForConditionalGeneration, batches: list[Batch]) -> tuple[dict[str, float], float]:
    """Modality -> experts that a token visits in a bank, in the mean; and slots left unused, over all banks of all
    layers, for each token."""
    model.eval()
    used, visits = dict.fromkeys(MODALITY_IDS, 0), dict.fromkeys(MODALITY_IDS, 0)
    unused = tokens = 0
    for batch in batches:
        modality_T = batch["mm_token_type_ids"].flatten()
        real_T = batch["attention_mask"].flatten().bool()
        tokens += int(real_T.sum())
        for layer in model(**batch, output_router_logits=True).routing:
            for routing in layer.values():
                rows = torch.arange(len(real_T)) if routing.rows is None else routing.rows
                counted_R, used_R = real_T[rows], slots_used(routing)
                unused += int((routing.selected_experts.shape[1] - used_R)[counted_R].sum())
                for name, value in MODALITY_IDS.items():
                    is_this_R = counted_R & (modality_T[rows] == value)
                    used[name] += int(used_R[is_this_R].sum())
                    visits[name] += int(is_this_R.sum())
    return {name: used[name] / max(visits[name], 1) for name in used}, unused / tokens


def lessons(parsed: argparse.Namespace, report: Report) -> None:
    """The second part: quality and use at equal training."""
    settings = LessonSettings.read(parsed)
    scores: list[dict[str, dict[str, float]]] = []
    with media(parsed) as found:
        for seed in parsed.seeds[:1] if parsed.quick else parsed.seeds:
            lesson = Lesson(found, settings, seed)
            mix = TokenMix.of(lesson.held_out)
            base = with_text(lesson.teacher.config, **EXPERTS, num_experts_per_tok=TOP_K, expert_banks=banks())
            configs = {
                OURS: base,
                "adaptive": with_text(base, expert_banks=banks(adaptive_experts=True, num_experts_per_tok=TOP_K)),
                "half": with_text(base, expert_banks=banks(num_experts_per_tok=TOP_K // 2)),
            }
            models = {name: lesson.decoder(config) for name, config in configs.items()}
            report.add(f"seed {seed} training step", figures(lesson.learn(models)))
            scores.append(score(lesson, models))
            rows = scores[-1]
            for name, model in models.items():
                for row, budget in BUDGETS.items():
                    rows.setdefault(row, {})[f"{name}_loss"] = lesson.held_out_loss(model, expert_budget=budget)
                visited, unused = experts_used(model, lesson.held_out)
                for modality, experts in visited.items():
                    rows.setdefault(f"experts of {modality}", {})[f"{name}_experts"] = experts
                text: Any = configs[name].text_config
                saved = 6 * unused * text.hidden_size * text.moe_intermediate_size / 1e6
                rows.setdefault("computation of a token", {})[f"{name}_mflops"] = (
                    decoder_mflops(configs[name], mix) - saved
                )
            for row, values in rows.items():
                report.add(f"seed {seed} {row}", values, unit_of(values))
    for row, values in scores[0].items():
        means = {key: fmean(found[row][key] for found in scores) for key in values}
        report.add(f"mean {row}", means, unit_of(values))


def main(arguments: list[str] | None = None) -> None:
    parsed = parse("What adaptive experts save and cost.", arguments, *lesson_options(steps=200, seeds=1))
    report = Report(f"adaptive experts, {parsed.dtype}, up to {TOP_K} experts a token", parsed)
    for count in (6,) if parsed.quick else TOKENS:
        for kind in ("forward", "training"):
            report.add(f"T{count} {kind}", layer_case(count, kind, parsed))
    lessons(parsed, report)
    report.save()


if __name__ == "__main__":
    main()
