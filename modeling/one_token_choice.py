"""From the logits of one token to its experts, in Python numbers: what `expert_choice` computes for many tokens.

Unusual here:
- on the CPU an operation on a few numbers takes longer than reading them, and far longer once the weights of an expert
  have pushed its code out of the cache;
- scores that decide are rounded to float32, as in tensors: what ties there ties here, and goes to the lower index.

Logits are float32 numbers, one an expert. *Log-weights* are those of `expert_choice`.
"""

import math
from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from .routing_options import RowOptions

NO_OPTIONS = RowOptions()

# Of more experts than these, operations on tensors are as fast.
MOST_EXPERTS = 128


class OneTokenChoice(NamedTuple):
    """The K experts of a token, best first, their weights, and the log-probability of the draw where they were drawn.
    A slot that is not used holds the sentinel and weight 0."""

    experts: list[int]
    weights: list[float]
    log_prob: float | None = None


def choose_for_one(router: Any, logits: list[float], options: RowOptions) -> OneTokenChoice:
    """What `Router.choose` decides for one token without a limited capacity.

    Args:
        router: a [`Router`].
    """
    bank, num_experts, top_k = router.bank, len(logits), router.top_k
    if router.is_plain and router.norm_topk_prob and options is NO_OPTIONS:
        experts = best(logits, range(num_experts), top_k)
        return OneTokenChoice(experts, softmax([logits[expert] for expert in experts]))
    weigh = _LogWeights(router, logits)
    candidates: Sequence[int] = range(num_experts)
    ranks = logits
    if router.limits_groups or router.e_score_correction_bias is not None:
        ranks = _ranks(router, logits)
        if router.limits_groups:
            candidates = best_groups(ranks, bank.num_groups, bank.topk_groups)
    if options.is_sampled:
        drawn = torch.empty(1, num_experts, dtype=torch.float32).exponential_().tolist()[0]
        log_weights = weigh(candidates)
        ranks = [-math.inf] * num_experts
        for expert, value in zip(candidates, log_weights, strict=True):
            ranks[expert] = value - (math.log(drawn[expert]) if drawn[expert] > 0 else -math.inf)
    experts = best(ranks, candidates, top_k)
    count = top_k
    if bank.adaptive_experts or options.budget_R is not None:
        count = _used(router, weigh, options)
        experts = experts[:count]
    chosen = weigh(experts)
    weights = softmax(chosen) if router.norm_topk_prob else [math.exp(value) for value in chosen]
    if bank.routed_scaling_factor != 1.0:
        weights = [weight * bank.routed_scaling_factor for weight in weights]
    log_prob = None
    if options.is_sampled:
        left = [value for expert, value in zip(candidates, log_weights, strict=True) if expert not in experts]
        log_prob = draw_log_probability(chosen, left)
    if count < top_k:
        experts = experts + [num_experts] * (top_k - count)
        weights = weights + [0.0] * (top_k - count)
    return OneTokenChoice(experts, weights, log_prob)


class _LogWeights:
    """The log-weights of some experts of a token; only a softmax over all of them looks at the others."""

    def __init__(self, router: Any, logits: list[float]):
        self.logits, self.is_sigmoid = logits, router.weighs_by_sigmoid
        self.shift = 0.0 if router.norm_topk_prob or self.is_sigmoid else log_sum_exp(logits)

    def __call__(self, experts: Sequence[int]) -> list[float]:
        if self.is_sigmoid:
            return [log_sigmoid(self.logits[expert]) for expert in experts]
        return [self.logits[expert] - self.shift for expert in experts]


def _ranks(router: Any, logits: list[float]) -> list[float]:
    """What ranks the experts where it is not the logits: their probabilities, and the correction bias."""
    scores = rounded([sigmoid(logit) for logit in logits] if router.weighs_by_sigmoid else softmax(logits))
    if router.e_score_correction_bias is None:
        return scores
    bias = router.e_score_correction_bias.tolist()
    return rounded([score + added for score, added in zip(scores, bias, strict=True)])


def _used(router: Any, weigh: _LogWeights, options: RowOptions) -> int:
    """How many of its K slots the token uses."""
    top_k, limit = router.top_k, math.inf
    if router.bank.adaptive_experts:
        given = math.nan if options.complexity_R is None else options.complexity_R.item()
        share = entropy_share(weigh(range(len(weigh.logits)))) if math.isnan(given) else given
        limit = rounded([share * top_k])[0]
    if options.budget_R is not None:
        limit = min(limit, options.budget_R.item())
    return sum(slot < max(1, limit) for slot in range(top_k))


def rounded(values: Sequence[float]) -> list[float]:
    """The nearest float32 numbers."""
    return array("f", values).tolist()


def softmax(values: Sequence[float]) -> list[float]:
    largest = max(values)
    powers = [math.exp(value - largest) for value in values]
    total = sum(powers)
    return [power / total for power in powers]


def log_sum_exp(values: Sequence[float]) -> float:
    if not values:
        return -math.inf
    largest = max(values)
    return largest + math.log(sum(math.exp(value - largest) for value in values))


def log_add_exp(first: float, second: float) -> float:
    """Of two numbers that are not both infinite."""
    low, high = (first, second) if first < second else (second, first)
    return high + math.log1p(math.exp(low - high))


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value)) if value > -700 else 0.0


def log_sigmoid(value: float) -> float:
    return min(value, 0.0) - math.log1p(math.exp(-abs(value)))


def best(scores: Sequence[float], candidates: Sequence[int], count: int) -> list[int]:
    """The best candidates, best first; of equals the first (`best_experts`): reversing keeps the order of a sort."""
    return sorted(candidates, key=scores.__getitem__, reverse=True)[:count]


def best_groups(scores: Sequence[float], num_groups: int, topk_groups: int) -> list[int]:
    """The experts, in order, of the groups whose two best scores have the largest sums (`limit_groups`)."""
    size = len(scores) // num_groups
    values = rounded([sum(sorted(scores[i : i + size])[-2:]) for i in range(0, len(scores), size)])
    groups = sorted(best(values, range(num_groups), topk_groups))
    return [expert for group in groups for expert in range(group * size, group * size + size)]


def entropy_share(log_weights: Sequence[float]) -> float:
    """The entropy over log E (`normalised_entropy`)."""
    largest = max(log_weights)
    differences = [value - largest for value in log_weights]
    powers = [math.exp(value) for value in differences]
    total = sum(powers)
    # A power of zero has a difference that may be infinite, and takes no part.
    mean = sum(power * value for power, value in zip(powers, differences, strict=True) if power) / total
    return (math.log(total) - mean) / math.log(max(2, len(log_weights)))


def draw_log_probability(chosen: Sequence[float], left: Sequence[float]) -> float:
    """Log-probability of drawing experts of the log-weights `chosen` in this order, `left` being never drawn."""
    total, result = log_sum_exp(left), 0.0
    for value in reversed(chosen):
        total = log_add_exp(value, total)
        result += value - total
    return result
