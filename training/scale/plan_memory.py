"""Memory of a training step, found by running the model's own layers on tensors without memory.

Unusual here:
- one layer of each kind runs, forward and backward, on fake tensors, and what is allocated is watched. So adapters,
  frozen parts and activation checkpointing are what autograd makes of them, and no formula can disagree with the code;
- experts alone are counted in their place (`_CountedExperts`): what they allocate depends on the data;
- a step is then a walk over the pieces: what is kept piles up in the forward and is given back in the backward.

Shape suffixes: T tokens, K experts per token, E experts, D hidden size, I expert width, P choices (T * K).
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedConfig
from transformers.integrations.moe import ExpertsInterface

from chorus_moe.modeling.attention import rotary_tables
from chorus_moe.modeling.configuration_chorus import ChorusConfig
from chorus_moe.modeling.configuration_modalities import ENCODED
from chorus_moe.modeling.moe_banks import ChorusExperts, MixtureOfBanks
from chorus_moe.modeling.moe_plan import ForwardPlan
from chorus_moe.modeling.moe_routers import Router
from chorus_moe.training.scale.layout import Layout
from chorus_moe.training.scale.plan_model import PlannedModel

COUNTED_EXPERTS = "counted"


@dataclass(frozen=True)
class Piece:
    """Bytes that one piece of a model takes on one device.

    Args:
        kept: alive after its forward, its output included.
        forward: most that is alive at a moment of its forward.
        backward: most that is alive at a moment of its backward, from what it has kept on, with the gradients of its
            own parameters; 0 where nothing of it is trained and no gradient passes.
        kept_checkpointed: as `kept`, where the backward computes the piece a second time.
    """

    kept: int
    forward: int
    backward: int
    kept_checkpointed: int


class Watch(TorchDispatchMode):
    """Counts the bytes of all storages made while it is active: alive now, and the most at any moment."""

    def __init__(self, reads_narrow: bool) -> None:
        super().__init__()
        self.now = self.peak = 0
        # On a GPU routers read states of 16 bits as they are, see `float32_product`; elsewhere they widen them.
        self.reads_narrow, self.in_router = reads_narrow, 0
        self.alive: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            # A look at the data, as in "is anything masked?": nothing is.
            return 0
        output = func(*args, **(kwargs or {}))
        if self.in_router and self.reads_narrow and func is torch.ops.aten._to_copy.default:
            return output
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        return output

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.alive:
            self.alive[key] = weakref.ref(storage, lambda _: self._forget(key, size))
            self.now += size
            self.peak = max(self.peak, self.now)

    def _forget(self, key: int, size: int) -> None:
        del self.alive[key]
        self.now -= size

    @contextmanager
    def routers_of(self, model: nn.Module) -> Iterator[None]:
        """Within it, the watch knows when a router runs."""

        def enter(*_: Any) -> None:
            self.in_router += 1

        def leave(*_: Any) -> None:
            self.in_router -= 1

        routers = [module for module in model.modules() if isinstance(module, Router)]
        handles = [module.register_forward_pre_hook(enter) for module in routers]
        handles += [module.register_forward_hook(leave) for module in routers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class _CountedExperts(torch.autograd.Function):
    """What `gpu_mm` and `cpu_mm` allocate: inputs and pre-activations are kept, activations computed again."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor, parts: int) -> Tensor:
        choices, width = weight.numel(), hidden.shape[1]
        kept = hidden.new_empty(choices, gate_up.shape[1])
        at_once = -(-choices // parts)
        rows = hidden.new_empty(at_once, width)
        del rows
        active = hidden.new_empty(at_once, down.shape[2])
        output = hidden.new_empty(choices, width)
        ctx.save_for_backward(hidden, weight, gate_up, down, kept)
        ctx.parts = parts
        combined = torch.empty_like(hidden)
        del active, output
        return combined

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        hidden, weight, gate_up, down, kept = ctx.saved_tensors
        need_hidden, need_weight, need_gate_up, need_down = ctx.needs_input_grad[:4]
        at_once = -(-weight.numel() // ctx.parts)
        grad_down = torch.empty_like(down) if need_down else None
        grad_rows, grad_active = (hidden.new_empty(at_once, width) for width in (hidden.shape[1], down.shape[2]))
        active, grad_kept = torch.empty_like(grad_active), hidden.new_empty(at_once, kept.shape[1])
        grad_weight = torch.empty_like(weight) if need_weight else None
        grad_gate_up = torch.empty_like(gate_up) if need_gate_up else None
        del grad_active, active
        grad_slots = hidden.new_empty(weight.numel(), hidden.shape[1]) if need_hidden else None
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        del grad_slots, grad_rows, grad_kept
        return grad_hidden, grad_weight, grad_gate_up, grad_down, None


def counted_experts_forward(self: ChorusExperts, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """An experts implementation that computes nothing; [`Fakes`] sets `dispatch` and `parts_at_once`."""
    experts: Any = self
    layout: Layout = experts.dispatch
    if layout.expert == 1:
        return _CountedExperts.apply(hidden, weights, self.gate_up_proj, self.down_proj, experts.parts_at_once)
    # transformers' `AllToAllEP`: the ranks of a tensor group take turns at the rows, every choice travels as a row of
    # its own, and comes back. Where choices are even, as many rows arrive as have left.
    if layout.tensor > 1:
        count = -(-len(hidden) // layout.tensor)
        hidden, weights = hidden[:count].clone(), weights[:count].clone()
    sent = hidden.repeat_interleave(weights.shape[1], dim=0)
    arrived = sent.clone()
    unit = torch.ones(len(arrived), 1, dtype=arrived.dtype)
    output = _CountedExperts.apply(arrived, unit, self.gate_up_proj, self.down_proj, experts.parts_at_once)
    back = output.clone()
    combined = (back.clone().view(*weights.shape, -1) * weights.unsqueeze(-1)).sum(dim=1)
    return combined.repeat(layout.tensor, 1) if layout.tensor > 1 else combined


ExpertsInterface.register(COUNTED_EXPERTS, counted_experts_forward)


@dataclass(frozen=True)
class Fakes:
    """Tensors without memory, within a `FakeTensorMode`, in the place of those of the meta device.

    Args:
        dtype: what is computed in.
        on_gpu: whether a GPU works on all choices of experts at once, or the CPU on those of one expert.
    """

    planned: PlannedModel
    layout: Layout
    dtype: torch.dtype
    on_gpu: bool

    @contextmanager
    def within(self, modules: Iterable[nn.Module]) -> Iterator[None]:
        """Modules whose own tensors are of the shapes that one device computes with."""
        shares, before = self.planned.shares(self.layout), []
        fakes: dict[int, nn.Parameter] = {}
        try:
            for module in modules:
                before.append((module, dict(module._parameters), dict(module._buffers)))
                for name, parameter in before[-1][1].items():
                    if parameter is not None and id(parameter) not in fakes:
                        shape = shares.whole(self.planned.names[id(parameter)], tuple(parameter.shape))
                        tensor = torch.empty(shape, dtype=self.dtype)
                        fakes[id(parameter)] = nn.Parameter(tensor, parameter.requires_grad)
                    module._parameters[name] = fakes.get(id(parameter))
                for name, buffer in before[-1][2].items():
                    if buffer is not None:
                        module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
                if isinstance(module, ChorusExperts):
                    experts: Any = module
                    experts.dispatch, experts.parts_at_once = self.layout, 1 if self.on_gpu else experts.num_experts
            yield
        finally:
            for module, parameters, buffers in before:
                module._parameters.update(parameters)
                module._buffers.update(buffers)


@dataclass(frozen=True)
class Rows:
    """What one device is given at a time.

    Args:
        sequences: of a micro-batch.
        length: tokens of a sequence on this device.
        mix: modality -> share of its tokens.
    """

    sequences: int
    length: int
    mix: Mapping[str, float]

    @property
    def tokens(self) -> int:
        return self.sequences * self.length

    def cut(self, parts: int) -> "Rows":
        """Of the longest of so many slices of each sequence."""
        return Rows(self.sequences, -(-self.length // parts), self.mix)

    def of(self, modality: str) -> int:
        """Tokens of a modality; text is what the others leave."""
        counts = {name: round(self.tokens * share) for name, share in self.mix.items() if name != "text"}
        return self.tokens - sum(counts.values()) if modality == "text" else counts.get(modality, 0)


@dataclass(frozen=True)
class Pieces:
    """The pieces of a step in the order of its forward: encoders, embeddings, the layers of the decoder, the head with
    its loss."""

    encoders: tuple[Piece, ...]
    embeddings: Piece
    layers: tuple[Piece, ...]
    head: Piece

    def peak(self, gradients: Sequence[int], checkpointing: bool) -> int:
        """Most bytes of activations, working memory and new gradients at any moment of forward and backward.

        Args:
            gradients: bytes that stay on the device after the backward of each piece, in the order of the forward.
        """
        pieces = [*self.encoders, self.embeddings, *self.layers, self.head]
        again = [checkpointing and piece not in (self.embeddings, self.head) for piece in pieces]
        kept = [p.kept_checkpointed if twice else p.kept for p, twice in zip(pieces, again, strict=True)]
        most = below = done = 0
        for piece, size in zip(pieces, kept, strict=True):
            most, below = max(most, below + piece.forward), below + size
        for piece, size, twice, left in reversed(list(zip(pieces, kept, again, gradients, strict=True))):
            below -= size
            # What came in is kept beside what is computed a second time.
            most = max(most, below + (size if twice else 0) + piece.backward + done)
            done += left
        return max(most, done)


def measure_pieces(
    planned: PlannedModel,
    layout: Layout,
    rows: Rows,
    dtype: torch.dtype,
    on_gpu: bool,
    encoders: tuple[Piece, ...] | None = None,
) -> Pieces:
    """Run one piece of each kind.

    Args:
        dtype: what is computed in.
        on_gpu: whether the kernels of a GPU are counted, or those of the CPU.
        encoders: as measured for another layout; no layout splits them.
    """
    head, model = planned.head_model, planned.model
    decoder = head.model.language_model
    decoder.set_experts_implementation(COUNTED_EXPERTS)
    model.train()
    watch, fakes = Watch(reads_narrow=on_gpu and dtype != torch.float32), Fakes(planned, layout, dtype, on_gpu)
    in_layers = {id(module) for layer in decoder.layers for module in layer.modules()}
    others = [module for module in model.modules() if id(module) not in in_layers]
    # Within the watch: a weight that it had not seen would count where a layer first transposes it.
    with FakeTensorMode(), watch, fakes.within(others), watch.routers_of(decoder):
        if encoders is None:
            encoders = tuple(_encoder_pieces(head, planned.config, rows, dtype, watch))
        embeddings = _embedding_piece(decoder, rows, dtype, watch)
        # An exchange turns slices of all heads into whole sequences of some: attention keeps as many numbers.
        layers = tuple(_layer_pieces(planned, rows.cut(layout.context), fakes, watch))
        return Pieces(encoders, embeddings, layers, _head_piece(head, rows, dtype, watch))


def _run(step: Callable[[], Any], watch: Watch, *, is_checkpointed: bool = True) -> Piece:
    """The piece that a step is; the step returns what stays, first its output."""
    checkpointed = 0
    if is_checkpointed:
        before = watch.now
        # What the graph would keep is dropped, as checkpointing does.
        with saved_tensors_hooks(lambda tensor: None, lambda nothing: nothing):
            stays = step()
        checkpointed = watch.now - before
        del stays
    before = watch.peak = watch.now
    stays = step()
    kept, forward = watch.now - before, watch.peak - before
    output = stays[0]
    backward = 0
    if output.requires_grad:
        # The sum's gradient takes no memory; the output, which is held, stands for the gradient that comes in.
        total, watch.peak = output.sum(), watch.now
        total.backward()
        backward = watch.peak - before
        del total
    return Piece(kept, forward, backward, checkpointed)


def _layer_pieces(planned: PlannedModel, rows: Rows, fakes: Fakes, watch: Watch) -> Iterator[Piece]:
    """One for each layer; layers of one kind are run once."""
    decoder = planned.head_model.model.language_model
    text, plan = decoder.config, _plan_of(decoder.config.modalities, rows)
    positions = torch.arange(rows.length)[None]
    tables = rotary_tables(
        *decoder.rotary_emb(torch.empty(1, rows.length, 1, dtype=fakes.dtype), position_ids=positions)
    )
    needs_gradient = any(weight.is_trained for weight in planned.embeddings)
    encoded = zip(planned.config.modalities[1:], planned.encoders, strict=True)
    needs_gradient |= any(rows.of(name) and any(w.is_trained for w in unit) for name, unit in encoded)
    banks, known = iter(planned.banks), dict[Any, Piece]()
    for number, (layer, unit) in enumerate(zip(decoder.layers, planned.layers, strict=True)):
        is_sparse = text.mlp_layer_types[number] == "sparse"
        key = (text.layer_types[number], repr(next(banks)) if is_sparse else "", unit, needs_gradient)
        if key not in known:
            with fakes.within(layer.modules()):
                known[key] = _layer_piece(layer, text, rows, plan, tables, fakes.dtype, watch, needs_gradient)
        yield known[key]
        needs_gradient = needs_gradient or any(weight.is_trained for weight in unit)


def _layer_piece(
    layer: Any,
    text: Any,
    rows: Rows,
    plan: ForwardPlan,
    tables: tuple[Tensor, Tensor],
    dtype: torch.dtype,
    watch: Watch,
    needs_gradient: bool,
) -> Piece:
    states = torch.empty(rows.sequences, rows.length, text.hidden_size, dtype=dtype, requires_grad=needs_gradient)
    routing: list[Any] = []
    mixtures = [module for module in layer.modules() if isinstance(module, MixtureOfBanks)]
    # As the decoder records it for the losses of the routers.
    handles = [m.register_forward_hook(lambda _, inputs, output: routing.append(output[1])) for m in mixtures]

    def step() -> list[Any]:
        routing.clear()
        output = layer(states, plan=plan, attention_mask=None, position_embeddings=tables)
        return [output, *routing]

    try:
        return _run(step, watch)
    finally:
        routing.clear()
        for handle in handles:
            handle.remove()
        layer.zero_grad(set_to_none=True)


def _plan_of(modalities: Iterable[str], rows: Rows) -> ForwardPlan:
    """Where the tokens of each modality are; which ones does not matter."""
    counts = {name: rows.of(name) for name in modalities}
    is_text = counts["text"] == rows.tokens
    index = {name: torch.empty(count, dtype=torch.long) for name, count in counts.items()}
    known: dict[str, Any] = index | ({"text": None} if is_text else {})
    return ForwardPlan(torch.empty(rows.tokens, dtype=torch.long), None, known, dict(known), modalities=list(counts))


def _embedding_piece(decoder: Any, rows: Rows, dtype: torch.dtype, watch: Watch) -> Piece:
    """Embeddings of the words, and what encoders made in the places of their tokens."""
    ids = torch.empty(rows.sequences, rows.length, dtype=torch.long)
    encoded = [torch.empty(rows.of(m), decoder.config.hidden_size, dtype=dtype) for m in decoder.config.modalities[1:]]
    places = torch.empty(rows.sequences, rows.length, 1, dtype=torch.bool)

    def step() -> list[Any]:
        states = torch.nn.functional.embedding(ids, decoder.embed_tokens.weight)
        for tokens in encoded:
            states = states.masked_scatter(places, tokens) if len(tokens) else states
        return [states]

    piece = _run(step, watch)
    decoder.embed_tokens.weight.grad = None
    return piece


def _head_piece(head: Any, rows: Rows, dtype: torch.dtype, watch: Watch) -> Piece:
    """Final norm, logits and their loss."""
    text = head.config.text_config
    trained = any(p.requires_grad for p in head.parameters())
    states = torch.empty(rows.sequences, rows.length, text.hidden_size, dtype=dtype, requires_grad=trained)
    labels = torch.empty(rows.sequences, rows.length, dtype=torch.long)
    counted = torch.tensor(rows.tokens)

    def step() -> list[Any]:
        logits = head.lm_head(head.model.language_model.norm(states))
        if logits.shape[-1] != text.vocab_size:
            # Split by columns and gathered: every rank of a tensor group has all logits.
            logits = logits.repeat(1, 1, -(-text.vocab_size // logits.shape[-1]))[..., : text.vocab_size]
        return [head._language_loss(logits, labels, counted)]

    return _run(step, watch, is_checkpointed=False)


def _encoder_pieces(head: Any, config: ChorusConfig, rows: Rows, dtype: torch.dtype, watch: Watch) -> Iterator[Piece]:
    for row in ENCODED:
        encoder = getattr(config, row.config)
        if encoder is None:
            continue
        tower, connector = getattr(head.model, row.tower), getattr(head.model, row.connector)
        inputs = encoder_inputs(encoder, rows.of(row.name), dtype)
        is_trained = any(p.requires_grad for p in tower.parameters())

        def step(tower: Any = tower, connector: Any = connector, inputs: Any = inputs, on: bool = is_trained) -> Any:
            with torch.set_grad_enabled(on):
                encoded = tower(**inputs)
            states = encoded.last_hidden_state
            tokens = connector(states) if "pixel_values" in inputs else connector(states, encoded.attention_mask)[0]
            return [tokens]

        yield _run(step, watch)
        tower.zero_grad(set_to_none=True)


def encoder_inputs(encoder: PreTrainedConfig, tokens: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Images or clips enough for so many tokens of the decoder: one at least, as a batch without any runs one."""
    if encoder.model_type == "chorus_vision":
        images = max(1, -(-tokens // encoder.num_image_tokens))
        return {
            "pixel_values": torch.empty(
                images, encoder.num_channels, encoder.image_size, encoder.image_size, dtype=dtype
            )
        }
    frames = int(encoder.max_seconds * encoder.sampling_rate / encoder.hop_length)
    of_window = encoder.num_audio_tokens(frames)
    # Whole windows; a clip that is shorter than one is short, except where the encoder hears windows of full length.
    windows = max(1, -(-tokens // of_window))
    if windows == 1 and encoder.feature_type != "whisper":
        frames = max(1, round(frames * tokens / of_window))
    return {"input_features": torch.empty(windows, frames, encoder.num_mel_bins, dtype=dtype)}
