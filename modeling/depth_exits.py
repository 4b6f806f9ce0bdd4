"""Exits after some layers: a classifier answers easy samples early, and in `generate` tokens leave early.

A classifier has a head after each of the `exit_layers`, all trained together, and a sample leaves at the first one that
is sure enough (BranchyNet, arXiv 1709.01686; DeeBERT, arXiv 2004.12993). Drafts of the first layers are a fast path.

Shape suffixes: B batch, R samples still there, S sequence, D hidden size, L labels.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from .configuration_chorus import ChorusConfig
from .configuration_text import ChorusTextConfig
from .layers import RMSNorm


def pool_tokens(hidden_BSD: Tensor, attention_mask: Tensor | None, is_causal: bool) -> Tensor:
    """One vector a sample `(B, D)`: the last real token of a causal model, the mean of a bidirectional one."""
    if attention_mask is None:
        attention_mask = hidden_BSD.new_ones(hidden_BSD.shape[:2])
    mask_BS = attention_mask.to(hidden_BSD.device).bool()
    if is_causal:
        # The last real token, whichever side the padding is on.
        positions = torch.arange(mask_BS.shape[1], device=mask_BS.device)
        last_B = (positions * mask_BS).argmax(dim=-1)
        return hidden_BSD[torch.arange(len(hidden_BSD), device=hidden_BSD.device), last_B]
    weights = mask_BS.to(hidden_BSD.dtype)
    return (hidden_BSD * weights[..., None]).sum(dim=1) / weights.sum(dim=1, keepdim=True).clamp(min=1)


def confidence(logits: Tensor) -> Tensor:
    """The largest softmax probability of each row, float32."""
    # As in arXiv 1610.02136. Unlike an entropy it needs no second number to be explained: at 0 all leave, at 1 none.
    return logits.float().softmax(dim=-1).amax(dim=-1)


@dataclass(frozen=True)
class SequenceInputs:
    """What the layers are told about the tokens of a batch; `at` leaves samples out.

    Args:
        modality_BS: `mm_token_type_ids`.
        attention_mask, complexity_scores: `(B, S)`.
        position_ids: `(B, S)`, or `(1, S)` for all samples.
        positions_of_caller: the same as the caller gave them, by which packed sequences are known.
    """

    modality_BS: Tensor
    attention_mask: Any
    position_ids: Tensor
    positions_of_caller: Tensor | None
    complexity_scores: Tensor | None

    @classmethod
    def read(
        cls,
        embeds_BSD: Tensor,
        attention_mask: Tensor | dict[str, Any] | None,
        position_ids: Tensor | None,
        cache: Cache | None,
        modality_BS: Tensor | None,
        complexity_scores: Tensor | None,
    ) -> "SequenceInputs":
        """What the caller left out is filled in: every token is text, and positions go on where the cache ends."""
        length, device = embeds_BSD.shape[1], embeds_BSD.device
        if modality_BS is None:
            modality_BS = torch.zeros(embeds_BSD.shape[:2], dtype=torch.long, device=device)
        positions = position_ids
        if positions is None:
            seen = cache.get_seq_length() if cache is not None else 0
            positions = (torch.arange(length, device=device) + seen).unsqueeze(0)
        return cls(modality_BS, attention_mask, positions, position_ids, complexity_scores)

    def at(self, rows: Tensor) -> "SequenceInputs":
        """The inputs of some samples of the batch, given by their rows."""
        batch = len(self.modality_BS)

        def take(value: Any) -> Any:
            # Positions `(1, S)` are those of every sample.
            return value if value is None or len(value) != batch else value.index_select(0, rows.to(value.device))

        return SequenceInputs(*(take(getattr(self, field.name)) for field in fields(self)))


class ExitHead(nn.Module):
    """A classifier on the states of a layer in the middle, which have a norm of their own."""

    def __init__(self, hidden_size: int, num_labels: int, eps: float):
        super().__init__()
        self.norm = RMSNorm(hidden_size, eps)
        self.score = nn.Linear(hidden_size, num_labels, bias=False)

    def forward(self, pooled_RD: Tensor) -> Tensor:
        return self.score(self.norm(pooled_RD))


class Exits(nn.ModuleList):
    """The heads of the exits, shallow first; empty in a model without."""

    def __init__(self, text: ChorusTextConfig, num_labels: int):
        self.layers: list[int] = sorted(text.exit_layers or [])
        super().__init__(ExitHead(text.hidden_size, num_labels, text.rms_norm_eps) for _ in self.layers)


class ExitRun:
    """One forward past the exits.

    Args:
        thresholds: one an exit, shallow first; above it a sample leaves. None: all stay, and each exit answers all.
        attention_mask: `(B, S)`, as the head was given it.
        batch: samples before any has left.

    After the forward `logits` holds, by layer, those of the samples that were still there, `left_after (B,)` after how
    many layers each left, and `stayed (R,)` the rows of those that ran through all layers.
    """

    def __init__(
        self,
        exits: Exits,
        thresholds: Sequence[float] | None,
        attention_mask: Tensor | None,
        batch: int,
        text: ChorusTextConfig,
    ):
        self.heads: dict[int, ExitHead] = dict(zip(exits.layers, exits, strict=True))  # type: ignore[arg-type]
        self.thresholds = None if thresholds is None else dict(zip(exits.layers, thresholds, strict=True))
        self.attention_mask, self.text = attention_mask, text
        self.logits: dict[int, Tensor] = {}
        # On the CPU, which must know how many samples go on before the next layer can start.
        self.left_after = torch.full((batch,), text.num_hidden_layers)
        self.stayed = torch.arange(batch)
        self.answers: list[tuple[Tensor, Tensor]] = []

    def passes(self, layers: int, hidden_BSD: Tensor) -> Tensor | None:
        """Answer after this many layers.

        Args:
            hidden_BSD: states of the samples still there, with the global tokens in front.

        Returns:
            Which of these samples go on, as indices; None for all of them.
        """
        if layers not in self.heads:
            return None
        logits_RL = self.heads[layers](self.pooled(hidden_BSD[:, self.text.num_tokens_in_front :]))
        self.logits[layers] = logits_RL
        if self.thresholds is None:
            return None
        # Those who leave are cut from the batch by the decoder: left in, a batch takes as long as its hardest sample.
        leaves_R = confidence(logits_RL) > self.thresholds[layers]
        leaving = leaves_R.nonzero().squeeze(1)
        if len(leaving) == 0:
            return None
        rows = self.stayed[leaving.cpu()]
        self.left_after[rows] = layers
        self.answers.append((rows, logits_RL[leaving]))
        staying = (~leaves_R).nonzero().squeeze(1)
        self.stayed = self.stayed[staying.cpu()]
        return staying

    def gather(self, last_RL: Tensor) -> Tensor:
        """Logits `(B, L)`: each sample's from where it left; `last_RL` are those of the samples that stayed."""
        # Each sample gets its exit's logits bit for bit; nothing is averaged over exits.
        rows, logits = zip(*self.answers, (self.stayed, last_RL), strict=True)
        order = torch.cat(rows).argsort().to(last_RL.device)
        return torch.cat([part.to(last_RL.device) for part in logits]).index_select(0, order)

    def pooled(self, hidden_RSD: Tensor) -> Tensor:
        """What a head reads of the samples that are still there, given their states."""
        mask = self.attention_mask
        if mask is not None and len(mask) != len(hidden_RSD):
            mask = mask[self.stayed.to(mask.device)]
        return pool_tokens(hidden_RSD, mask, self.text.is_causal)


def check_early_exit(config: ChorusConfig, attention_mask: Tensor | None, asked: dict[str, Any]) -> None:
    """Refuse what makes no sense while samples leave the batch.

    Args:
        config: of the head.
        asked: name -> value of what the forward was asked for.

    Raises:
        ValueError: naming the request and the reason.
    """
    text = config.text_config
    if config.problem_type in ("regression", "multi_label_classification") or config.num_labels == 1:
        raise ValueError(
            f"exit_thresholds compare the probability of one class of many; num_labels={config.num_labels} with "
            f"problem_type={config.problem_type!r} has none"
        )
    for name in ("output_hidden_states", "output_attentions", "output_router_logits"):
        if asked.get(name) or (asked.get(name) is None and getattr(text, name, False)):
            raise ValueError(
                f"{name}=True while samples leave at exits: each layer has another number of samples. Leave it out, or "
                "set config.exit_thresholds = None"
            )
    for name in ("use_cache", "past_key_values", "cache", "sample_experts"):
        if asked.get(name):
            raise ValueError(f"{name} while samples leave at exits: later layers know nothing of those that left")
    if attention_mask is not None and attention_mask.ndim != 2:
        raise ValueError(f"early exit takes an attention_mask (batch, sequence), not {tuple(attention_mask.shape)}")
    if torch.compiler.is_compiling():
        raise ValueError("early exit cannot be compiled: how many samples go on depends on the data")


class TokenExits:
    """One decoding step whose tokens leave at the first of the `exit_layers` that is sure of the next token.

    A token that leaves keeps its state, from which the layers above make its keys and values at once (CALM, arXiv
    2207.07061): later tokens see it in every layer. In a batch it waits for the others, so that no answer depends on
    them; when all have left, the layers above fill the cache and compute nothing else. That is the time saved.

    Args:
        text: the decoder's configuration.
        answer: from states `(B, D)` to the logits of the next token.
        threshold: a token leaves where its confidence is above.
        batch: samples.

    After the forward `left_after (B,)` says after how many layers each token left.
    """

    def __init__(self, text: ChorusTextConfig, answer: Callable[[Tensor], Tensor], threshold: float, batch: int):
        self.layers, self.answer, self.threshold = frozenset(text.exit_layers or ()), answer, threshold
        self.left_after = torch.full((batch,), text.num_hidden_layers)
        self.left_B: Tensor | None = None
        self.all_left = False

    def after(self, layers: int, before_B1D: Tensor, hidden_B1D: Tensor) -> Tensor:
        """The states after this many layers, those that had left as they were before the last one."""
        if self.left_B is not None and not self.all_left:
            hidden_B1D = torch.where(self.left_B[:, None, None], before_B1D, hidden_B1D)
        if layers in self.layers and not self.all_left:
            sure_B = confidence(self.answer(hidden_B1D[:, -1])) > self.threshold
            leaving_B = sure_B if self.left_B is None else sure_B & ~self.left_B
            self.left_after[leaving_B.cpu()] = layers
            self.left_B = leaving_B if self.left_B is None else self.left_B | leaving_B
            self.all_left = bool(self.left_B.all())
        return hidden_B1D


def check_token_exits(text: ChorusTextConfig, threshold: float, is_training: bool, asked: Mapping[str, Any]) -> None:
    """Refuse an `exit_confidence` that cannot be kept.

    Raises:
        ValueError: training, a threshold outside 0..1, a model without exits, or outputs of layers that are left out.
    """
    if is_training:
        raise ValueError(f"exit_confidence={threshold} is for decoding: in training all tokens run through all layers")
    if not 0 <= threshold <= 1:
        raise ValueError(f"exit_confidence={threshold} is outside 0..1")
    if not text.exit_layers:
        raise ValueError(f"exit_confidence={threshold} changes nothing: the model has no exit_layers")
    for name in ("output_hidden_states", "output_attentions", "output_router_logits", "output_compute"):
        if asked.get(name) or (asked.get(name) is None and getattr(text, name, False)):
            raise ValueError(f"{name}=True while tokens leave at exits: the layers above have nothing to tell of them")
