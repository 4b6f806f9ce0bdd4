"""Sequences that several processes share while they train, by the scheme of DeepSpeed-Ulysses (arXiv 2309.14509).

Unusual here:
- between layers each process holds a slice of every sequence, as all but attention works token by token. Around
  attention an exchange turns slices of all heads into whole sequences of some heads, and back: so windows, packed rows,
  padding, cross-modal keys and learned keys are those of the ordinary implementation, with the ordinary masks;
- embeddings, encoders and the head run whole on every process of the group, which all compute the same loss;
- gradients are averaged over processes, by whoever does it without a context. So what comes back into a slice counts as
  often as the group has processes, and what goes on from it is that of the slice alone;
- what the decoder returns is whole, also what was recorded in its layers: losses and counters know of no slices;
- without gradients (evaluation, generation) nothing is shared, as a process may then run alone.

Shape suffixes: B batch, S sequence, P processes of the group, L longest slice, H heads, G key heads, M learned keys in
front, C head size, D hidden size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from chorus_moe.modeling.attention_masks import BLOCK_LOCAL
from chorus_moe.modeling.modeling_heads import ChorusForContrastive
from chorus_moe.modeling.modeling_outputs import BankRouting
from chorus_moe.modeling.modeling_text import ChorusTextModel
from chorus_moe.surgery.parts import decoder_of
from chorus_moe.training.loading import ModelOrAdapter, base_model

# The keyword under which the layers hand on how the sequence is cut.
SLICES = "sequence_slices"
# What is gathered of a bank's routing, by kind; counts of rerouted choices are those of capacity, which is refused.
FLOATS = ("router_logits", "routing_weights", "bank_weights", "log_probs", "wanted_experts")
INTEGERS = ("selected_experts", "token_mask", "widths", "rows")


class _Exchange(torch.autograd.Function):
    """Part p of each process goes to process p; its own inverse, so its gradient is the same exchange."""

    @staticmethod
    def forward(ctx: Any, parts_P: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, received = group, torch.empty_like(parts_P, memory_format=torch.contiguous_format)
        dist.all_to_all_single(received, parts_P.contiguous(), group=group)
        return received

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _Exchange.apply(gradients[0], ctx.group), None


class _Gather(torch.autograd.Function):
    """`(P, ...)`, the tensors of all processes, of equal shapes. Each computes the same loss of them: its own part of
    the gradient, times the processes by which the average divides."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.rank, ctx.size = dist.get_rank(group), dist.get_world_size(group)
        whole = [torch.empty_like(own, memory_format=torch.contiguous_format) for _ in range(ctx.size)]
        dist.all_gather(whole, own.contiguous(), group=group)
        return torch.stack(whole)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0][ctx.rank] * ctx.size, None


@dataclass(frozen=True)
class Slices:
    """How the sequences of one forward are cut; the first slices are one token longer where they are not even."""

    group: dist.ProcessGroup
    sizes: tuple[int, ...]
    own: int

    @classmethod
    def of(cls, length: int, group: dist.ProcessGroup) -> "Slices":
        count = dist.get_world_size(group)
        sizes = tuple(length // count + (rank < length % count) for rank in range(count))
        return cls(group, sizes, dist.get_rank(group))

    @property
    def length(self) -> int:
        return sum(self.sizes)

    @property
    def place(self) -> slice:
        """Of this process in the sequence."""
        stop = list(accumulate(self.sizes))[self.own]
        return slice(stop - self.sizes[self.own], stop)

    def rows(self, batch: int, device: torch.device) -> Tensor:
        """Where the tokens of this process are in the flattened batch."""
        places = torch.arange(batch * self.length, device=device).view(batch, self.length)
        return places[:, self.place].flatten()

    def cut(self, states: Tensor, dim: int = 1) -> Tensor:
        """The slice of this process."""
        return states.narrow(dim, self.place.start, self.sizes[self.own])

    def gather(self, states: Tensor, dim: int = 1) -> Tensor:
        """The whole of what was cut; what is whole already stays."""
        if states.shape[dim] != self.sizes[self.own]:
            return states
        parts_PL = _Gather.apply(self._filled(states, dim), self.group)
        return self._joined(parts_PL, dim)

    def to_heads(self, *states_BHLC: Tensor) -> list[Tensor]:
        """From slices of all heads to whole sequences of some heads, for several tensors in one exchange."""
        count = len(self.sizes)
        parts = [self._filled(states, 2).unflatten(1, (count, -1)) for states in states_BHLC]
        exchanged = _Exchange.apply(torch.cat(parts, dim=2).transpose(0, 1), self.group)
        return list(self._joined(exchanged, 2).split([part.shape[2] for part in parts], dim=1))

    def to_slices(self, states_BSHC: Tensor) -> Tensor:
        """Back: from whole sequences of some heads to the slice of all heads."""
        parts = [self._filled(part, 1) for part in states_BSHC.split(list(self.sizes), dim=1)]
        heads_PBLHC = _Exchange.apply(torch.stack(parts), self.group)
        return heads_PBLHC.movedim(0, 2).flatten(2, 3)[:, : self.sizes[self.own]]

    def _filled(self, states: Tensor, dim: int) -> Tensor:
        """As long as the longest slice."""
        missing = max(self.sizes) - states.shape[dim]
        return F.pad(states, [0, 0] * (states.ndim - 1 - dim) + [0, missing]) if missing else states

    def _joined(self, parts_PL: Tensor, dim: int) -> Tensor:
        """Slices `(P, ...)` one after the other, without what they were filled with."""
        return torch.cat([part.narrow(dim, 0, n) for part, n in zip(parts_PL, self.sizes, strict=True)], dim=dim)


def over_all_heads(attend: Callable[..., Any]) -> Callable[..., Any]:
    """An attention function of transformers that also takes slices of the sequence; without them it is as it was."""

    def wrapper(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        slices: Slices | None = options.pop(SLICES, None)
        if slices is None:
            return attend(module, query, key, value, attention_mask, **options)
        # Learned keys stand in front on every process, which takes those of its heads.
        front = key.shape[2] - query.shape[2]
        learned = [states[:, :, :front].chunk(len(slices.sizes), dim=1)[slices.own] for states in (key, value)]
        query, *pair = slices.to_heads(query, key[:, :, front:], value[:, :, front:])
        key, value = (torch.cat((first, rest), dim=2) for first, rest in zip(learned, pair, strict=True))
        output, _ = attend(module, query, key, value, attention_mask, **options)
        return slices.to_slices(output), None

    wrapper.is_over_all_heads = True  # type: ignore[attr-defined]
    return wrapper


def register_attention(name: str) -> None:
    """Let an implementation take slices."""
    found = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
    if not hasattr(found, "is_over_all_heads"):
        ALL_ATTENTION_FUNCTIONS.register(name, over_all_heads(found))


class SharedSequences:
    """Hooks on a decoder whose sequences a group of processes shares."""

    def __init__(self, decoder: ChorusTextModel, group: dist.ProcessGroup):
        self.group, self.prepare = group, decoder._prepare
        # Of the forward that runs; None where nothing is shared.
        self.slices: Slices | None = None
        self.config = decoder.config
        decoder._prepare = self._prepare  # type: ignore[assignment,method-assign]
        decoder.layers[0].register_forward_pre_hook(self._cut, with_kwargs=True)
        decoder.norm.register_forward_pre_hook(self._gather)
        decoder.register_forward_hook(self._gather_records)

    def _prepare(self, hidden_BSD: Tensor, tokens: Any, cache: Any, *given: Any) -> dict[str, dict[str, Any]]:
        """What `_prepare` makes for the whole sequence; what is per token cut."""
        shared = self.prepare(hidden_BSD, tokens, cache, *given)
        batch, length = hidden_BSD.shape[:2]
        self.slices = None
        if not torch.is_grad_enabled() or length < dist.get_world_size(self.group):
            return shared
        if cache is not None and cache.get_seq_length():
            raise ValueError(
                f"parallel.context: {cache.get_seq_length()} cached tokens stand in front of the sequence (a prefix "
                "adapter?), which processes do not share"
            )
        # At each forward, since a model may change its implementation: one that knows no slices would take each of them
        # for a sequence.
        for name in {self.config._attn_implementation, BLOCK_LOCAL}:
            if name == "eager" or name in ALL_ATTENTION_FUNCTIONS:
                register_attention(name)
        slices = self.slices = Slices.of(length, self.group)
        # Masks and positions differ from type to type of layers, and stay whole.
        plan, tables = (next(iter(shared.values()))[name] for name in ("plan", "position_embeddings"))
        own = {
            "plan": plan.at(slices.rows(batch, hidden_BSD.device)),
            "position_embeddings": tuple(slices.cut(table, dim=2) for table in tables),
            SLICES: slices,
        }
        return {kind: inputs | own for kind, inputs in shared.items()}

    @staticmethod
    def _cut(_: nn.Module, states: tuple[Tensor, ...], options: dict[str, Any]) -> Any:
        # Not by what the last forward was: activation checkpointing runs the layer again, after others maybe.
        slices = options.get(SLICES)
        return None if slices is None else ((slices.cut(states[0]), *states[1:]), options)

    def _gather(self, _: nn.Module, states: tuple[Tensor, ...]) -> Any:
        return None if self.slices is None else (self.slices.gather(states[0]), *states[1:])

    def _gather_records(self, _: nn.Module, inputs: Any, output: Any) -> None:
        slices, self.slices = self.slices, None
        if slices is None:
            return
        if output.attentions is not None:
            raise ValueError("parallel.context: no process has the attention maps of all heads; leave them out")
        if output.hidden_states is not None:
            states = output.hidden_states
            output.hidden_states = tuple(None if one is None else slices.gather(one) for one in states)
        if output.skip_logits is not None:
            output.skip_logits = tuple(slices.gather(logits) for logits in output.skip_logits)
        if output.cross_modal_states is not None:
            pairs = output.cross_modal_states
            output.cross_modal_states = tuple((slices.gather(q, 2), slices.gather(k, 2)) for q, k in pairs)
        if output.routing is not None:
            tokens = output.last_hidden_state.shape[:2].numel()
            output.routing = gather_routing(output.routing, slices, tokens)


def gather_routing(
    layers: Sequence[dict[str, BankRouting]], slices: Slices, tokens: int
) -> tuple[dict[str, BankRouting], ...]:
    """The routing of whole sequences, the rows of each bank in order; `tokens` of the whole batch."""
    banks = [_with_mask(bank) for layer in layers for bank in layer.values()]
    own = torch.tensor([len(bank.router_logits) for bank in banks], device=banks[0].router_logits.device)
    rows_PB = _Gather.apply(own, slices.group).tolist()
    whole: list[dict[str, Tensor]] = [{} for _ in banks]
    for names in (FLOATS, INTEGERS):
        fields = [(number, name) for number, bank in enumerate(banks) for name in names if _is_tensor(bank, name)]
        tensors = [getattr(banks[number], name) for number, name in fields]
        counts_P = [[rows_B[number] for number, _ in fields] for rows_B in rows_PB]
        for (number, name), tensor in zip(fields, gather_rows(tensors, counts_P, slices.group), strict=True):
            whole[number][name] = tensor
    found = []
    for bank, fields_of_bank in zip(banks, whole, strict=True):
        order = fields_of_bank["rows"].argsort()
        ordered: dict[str, Any] = {name: tensor[order] for name, tensor in fields_of_bank.items()}
        if len(order) == tokens:
            ordered["rows"] = None
        if bool(ordered["token_mask"].all()):
            ordered["token_mask"] = None
        found.append(bank._replace(**ordered))
    rest = iter(found)
    return tuple({name: next(rest) for name in layer} for layer in layers)


def _is_tensor(bank: BankRouting, name: str) -> bool:
    return isinstance(getattr(bank, name), Tensor)


def _with_mask(bank: BankRouting) -> BankRouting:
    """Padding may lie in the slices of other processes alone."""
    if bank.token_mask is not None:
        return bank
    return bank._replace(token_mask=torch.ones_like(bank.router_logits[:, 0], dtype=torch.bool))


def gather_rows(tensors: Sequence[Tensor], counts_P: Sequence[Sequence[int]], group: dist.ProcessGroup) -> list[Tensor]:
    """The rows of all processes, those of one behind those of another, for many tensors in one exchange.

    Args:
        counts_P: of each process, how many rows of each tensor it has.
    """
    widths = [tensor.shape[1:].numel() for tensor in tensors]
    lengths_P = [[count * width for count, width in zip(counts, widths, strict=True)] for counts in counts_P]
    own = torch.cat([tensor.flatten() for tensor in tensors])
    longest = max(sum(lengths) for lengths in lengths_P)
    parts_P = _Gather.apply(F.pad(own, (0, longest - len(own))), group)
    pieces_P = [part[: sum(lengths)].split(lengths) for part, lengths in zip(parts_P, lengths_P, strict=True)]
    return [
        torch.cat(pieces).view(-1, *tensor.shape[1:]).to(tensor.dtype)
        for tensor, *pieces in zip(tensors, *pieces_P, strict=True)
    ]


def share_sequences(model: ModelOrAdapter, count: int) -> None:
    """Let each `count` neighbouring processes share their sequences. Every process must call it, once.

    Raises:
        ValueError: a head that reads the states between layers, or whose batch is that of all processes.
    """
    below = base_model(model)
    if len(getattr(below, "exits", ())):
        raise ValueError(f"parallel.context={count}: the exits of a classifier read whole sequences between layers")
    if isinstance(below, ChorusForContrastive):
        raise ValueError(f"parallel.context={count}: a contrastive loss compares the rows of all processes; use fsdp")
    group, _ = dist.new_subgroups(count)
    SharedSequences(decoder_of(model), group)
