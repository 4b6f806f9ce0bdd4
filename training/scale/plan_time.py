"""Time of a training step in a layout: operations, bytes sent and over which link.

Unusual here:
- operations are those that `output_compute=True` counts, from the same functions;
- bytes are those that one device sends, of the collectives that transformers' plans, FSDP2 and DDP really call: a
  column-wise projection of queries, keys and values sends three gradients back, not one;
- devices are numbered as in transformers' mesh: tensor or context innermost, then fsdp and data.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

from chorus_moe.modeling.configuration_banks import ExpertBankConfig
from chorus_moe.modeling.configuration_modalities import ENCODED, MODALITY_IDS
from chorus_moe.modeling.configuration_text import ChorusTextConfig
from chorus_moe.training.depth_cost import feed_forward_flops, gated_flops, projection_flops, router_flops
from chorus_moe.training.scale.layout import Layout
from chorus_moe.training.scale.plan_layouts import Shares
from chorus_moe.training.scale.plan_memory import Rows
from chorus_moe.training.scale.plan_model import PlannedModel
from chorus_moe.training.scale.plan_rates import Rates

# Whose bytes travel while layers are computed; those of the others are waited for.
OVERLAPPED = ("weights", "gradients")


@dataclass(frozen=True)
class Bytes:
    """Bytes that a device sends in a step.

    Args:
        in_node: to devices of its node.
        between: to other nodes.
    """

    in_node: float = 0.0
    between: float = 0.0

    def __add__(self, other: "Bytes") -> "Bytes":
        return Bytes(self.in_node + other.in_node, self.between + other.between)

    def times(self, factor: float) -> "Bytes":
        return Bytes(self.in_node * factor, self.between * factor)

    def seconds(self, rates: Rates) -> float:
        """The slower of both links: a collective over nodes keeps both busy."""
        slowest = max(self.in_node / rates.in_node, self.between / rates.between_nodes)
        return slowest / rates.link_efficiency


@dataclass(frozen=True)
class Group:
    """Devices that exchange something: `size` of them, `stride` apart, on nodes of `per_node` devices."""

    size: int
    stride: int
    per_node: int

    @property
    def in_one_node(self) -> int:
        """How many of the group are in one node."""
        return min(self.size, max(1, self.per_node // self.stride))

    def gather(self, whole: float) -> Bytes:
        """All-gather, or reduce-scatter, of tensors of so many bytes when whole: a ring in each node for what each
        device has brought in from the other nodes."""
        received = whole * (self.size - 1) / self.size
        local = self.in_one_node
        between = whole * (self.size - local) / self.size / local
        return Bytes(received - between, between)

    def reduce(self, whole: float) -> Bytes:
        """All-reduce: a reduce-scatter and an all-gather."""
        return self.gather(whole).times(2)

    def exchange(self, rows: float) -> Bytes:
        """All-to-all of so many bytes on each device, with even shares for all."""
        local = self.in_one_node
        return Bytes(rows * (local - 1) / self.size, rows * (self.size - local) / self.size)


@dataclass
class Step:
    """What a step takes on one device.

    Args:
        flops: operations, as a share of the whole step's.
        sent: what for -> bytes; `weights` and `gradients` of FSDP, ZeRO and DDP, `tensor`, `context`, `experts`.
    """

    flops: float
    sent: dict[str, Bytes] = field(default_factory=dict)

    @property
    def total_sent(self) -> Bytes:
        return sum(self.sent.values(), Bytes())

    def seconds(self, rates: Rates) -> float:
        """FSDP's transfers run beside the products; the others are waited for."""
        beside = sum((size for name, size in self.sent.items() if name in OVERLAPPED), Bytes()).seconds(rates)
        waited = sum((size for name, size in self.sent.items() if name not in OVERLAPPED), Bytes()).seconds(rates)
        return max(self.flops / (rates.flops * rates.efficiency), beside) + waited


def mean_visible(text: ChorusTextConfig, kind: str, length: int) -> float:
    """Keys that a token of a full sequence sees in the mean, see `depth_cost.visible_keys`."""
    if kind != "sliding_attention":
        return (length + 1) / 2 if text.is_causal else length
    window = min(text.sliding_window or length, length)
    if text.is_causal:
        # The first tokens see fewer than the window.
        return window - window * (window - 1) / 2 / length + text.num_global_tokens
    return min(length, 2 * window + 1) - window * (window + 1) / length * (2 * window < length)


def decoder_flops(text: ChorusTextConfig, mix: Mapping[str, float], length: int) -> list[float]:
    """Operations of the forward of each layer on one token of a mix of modalities in the mean."""
    result = []
    for layer, kind in enumerate(text.layer_types):
        heads = text.num_attention_heads * text.head_dim
        flops = projection_flops(text) + 4 * heads * mean_visible(text, kind, length) + feed_forward_flops(text, layer)
        for bank in text.banks_of_layer(layer) if text.mlp_layer_types[layer] == "sparse" else ():
            visited = bank.num_experts_per_tok * gated_flops(text, bank.expert_depth * bank.intermediate_size)
            flops += open_share(bank, mix) * (visited + router_flops(text.hidden_size, bank))
        result.append(float(flops))
    return result


def open_share(bank: ExpertBankConfig, mix: Mapping[str, float]) -> float:
    """Share of the tokens that a bank is open to."""
    return 0.0 if bank.closed else sum(share for name, share in mix.items() if name in bank.modalities)


def step_flops(
    planned: PlannedModel, mix: Mapping[str, float], length: int, checkpointing: bool
) -> tuple[float, float]:
    """Operations of forward and backward on one token in the mean: of the layers, and of encoders and the head.

    A product whose weight is trained costs three times its forward, one through which gradients only pass twice, and
    one below everything that is trained once; checkpointed layers are computed once more.
    """
    config, text = planned.config, planned.config.text_config
    total, layers, passes = 0.0, 0.0, False
    encoded = [row for row in ENCODED if getattr(config, row.config) is not None]
    for row, unit in zip(encoded, planned.encoders, strict=True):
        encoder, share = getattr(config, row.config), mix.get(row.name, 0.0)
        # Each weight of an encoder works on each of its tokens; pooling leaves the decoder fewer.
        pooled = encoder.num_tokens / encoder.num_image_tokens if row.name == "image" else encoder.pool_size
        for weight in unit:
            is_tower = f"{row.tower}." in weight.name
            flops = 2 * weight.size * share * (pooled if is_tower else 1)
            total += flops * _passes(weight.is_trained, weight.is_trained, checkpointing)
            passes = passes or (weight.is_trained and share > 0)
    passes = passes or any(weight.is_trained for weight in planned.embeddings)
    for unit, flops in zip(planned.layers, decoder_flops(text, mix, length), strict=True):
        trained = sum(weight.size for weight in unit if weight.is_trained) / sum(weight.size for weight in unit)
        passes = passes or trained > 0
        layers += flops * (_passes(False, passes, checkpointing) + trained)
    heads = [weight for weight in planned.head if "lm_head" in weight.name] or planned.embeddings
    return layers, total + 2 * text.hidden_size * text.vocab_size * _passes(heads[0].is_trained, passes, False)


def _passes(trained: bool, passes: bool, again: bool) -> int:
    return 1 + again + passes + trained


def traffic(
    planned: PlannedModel,
    layout: Layout,
    rows: Rows,
    *,
    micro_steps: int,
    per_node: int,
    compute_bytes: int,
    gradient_bytes: int,
    checkpointing: bool,
) -> dict[str, Bytes]:
    """What a device sends in a step, by what for.

    Args:
        rows: of a micro-batch.
        compute_bytes, gradient_bytes: of a number that is gathered, and of one that is summed over devices.
    """
    shares, text = planned.shares(layout), planned.config.text_config
    sent = _sharding(planned, shares, micro_steps, per_node, compute_bytes, gradient_bytes)
    # Forwards: one, and one more of checkpointed layers.
    forwards, states = 1 + checkpointing, rows.tokens * text.hidden_size * compute_bytes
    if layout.tensor > 1:
        group = Group(layout.tensor, 1, per_node)
        summed, returned = _tensor_sums(planned, shares)
        layers = group.reduce(states).times(summed * forwards + returned)
        ends = group.reduce(states) + group.gather(rows.tokens * text.vocab_size * compute_bytes).times(2)
        sent["tensor"] = (layers + ends).times(micro_steps)
    if layout.context > 1:
        group = Group(layout.context, 1, per_node)
        # Queries, keys and values there, what was attended back, in each forward and in the backward.
        heads = 2 * (text.num_attention_heads + text.num_key_value_heads) * text.head_dim
        exchanged = group.exchange(rows.tokens / layout.context * heads * compute_bytes)
        layers = exchanged.times(text.num_hidden_layers * (forwards + 1))
        sent["context"] = (layers + group.gather(states)).times(micro_steps)
    if layout.expert > 1:
        group, total = Group(layout.expert, 1, per_node), Bytes()
        for bank in (bank for banks in planned.banks for bank in banks):
            visits = (
                rows.tokens / layout.context * open_share(bank, rows.mix) * bank.num_experts_per_tok * bank.expert_depth
            )
            choices = visits * text.hidden_size * compute_bytes / layout.tensor
            # There and back, in each forward and in the backward.
            total += group.exchange(choices).times(2 * (forwards + 1))
            if layout.tensor > 1:
                total += Group(layout.tensor, 1, per_node).gather(states).times(forwards + 1)
        sent["experts"] = total.times(micro_steps)
    return sent


def _sharding(
    planned: PlannedModel, shares: Shares, micro_steps: int, per_node: int, compute_bytes: int, gradient_bytes: int
) -> dict[str, Bytes]:
    """Weights gathered and gradients summed by FSDP, ZeRO or DDP."""
    layout = shares.layout
    copy_stride = layout.shards * layout.tensor
    weights, gradients = Bytes(), Bytes()
    for is_expert in (False, True):
        sizes = {True: 0, False: 0}
        for unit, count in planned.kinds.items():
            for weight in unit:
                if shares.is_dispatched(weight.name) == is_expert:
                    sizes[weight.is_trained] += count * prod(shares.whole(weight.name, weight.shape))
        whole, trained = sum(sizes.values()), sizes[True]
        shards = shares.expert_shards if is_expert else shares.shards
        if layout.zero:
            group = Group(layout.data, 1, per_node)
            # Stage 3 gathers in forward and backward of each micro-batch, the others the new weights once.
            gathers = 2 * micro_steps * whole if layout.zero == 3 else trained
            weights += group.gather(gathers * compute_bytes)
            sums = group.gather(trained * gradient_bytes)
            gradients += sums.times(micro_steps if layout.zero >= 2 else 1)
            continue
        if shards > 1:
            group = Group(shards, layout.expert if is_expert else layout.tensor, per_node)
            weights += group.gather(whole * compute_bytes).times(2 * micro_steps)
            gradients += group.gather(trained * gradient_bytes).times(micro_steps)
        if layout.replicas > 1:
            copies = Group(layout.replicas, copy_stride, per_node)
            gradients += copies.reduce(trained * gradient_bytes / shards)
    return {"weights": weights, "gradients": gradients}


def _tensor_sums(planned: PlannedModel, shares: Shares) -> tuple[int, int]:
    """All-reduces of the size of the states in the forward of all layers, and in their backward."""
    summed = returned = 0
    for unit, count in planned.kinds.items():
        for weight in unit:
            # The projections of the modalities see each token once together; biases are part of their layer.
            module = weight.name.removesuffix(".weight").rpartition(".")[2]
            if shares.is_dispatched(weight.name) or module == "bias" or (module in MODALITY_IDS and module != "text"):
                continue
            style = shares.style(weight.name)
            summed += count * (style == "rowwise")
            returned += count * (style in ("colwise", "chorus_colwise", "packed_colwise"))
    return summed, returned
