"""Outputs of the models, with every loss term on its own."""

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, NamedTuple

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import ModelOutput

# What the installed transformers calls keys and values of the tokens so far: from 5.24 on, `cache`.
CACHE = "cache" if "cache" in inspect.signature(BaseModelOutputWithPast).parameters else "past_key_values"


def takes_cache(forward: Callable[..., Any]) -> Callable[..., Any]:
    """For a method with an argument `past_key_values`, its name inside: it takes it under the name [`CACHE`], too."""
    if CACHE == "past_key_values":
        return forward

    @wraps(forward)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("past_key_values") is None:
            kwargs["past_key_values"] = kwargs.pop(CACHE, None)
        elif kwargs.pop(CACHE, None) is not None:
            raise ValueError(f"`{CACHE}` and `past_key_values` are both given, and one would be ignored")
        else:
            warnings.warn(f"`past_key_values` is deprecated. Use `{CACHE}` instead.", FutureWarning, stacklevel=2)
        return forward(*args, **kwargs)

    # `generate` refuses arguments that it does not find in the signature.
    signature = inspect.signature(forward)
    named = [p.replace(name=CACHE) if n == "past_key_values" else p for n, p in signature.parameters.items()]
    wrapper.__signature__ = signature.replace(parameters=named)  # type: ignore[attr-defined]
    return wrapper


class RouterChoice(NamedTuple):
    """What a router decided for its rows; the fields are those of [`BankRouting`]."""

    router_logits: Tensor
    routing_weights: Tensor
    selected_experts: Tensor
    log_probs: Tensor | None = None
    num_rerouted: Tensor | None = None
    num_dropped: Tensor | None = None
    wanted_experts: Tensor | None = None


class BankRouting(NamedTuple):
    """What one bank of one layer decided, for its rows.

    Args:
        router_logits: `(T, E)` float32.
        routing_weights: `(T, K)` float32, before the weight of the bank itself; zero in unused slots.
        selected_experts: `(T, K)` int64, best first; E in slots that a token does not use (sentinels).
        token_mask: `(T,)` bool, the rows that count in losses and statistics; None when all do.
        bank_weights: `(T,)` float32, the weight of the bank for each row.
        rows: `(T,)` int64, which tokens of the flattened batch the rows are; None when they are all of them.
        log_probs: `(T,)` float32, log-probability of the ordered draw, where experts were sampled.
        num_rerouted: how many choices another expert took over, where capacity was limited; an int64 scalar.
        num_dropped: how many choices were lost for want of room; an int64 scalar.
        wanted_experts: `(T,)` float32, how many experts a learned complexity asks for, the last in part.
        widths: which of the `expert_width_shares` each row used, by index: `(T,)`, one number for all, or None for the
            whole.
        sums: what losses take from the rows, see `bank_sums`; while they are computed.
    """

    router_logits: Tensor
    routing_weights: Tensor
    selected_experts: Tensor
    token_mask: Tensor | None
    bank_weights: Tensor | None = None
    rows: Tensor | None = None
    log_probs: Tensor | None = None
    num_rerouted: Tensor | None = None
    num_dropped: Tensor | None = None
    wanted_experts: Tensor | None = None
    widths: Tensor | int | None = None
    sums: Tensor | None = None


RoutingOfLayer = dict[str, BankRouting]


class Computation(NamedTuple):
    """What was spent on each sample, int64 `(B,)` each.

    Args:
        layers: layers that the sample ran through.
        experts: visits of its tokens to routed experts, over all layers; shared experts are not among them.
        flops: floating-point operations of the matrix products in the layers, on real tokens.
    """

    layers: Tensor
    experts: Tensor
    flops: Tensor


@dataclass
class ChorusModelOutput(BaseModelOutputWithPast):
    """Output of the decoder and of the whole model without a head.

    Args:
        last_hidden_state: `(B, S, D)`.
        past_key_values: keys and values of the tokens so far; the field is `cache` from transformers 5.24 on.
        hidden_states: input of the first layer and output of every layer, on request.
        attentions: attention map of every layer, on request, with `attn_implementation="eager"`.
        routing: for each sparse layer, bank name -> [`BankRouting`], with `output_router_logits=True`.
        cross_modal_states: rotated queries and keys of each cross-modal layer, on request.
        skip_logits: `(B, S)` of each of the `skip_layers`, on request; a token skips where it is not above 0.
        image_hidden_states: image tokens after the connector, `(images, tokens, D)`.
        audio_hidden_states: audio tokens after the connector, one `(tokens, D)` a window, concatenated.
        compute: what the decoder spent on each sample, with `output_compute=True`.
    """

    routing: tuple[dict[str, BankRouting], ...] | None = None
    cross_modal_states: tuple[tuple[Tensor, Tensor], ...] | None = None
    skip_logits: tuple[Tensor, ...] | None = None
    image_hidden_states: Tensor | None = None
    audio_hidden_states: Tensor | None = None
    compute: Computation | None = None


@dataclass
class ChorusLossOutput(CausalLMOutputWithPast):
    """What every head returns.

    Args:
        loss: the head's own loss plus, while training, the weighted terms below.
        logits: scores of the head.
        routing: of every layer, with `output_router_logits=True`, with sampled experts, and while training a bank that
            is balanced by its bias, whose choices are to be counted.
        aux_loss: each bank's own balance loss averaged over the banks and layers that have one, not weighted.
        z_loss: router z-loss, not weighted.
        alignment_loss: alignment of the two directions of cross-modal attention, not weighted.
        skip_loss: squared distance of the share of open skip gates from `1 - skip_budget`, not weighted.
        expert_budget_loss: squared distance of the share of used slots from that of `mean_experts`, not weighted.
        exit_loss: mean of the losses at the `exit_layers`, counted as the head's own, not weighted.
        exit_logits: logits of every exit, shallow first, of a classifier, with `output_exit_logits=True`.
        left_after: `(B,)` int64, after how many layers each sample left, where samples may leave.
        compute: what the decoder spent on each sample, with `output_compute=True`.
    """

    routing: tuple[dict[str, BankRouting], ...] | None = None
    aux_loss: Tensor | None = None
    z_loss: Tensor | None = None
    alignment_loss: Tensor | None = None
    skip_loss: Tensor | None = None
    expert_budget_loss: Tensor | None = None
    exit_loss: Tensor | None = None
    exit_logits: tuple[Tensor, ...] | None = None
    left_after: Tensor | None = None
    image_hidden_states: Tensor | None = None
    audio_hidden_states: Tensor | None = None
    compute: Computation | None = None


@dataclass
class ChorusContrastiveOutput(ModelOutput):
    """What [`ChorusForContrastive`] returns.

    Args:
        loss: the contrastive loss averaged over the pairs of modalities; in training plus those of the routers.
        text_embeds, image_embeds, audio_embeds: unit vectors `(B, projection_dim)`, or None without that modality.
        logits_per_pair: `"text-image"` -> `(B, B)` scaled similarities, and so on; in training of all ranks' rows.
        routing: as in [`ChorusLossOutput`], the layers of one modality's run after those of another's.
    """

    loss: Tensor | None = None
    text_embeds: Tensor | None = None
    image_embeds: Tensor | None = None
    audio_embeds: Tensor | None = None
    logits_per_pair: dict[str, Tensor] | None = None
    routing: tuple[dict[str, BankRouting], ...] | None = None
