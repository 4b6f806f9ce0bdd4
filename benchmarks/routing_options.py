"""What each routing option costs: a sparse layer with it over the same layer with the plain softmax router.

Run as `python -m benchmarks.routing_options`. For each number of tokens three cases:

- `forward` and `training` (forward and backward): the layer, with the plan that the model has worked out;
- `once a forward`: that plan, which all layers of a model share, with the options that the call asks for.

No option here saves the experts much work: the budget is K, an untrained router uses over 99% of the adaptive slots,
and K experts are drawn. Where options only exist in training, they are measured there only.

Of few tokens, sampled routing visits other experts at each call where the plain layer finds the same ones, and finds
them in the cache. `sampled_spread` is sampled routing over the plain layer on tokens whose best experts are a replay
of draws: as many different experts, and nothing drawn.

Each option takes turns with the plain layer alone, so compare ratios; `chorus_ms` is that of the last pair.
The balance losses are added to the loss; `bias` counts the choices and moves the bias, once a step.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.timing import OURS, Report, figures, measure, parse
from chorus_moe.modeling.configuration_text import ChorusTextConfig
from chorus_moe.modeling.losses import balance_loss
from chorus_moe.modeling.modeling_outputs import RoutingOfLayer
from chorus_moe.modeling.moe_banks import MixtureOfBanks
from chorus_moe.modeling.moe_plan import ForwardPlan, read_routing_options
from chorus_moe.training.routing.balance import balance_counts, update_balance_bias

BANK = "common"
TOKENS = (1, 16, 256, 8192)
SEQUENCE = 512  # tokens of one sequence at most
SIZES = {"hidden_size": 512, "num_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 512}
QUICK = {"hidden_size": 32, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SAMPLED, DRAWS = "sampled", 64  # draws that are replayed
PASSES = ("forward", "training", "once a forward")


@dataclass(frozen=True)
class Option:
    """Settings of the bank, arguments of the call, and whether it works outside training."""

    bank: dict[str, Any] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=dict)
    in_eval: bool = True


NO_BALANCE = {"balance": "none"}
GROUPS = {"num_groups": 4, "topk_groups": 2}
OPTIONS: dict[str, Option] = {
    OURS: Option(NO_BALANCE),
    "sigmoid": Option(NO_BALANCE | {"router": "sigmoid"}),
    "sigmoid_groups": Option({"router": "sigmoid", "balance": "bias"} | GROUPS),
    "attention": Option(NO_BALANCE | {"router": "attention"}),
    "switch": Option({"balance": "switch"}, in_eval=False),
    "cv2": Option({"balance": "cv2"}, in_eval=False),
    "variance": Option({"balance": "variance"}, in_eval=False),
    "bias": Option({"balance": "bias"}),
    "reroute": Option(NO_BALANCE | {"expert_capacity": 1.25}, in_eval=False),
    "drop": Option(NO_BALANCE | {"expert_capacity": 1.25, "capacity_overflow": "drop"}, in_eval=False),
    "adaptive": Option(NO_BALANCE | {"adaptive_experts": True}),
    "budget": Option(NO_BALANCE, {"expert_budget": {"text": SIZES["num_experts_per_tok"]}}),
    SAMPLED: Option(NO_BALANCE, {"sample_experts": (BANK,)}),
    "jitter": Option(NO_BALANCE | {"router_jitter_noise": 0.01}, in_eval=False),
}


class Variant:
    """A layer with one option, for one shape of input, around the experts that all variants share.

    Experts and gradients of their own would make the variants differ by which memory they get, by up to a factor of 2.
    """

    def __init__(self, option: Option, sizes: dict[str, int], hidden_BSD: Tensor, experts: nn.Module | None):
        config = ChorusTextConfig(
            **sizes,
            vocab_size=64,
            num_hidden_layers=1,
            mlp_layer_types=["sparse"],
            shared_expert_intermediate_size=0,
            expert_banks={BANK: option.bank},
        )
        config._experts_implementation = "cpu_mm"
        self.option = option
        self.banks = {bank.name: bank for bank in config.banks}
        self.layer = MixtureOfBanks(config, 0)
        with torch.no_grad():
            for parameter in self.layer.parameters():
                parameter.normal_(std=0.05)
        self.layer.to(hidden_BSD.dtype)
        if experts is not None:
            self.layer.banks[BANK].experts = experts
        self.hidden_BSD = hidden_BSD
        self.modality_BS = torch.zeros(hidden_BSD.shape[:2], dtype=torch.long)

    def prepare(self, is_training: bool) -> ForwardPlan:
        """What a model does once a forward, for all its layers."""
        asked = {"complexity_scores": None, "expert_budget": None, "sample_experts": None} | self.option.call
        options = read_routing_options(self.banks, self.modality_BS, None, is_training, None, **asked)
        plan = ForwardPlan.build(self.modality_BS, None, options)
        bank = self.banks[BANK]
        plan.row_options(BANK, bank.modalities, None, plan.token_mask(bank.modalities, None))
        return plan

    def forward(self) -> Callable[[], Any]:
        self.layer.eval()
        plan = self.prepare(is_training=False)
        return torch.no_grad()(lambda: self.layer(self.hidden_BSD, plan))

    def replay(self, sampled: "Variant") -> Callable[[], Any]:
        """As `forward`, on tokens whose best experts are those that another layer draws, one draw after the other."""
        self.layer.eval()
        sampled.layer.eval()
        plan, drawing = self.prepare(is_training=False), sampled.prepare(is_training=False)
        router = self.layer.banks[BANK].router
        tokens = []
        with torch.no_grad():
            sorted_TE = router.score(self.hidden_BSD.flatten(0, 1).float()).sort(dim=-1, descending=True).values
            inverse_DE = torch.linalg.pinv(router.weight.float())
            for _ in range(DRAWS):
                drawn_TK = sampled.layer(self.hidden_BSD, drawing)[1][BANK].selected_experts
                places_K = torch.arange(drawn_TK.shape[1], 0, -1.0)
                ranked_TE = torch.zeros_like(sorted_TE).scatter(1, drawn_TK, places_K.expand(drawn_TK.shape))
                logits_TE = torch.empty_like(sorted_TE).scatter(1, ranked_TE.argsort(descending=True), sorted_TE)
                hidden_TD = (logits_TE @ inverse_DE.T).to(self.hidden_BSD.dtype)
                tokens.append(hidden_TD.view_as(self.hidden_BSD))
        turn = cycle(tokens)
        return torch.no_grad()(lambda: self.layer(next(turn), plan))

    def training(self) -> Callable[[], None]:
        self.layer.train()
        plan = self.prepare(is_training=True)

        def step() -> None:
            output_BSD, routing = self.layer(self.hidden_BSD.detach().requires_grad_(), plan)
            (output_BSD.sum() + self.routing_loss(routing)).backward()
            self.move_bias(routing)
            self.layer.zero_grad(set_to_none=True)

        return step

    def routing_loss(self, routing: RoutingOfLayer) -> Tensor | float:
        """What the option adds to the loss."""
        drawn_T = routing[BANK].log_probs
        if drawn_T is not None:
            return -drawn_T.mean()
        added = balance_loss([routing], self.banks)
        return 0.0 if added is None else 0.01 * added

    def move_bias(self, routing: RoutingOfLayer) -> None:
        """What the option does after the optimizer's step."""
        if self.banks[BANK].balance == "bias":
            update_balance_bias(self.layer.banks[BANK].router, balance_counts([routing], [0])[0][BANK])


def spread_figures(sizes: dict[str, int], hidden_BSD: Tensor, rounds: int) -> dict[str, float]:
    """Sampled routing over a plain layer that visits as many different experts."""
    plain = Variant(OPTIONS[OURS], sizes, hidden_BSD, None)
    sampled = Variant(OPTIONS[SAMPLED], sizes, hidden_BSD, plain.layer.banks[BANK].experts)
    name = f"{SAMPLED}_spread"
    values = figures(measure({OURS: plain.replay(sampled), name: sampled.forward()}, rounds))
    return {key: value for key, value in values.items() if key.startswith(name)}


def calls_of(kind: str, sizes: dict[str, int], hidden_BSD: Tensor, names: list[str]) -> dict[str, Callable[[], Any]]:
    """Option -> what is timed."""
    calls: dict[str, Callable[[], Any]] = {}
    experts = None
    for name in names:
        option = OPTIONS[name]
        if kind == "forward" and not option.in_eval:
            continue
        variant = Variant(option, sizes, hidden_BSD, experts)
        experts = variant.layer.banks[BANK].experts
        if kind == "once a forward":
            calls[name] = lambda v=variant: v.prepare(is_training=True)  # type: ignore[misc]
        else:
            calls[name] = variant.forward() if kind == "forward" else variant.training()
    return calls


def main(arguments: list[str] | None = None) -> None:
    parsed = parse(
        "What each routing option costs over the plain softmax router.",
        arguments,
        ("--options", {"nargs": "+", "default": list(OPTIONS), "choices": list(OPTIONS)}),
        ("--tokens", {"type": int, "nargs": "+", "default": list(TOKENS)}),
        ("--passes", {"nargs": "+", "default": list(PASSES), "choices": PASSES}),
    )
    sizes, tokens = (QUICK, [3]) if parsed.quick else (SIZES, parsed.tokens)
    names = [OURS, *(name for name in parsed.options if name != OURS)]
    report = Report(f"routing options, {parsed.dtype}, {sizes}", parsed)
    for count in tokens:
        batch = max(1, count // SEQUENCE)
        hidden_BSD = torch.randn(batch, count // batch, sizes["hidden_size"], dtype=getattr(torch, parsed.dtype))
        for kind in parsed.passes:
            calls = calls_of(kind, sizes, hidden_BSD, names)
            ours, values = calls.pop(OURS), {}
            for name, call in calls.items():
                # Each against the plain layer alone: over a round of thirteen the machine drifts by more than 10%.
                values |= figures(measure({OURS: ours, name: call}, parsed.rounds))
            if kind == "forward" and SAMPLED in calls and count * sizes["num_experts_per_tok"] < sizes["num_experts"]:
                values |= spread_figures(sizes, hidden_BSD, parsed.rounds)
            report.add(f"T{count} {kind}", values)
    report.save()


if __name__ == "__main__":
    main()
