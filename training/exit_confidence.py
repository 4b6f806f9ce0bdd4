"""`exit_confidence` of a generative model, found on prompts, with a promise about other prompts.

What is promised: of texts for prompts drawn as these were, at most `max_changed` of the tokens differ from plain
decoding, in all but `error_rate` of calibrations. As in Learn then Test (arXiv 2110.01052), by which CALM (arXiv
2207.07061) calibrates its exits, a confidence is taken when a test on the prompts rejects that it changes more.
Confidences are tested in an order that is fixed beforehand, from the strictest down to the first that fails, so that
many tests err no more often than one.

A prompt counts by the share of its text that changed, a number between 0 and 1, and the test is that of Hoeffding and
Bentkus for the mean of such numbers: it asks nothing of how tokens of one text depend on each other. Texts are really
decoded with each confidence, so what early tokens do to later ones is in what is measured.
"""

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from chorus_moe.modeling.modeling_generation import ChorusForConditionalGeneration
from chorus_moe.training.loading import device_of

# Fixed before any text is seen, as the order of the tests must be.
CONFIDENCES = (0.999, 0.995, 0.99, 0.98, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5)


@dataclass(frozen=True)
class ConfidenceCalibration:
    """What was found, on the prompts it was found on.

    Args:
        exit_confidence: None where no confidence keeps the promise.
        changed: mean share of a text's tokens that differ from plain decoding, by each confidence that was tried.
        layers: mean number of layers that a token ran through, by each confidence that was tried.
    """

    exit_confidence: float | None
    changed: dict[float, float]
    layers: dict[float, float]


def p_value(mean: float, prompts: int, limit: float) -> float:
    """Highest probability of a mean this low over so many numbers between 0 and 1, if its expectation is over `limit`.

    Args:
        limit: between 0 and 1, both excluded.
    """
    low = min(mean, limit)
    entropy = (low * math.log(low / limit) if low else 0.0) + (1 - low) * math.log((1 - low) / (1 - limit))
    hoeffding = math.exp(-prompts * entropy)
    # The binomial law is the worst but for a factor e (Bentkus 2004, Annals of Probability 32, 1650-1673).
    bentkus = math.e * _binomial_cdf(math.ceil(prompts * mean), prompts, limit)
    return min(hoeffding, bentkus, 1.0)


def _binomial_cdf(count: int, trials: int, rate: float) -> float:
    logs = (
        math.lgamma(trials + 1) - math.lgamma(k + 1) - math.lgamma(trials - k + 1)
        + k * math.log(rate) + (trials - k) * math.log1p(-rate)
        for k in range(min(count, trials) + 1)
    )  # fmt: skip
    return min(1.0, math.fsum(math.exp(value) for value in logs))


def prompts_needed(limit: float, error_rate: float) -> int:
    """The fewest prompts that can promise `limit`: the number needed when nothing changes."""
    return math.ceil(math.log(error_rate) / math.log1p(-limit))


def share_changed(plain_BS: Tensor, early_BS: Tensor, ends: Sequence[int]) -> list[float]:
    """Share of each plain text's tokens that the other lacks at their place.

    Args:
        ends: tokens after which a text is over; what follows is not counted.
    """
    length = max(plain_BS.shape[1], early_BS.shape[1])
    # Of texts that ended sooner the missing tokens are -1, which no token is.
    plain_BS, early_BS = (
        torch.nn.functional.pad(ids, (0, length - ids.shape[1]), value=-1) for ids in (plain_BS, early_BS)
    )
    shares = []
    for plain, early in zip(plain_BS.tolist(), early_BS.tolist(), strict=True):
        last = next((place for place, token in enumerate(plain) if token in ends), length - 1)
        count = last + 1
        shares.append(sum(a != b for a, b in zip(plain[:count], early[:count], strict=True)) / count)
    return shares


def calibrate_exit_confidence(
    model: ChorusForConditionalGeneration,
    batches: Iterable[Mapping[str, Any]],
    max_changed: float = 0.05,
    error_rate: float = 0.05,
    confidences: Sequence[float] = CONFIDENCES,
    **generation: Any,
) -> ConfidenceCalibration:
    """Find the lowest `exit_confidence` that keeps the promise and write it into `model.generation_config`, which
    `generate` reads; where none does, it is taken out of there.

    Args:
        model: [`ChorusForConditionalGeneration`] with trained exits.
        batches: prompts as `generate` takes them, left-padded, one row a prompt; not those it was trained on. 59 are
            the least for a twentieth, 300 are better.
        max_changed: share of the tokens that may differ from plain decoding, between 0 and 1.
        error_rate: in what share of calibrations it may be more on other prompts, at most half.
        confidences: those to try, falling.
        generation: settings of `generate`, such as `max_new_tokens`. Decoding is greedy.

    Raises:
        ValueError: a number outside its range, confidences that do not fall, a model without exits, or too few prompts.
    """
    if not 0 < max_changed < 1 or not 0 < error_rate <= 0.5:
        raise ValueError(
            f"max_changed={max_changed} must lie between 0 and 1, error_rate={error_rate} above 0 up to 0.5"
        )
    if list(confidences) != sorted(set(confidences), reverse=True) or not all(0 <= c <= 1 for c in confidences):
        raise ValueError(f"confidences={tuple(confidences)} must fall and lie in 0..1")
    if not model.config.text_config.exit_layers:
        raise ValueError("the model has no exits; add them with add_exits and train them")
    device, was_training = device_of(model), model.training
    prompts = [{n: v.to(device) if isinstance(v, Tensor) else v for n, v in batch.items()} for batch in batches]
    count = sum(len(batch["input_ids"]) for batch in prompts)
    if count < (needed := prompts_needed(max_changed, error_rate)):
        raise ValueError(
            f"{count} prompts cannot promise max_changed={max_changed}, not even if no token changes: at "
            f"error_rate={error_rate} that takes {needed}"
        )
    depths: list[float] = []
    hook = model.register_forward_hook(
        lambda _, args, output: depths.extend([] if output.left_after is None else output.left_after.tolist())
    )
    settings: Any = model.generation_config
    before = getattr(settings, "exit_confidence", None)
    settings.exit_confidence = None

    def texts(**options: Any) -> list[Tensor]:
        found = [model.generate(**batch, **generation, do_sample=False, **options) for batch in prompts]
        return [text[:, batch["input_ids"].shape[1] :] for text, batch in zip(found, prompts, strict=True)]

    changed: dict[float, float] = {}
    layers: dict[float, float] = {}
    best = None
    try:
        model.eval()
        plain = texts()
        ends = generation.get("eos_token_id", settings.eos_token_id)
        ends = [] if ends is None else torch.as_tensor(ends).flatten().tolist()
        for confidence in confidences:
            depths.clear()
            pairs = zip(plain, texts(exit_confidence=confidence), strict=True)
            shares = [share for one, other in pairs for share in share_changed(one, other, ends)]
            changed[confidence] = math.fsum(shares) / count
            layers[confidence] = math.fsum(depths) / max(1, len(depths))
            # The first failure ends the search: only a fixed sequence lets many tests err no more often than one.
            if p_value(changed[confidence], count, max_changed) > error_rate:
                break
            best = confidence
    except BaseException:
        settings.exit_confidence = before
        raise
    finally:
        hook.remove()
        model.train(was_training)
    settings.exit_confidence = best
    if best is None:
        warnings.warn(
            f"no exit_confidence changes at most {max_changed} of the tokens with the margin asked for: "
            f"{confidences[0]} changed {changed[confidences[0]]:.3f} of {count} texts. Train the exits longer, give "
            "more prompts, or allow more",
            stacklevel=2,
        )
    return ConfidenceCalibration(best, changed, layers)
