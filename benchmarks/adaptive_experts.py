"""Adaptive experts: the matrix work that unused slots save, and what that does to quality at equal training.

Run as `python -m benchmarks.adaptive_experts`. Three parts:

- a sparse layer whose tokens may visit up to four experts, with complexities given by the caller: all tokens as simple
  as can be (one expert), of all degrees (two and a half in the mean), all as complex as can be (four). `chorus` is the
  layer with four experts for every token, `used` the measured share of its slots, `mflops` the work of the experts;
- three decoders learn the demo's questions in as many steps: `chorus` with four experts for every token, `adaptive`
  with one to four by the entropy of its router, `half` with two. `mflops` is the computation of the decoder on a token,
  in the mean, with the slots used on the held-out questions; `experts` is how many a token visits in a bank. The loss
  is given again with budgets that the models were not trained with;
- decoders learn to count in words, three seeds: `chorus` with four of eight experts for every token, `top_2` and
  `top_1` with fewer, `entropy` with one to four by the entropy of its router, `mean_2` and `mean_1.5` with a learned
  complexity whose budget is that many experts, `top_p_40` and `top_p_60` with the fewest experts whose probabilities
  reach .4 and .6 (Dynamic MoE, arXiv 2403.07652, with its loss on the router's entropy), at most four. Given are the
  experts that a token of the held-out texts visits, the computation of a token, nats for each letter and the share of
  letters of the answers that is right; `spread` is the standard deviation of the loss over the seeds.
"""

import argparse
from collections.abc import Callable
from statistics import fmean, pstdev
from typing import Any

import torch
from torch import Tensor

from benchmarks import counting
from benchmarks.computation import TokenMix, decoder_mflops
from benchmarks.digit_lessons import Batch, Lesson, LessonSettings, lesson_options, media, score, unit_of, with_text
from benchmarks.routing_options import BANK, NO_BALANCE, QUICK, SEQUENCE, SIZES, Option, Variant
from benchmarks.timing import OURS, Report, figures, measure, parse
from chorus_moe.modeling.configuration_modalities import MODALITY_IDS
from chorus_moe.modeling.modeling_generation import ChorusForConditionalGeneration
from chorus_moe.modeling.modeling_outputs import BankRouting
from chorus_moe.modeling.moe_routers import Router

TOKENS = (1, 16, 256, 2048)
TOP_K = 4
ADAPTIVE = NO_BALANCE | {"adaptive_experts": True}
BUDGETS = {
    "held-out, 2 experts": dict.fromkeys(MODALITY_IDS, 2),
    "held-out, 2 for media": {"image": 2, "audio": 2},
    "held-out, 1 expert": dict.fromkeys(MODALITY_IDS, 1),
}
EXPERTS: dict[str, Any] = {"num_experts": 8, "moe_intermediate_size": 64}
# Arm of the third part -> settings of its bank.
ARMS: dict[str, dict[str, Any]] = {
    OURS: {},
    "top_2": {"num_experts_per_tok": 2},
    # A single weight of 1 would not train its router.
    "top_1": {"num_experts_per_tok": 1, "norm_topk_prob": False},
    "entropy": {"adaptive_experts": True},
    "mean_2": {"adaptive_experts": True, "mean_experts": 2},
    "mean_1.5": {"adaptive_experts": True, "mean_experts": 1.5},
    "top_p_40": {"adaptive_experts": True},
    "top_p_60": {"adaptive_experts": True},
}
# That of arXiv 2403.07652.
ENTROPY_COEF = 1e-4


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


def limits_of_top_p(top_p: float, top_k: int) -> Callable[..., tuple[None, Tensor]]:
    """In the place of `Router._limits`: the fewest experts whose probabilities reach `top_p`, at most K."""

    def limits(log_weights_TE: Tensor, options: Any, learned_T: Any) -> tuple[None, Tensor]:
        best_TE = log_weights_TE.detach().softmax(dim=-1).sort(dim=-1, descending=True).values
        return None, 1.0 + (best_TE.cumsum(dim=-1)[:, : top_k - 1] < top_p).sum(dim=-1)

    return limits


class TopP(torch.nn.Module):
    """A decoder whose tokens visit the fewest experts whose probabilities reach `top_p`; for training."""

    def __init__(self, model: ChorusForConditionalGeneration, top_p: float):
        super().__init__()
        self.model = model
        for module in model.modules():
            if isinstance(module, Router):
                module._limits = limits_of_top_p(top_p, module.top_k)

    def forward(self, **batch: Any) -> dict[str, Any]:
        output = self.model(**batch, output_router_logits=True)
        entropies = [
            torch.special.entr(routing.router_logits.softmax(dim=-1)).sum(dim=-1).mean()
            for layer in output.routing
            for routing in layer.values()
        ]
        return {"loss": output.loss + ENTROPY_COEF * torch.stack(entropies).mean()}


@torch.no_grad()
def spent(model: ChorusForConditionalGeneration, ids: Tensor) -> tuple[float, float]:
    """Experts that a token visits in a layer, and millions of operations of its whole way through the layers."""
    compute = model(input_ids=ids, output_compute=True).compute
    layers = len(model.config.text_config.sparse_layers)
    return compute.experts.sum().item() / (ids.numel() * layers), compute.flops.sum().item() / ids.numel() / 1e6


def budgets(parsed: argparse.Namespace, report: Report) -> None:
    """The third part: are budgets met, and at what quality."""
    layers, hidden_size, steps = (2, 32, 2) if parsed.quick else (4, 64, parsed.counting_steps)
    units = ("experts", "mflops", "loss", "right")
    found: dict[str, dict[str, list[float]]] = {unit: {} for unit in units}
    for seed in parsed.counting_seeds[:1] if parsed.quick else parsed.counting_seeds:
        models = {}
        for name, settings in ARMS.items():
            bank = {"common": {"num_experts": 8, "num_experts_per_tok": TOP_K, "intermediate_size": 64} | settings}
            text = {"mlp_layer_types": ["dense"] + ["sparse"] * (layers - 1), "expert_banks": bank}
            models[name] = counting.decoder(
                layers, hidden_size, seed, **text, modalities=["text"], shared_expert_intermediate_size=0
            )
        wrapped = {name: TopP(models[name], int(name[-2:]) / 100) for name in models if name.startswith("top_p")}
        counting.learn(models | wrapped, steps, seed=seed)
        ids = counting.held_out()
        for name, model in models.items():
            values = (*spent(model.eval(), ids), *counting.quality(model, ids))
            for unit, value in zip(units, values, strict=True):
                found[unit].setdefault(f"{name}_{unit}", []).append(value)
        for unit in units:
            report.add(f"counting {unit}, seed {seed}", {key: v[-1] for key, v in found[unit].items()}, unit)
    for unit in units:
        report.add(f"counting {unit}, mean", {key: fmean(values) for key, values in found[unit].items()}, unit)
    spread = {key.replace("_loss", "_spread"): pstdev(values) for key, values in found["loss"].items()}
    report.add("counting loss, spread", spread, "spread")


def layers(parsed: argparse.Namespace, report: Report) -> None:
    """The first part: a sparse layer."""
    for count in (6,) if parsed.quick else TOKENS:
        for kind in ("forward", "training"):
            report.add(f"T{count} {kind}", layer_case(count, kind, parsed))


PARTS = {"layers": layers, "lessons": lessons, "counting": budgets}


def main(arguments: list[str] | None = None) -> None:
    options = (
        ("--parts", {"nargs": "+", "choices": list(PARTS), "default": list(PARTS)}),
        ("--counting-steps", {"type": int, "default": 300, "help": "steps of the third part (default 300)"}),
        ("--counting-seeds", {"type": int, "nargs": "+", "default": [0, 1, 2], "help": "of the third part"}),
    )
    parsed = parse("What adaptive experts save and cost.", arguments, *lesson_options(steps=200, seeds=1), *options)
    report = Report(f"adaptive experts, {parsed.dtype}, up to {TOP_K} experts a token", parsed)
    for part in parsed.parts:
        PARTS[part](parsed, report)
    report.save()


if __name__ == "__main__":
    main()
