r"""Experts from a pretrained text model (sparse upcycling, arXiv 2212.05055).

Of a **dense** parent, the feed-forward of the chosen layers is copied into every expert of every bank. The weights of a
token's experts sum to one, and so do those of the banks open to it: whatever the new routers choose, the sum is the
parent's feed-forward.

With `expert_split=G` a copy is G experts of width I / G, each a slice of it ("virtual groups", arXiv 2410.07524). A
feed-forward is the sum of its slices, so all slices of a copy must be chosen together, with equal weights, and counted
G times. Rows of the router are therefore equal within a copy: its slices have one score, and the best K experts, K
being a multiple of G, are the slices of the best K / G copies. That holds for any scores and hence for every router:

    sum over the best copies c of w_c / G * G * sum over slices s of FFN_cs(x) = sum_c w_c FFN(x) = FFN(x)

where the factor G is the bank's `routed_scaling_factor`. The slices part as soon as training moves them. (Two copies
whose scores agree to the last bits could be taken in parts; random rows practically never give that.)

Of a **mixture** parent, every bank starts as a copy of the parent's experts and router.

Shape suffixes: E experts in a bank, I expert width, D hidden size.
"""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from chorus_moe.modeling.configuration_banks import LayerBankConfig, preset_banks
from chorus_moe.modeling.configuration_text import ChorusTextConfig
from chorus_moe.modeling.moe_routers import Router
from chorus_moe.surgery.experts_resize import expert_rows
from chorus_moe.surgery.parent_text import ParentText

COPIES, COPIES_PER_TOKEN = 8, 2


@dataclass(frozen=True, kw_only=True)
class UpcyclingOptions:
    """What becomes of a parent's feed-forward.

    Args:
        experts: bank -> settings as in `config.expert_banks`, or the name of a preset. If None: a bank for each
            modality that the model takes and, of a dense parent and for more than one modality, `common`.
        sparse_layers: layers of a dense parent that become sparse. If None: every second one, from the second on,
            without the last (no later layer would read what its image and audio experts do). A mixture parent's sparse
            layers stay what they are.
        num_experts, num_experts_per_tok: where a bank does not say; 8 and 2 whole copies if None.
        expert_split: experts that one copy of a dense feed-forward is divided into.
        expert_noise: standard deviation of the noise on the copies, relative to that of the weights. Then the function
            is no longer quite the parent's. Experts of a mixture parent differ already and get none.
    """

    experts: Mapping[str, Mapping[str, Any]] | str | None = None
    sparse_layers: Sequence[int] | None = None
    num_experts: int | None = None
    num_experts_per_tok: int | None = None
    expert_split: int = 1
    expert_noise: float = 0.0

    def __post_init__(self) -> None:
        if self.expert_split < 1:
            raise ValueError(f"expert_split={self.expert_split} must be at least 1")
        if not 0 <= self.expert_noise < 1:
            raise ValueError(f"expert_noise={self.expert_noise} must be at least 0 and below 1")


def bank_settings(parent: ParentText, modalities: Sequence[str], options: UpcyclingOptions) -> dict[str, Any]:
    """Fields of [`ChorusTextConfig`] that say which layers are sparse and what banks they hold.

    Raises:
        ValueError: what would not compute what the parent computes on text, naming the bank.
    """
    layers = _sparse_layers(parent, options)
    fixed = _mixture_bank(parent, options) if parent.num_experts else _dense_bank(parent, options)
    sizes = fixed if parent.num_experts else _default_sizes(options)
    banks = {
        name: _merged(f"expert bank {name!r}", fixed, settings)
        for name, settings in _named_banks(parent, modalities, layers, options).items()
    }
    return {
        "mlp_layer_types": ["sparse" if i in layers else "dense" for i in range(parent.config.num_hidden_layers)],
        "expert_banks": banks,
        "num_experts": sizes["num_experts"],
        "num_experts_per_tok": sizes["num_experts_per_tok"],
        "moe_intermediate_size": fixed["intermediate_size"],
        # A shared expert would add to the sum, which is the parent's feed-forward already.
        "shared_expert_intermediate_size": 0,
    }


def check_exact(config: ChorusTextConfig, split: int) -> None:
    """Text must come out as the parent computes it.

    Raises:
        ValueError: a bank or a layer where it would not, with the reason and the numbers.
    """
    for layer in config.sparse_layers:
        banks = config.banks_of_layer(layer)
        # Without a bank a text token would skip the feed-forward that the parent applies.
        if not any("text" in bank.modalities for bank in banks):
            raise ValueError(f"sparse layer {layer}: no expert bank is open to text; found {[b.name for b in banks]}")
        for bank in banks:
            _check_bank(bank, split)


def expert_pieces(parent: ParentText, layer: int, bank: LayerBankConfig, which: str, split: int) -> Iterator[Tensor]:
    """The stacked parameter `which` of a bank in consecutive pieces, each parent tensor read once for it.

    Yields:
        for `gate_up_proj (E, 2I, D)` the gate and the up projection `(I, D)` of each expert in turn, for
        `down_proj (E, D, I)` one `(D, I)` an expert.
    """
    if parent.num_experts:
        # The stored order is expert by expert, so each piece is one parent tensor and no stack is ever built.
        for expert in range(bank.num_experts):
            names = parent.expert_weights(layer, expert)
            yield from map(parent.checkpoint.read, names[:2] if which == "gate_up_proj" else names[2:])
        return
    gate, up, down = parent.dense_weights(layer)
    if which == "gate_up_proj":
        slices = zip(*(parent.checkpoint.read(name).chunk(split) for name in (gate, up)), strict=True)
        copy = [piece for pair in slices for piece in pair]
    else:
        # Slices by columns are strided views. They are made contiguous once, not for every copy.
        copy = [piece.contiguous() for piece in parent.checkpoint.read(down).chunk(split, dim=1)]
    for _ in range(bank.num_experts // split):
        yield from copy


def noisy(pieces: Iterator[Tensor], noise: float, seed: int, name: str) -> Iterator[Tensor]:
    """The pieces plus normal noise of `noise` times their root mean square; the same for a seed and a tensor's name."""
    # `crc32` and not `hash`, which differs between processes.
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    for piece in pieces:
        # In half precision the noise would be rounded before it is added.
        wide = piece.float()
        scale = noise * wide.square().mean().sqrt()
        yield torch.randn(wide.shape, generator=generator).mul_(scale).add_(wide)


@torch.no_grad()
def tie_slices(router: Router, split: int) -> None:
    """Give all slices of a copy the router rows of its first one."""
    for rows_E in expert_rows(router).values():
        rows_E.copy_(rows_E[::split].repeat_interleave(split, dim=0))


def _sparse_layers(parent: ParentText, options: UpcyclingOptions) -> list[int]:
    count = parent.config.num_hidden_layers
    if parent.num_experts:
        if options.sparse_layers is not None and sorted(options.sparse_layers) != parent.sparse_layers:
            raise ValueError(
                f"{parent}: sparse_layers={list(options.sparse_layers)}, but the sparse layers of a mixture parent "
                f"stay what they are: {parent.sparse_layers}"
            )
        return parent.sparse_layers
    layers = options.sparse_layers
    if layers is None:
        # Every second layer, without the last, whose image and audio experts no later layer reads. A parent of one or
        # two layers has only its last.
        layers = list(range(1, count - 1, 2)) or [count - 1]
    for layer in layers:
        if not 0 <= layer < count:
            raise ValueError(f"{parent}: sparse_layers names layer {layer} of {count}")
    if layers and getattr(parent.config, "mlp_bias", False):
        raise ValueError(f"{parent}: its feed-forward has biases, which experts do not; pass sparse_layers=[]")
    return sorted(set(layers))


def _named_banks(
    parent: ParentText, modalities: Sequence[str], layers: list[int], options: UpcyclingOptions
) -> dict[str, Mapping[str, Any]]:
    if isinstance(options.experts, str):
        return dict(preset_banks(options.experts, layers, modalities))
    if options.experts is not None:
        return dict(options.experts)
    # A mixture parent gets no `common` unless asked: it would be one more copy of all its experts.
    names = [*modalities, "common"] if len(modalities) > 1 and not parent.num_experts else modalities
    return {name: {} for name in names}


def _default_sizes(options: UpcyclingOptions) -> dict[str, int]:
    split = options.expert_split
    return {
        "num_experts": options.num_experts or COPIES * split,
        "num_experts_per_tok": options.num_experts_per_tok or COPIES_PER_TOKEN * split,
    }


def _dense_bank(parent: ParentText, options: UpcyclingOptions) -> dict[str, Any]:
    """What the copies fix for every bank."""
    size, split = parent.expert_size, options.expert_split
    if size % split:
        raise ValueError(f"{parent}: intermediate_size={size} is not a multiple of expert_split={split}")
    return {
        "intermediate_size": size // split,
        "routed_scaling_factor": float(split),
        # Weights that sum to one make the sum of copies the parent's feed-forward, whatever the routers choose.
        "norm_topk_prob": True,
        # A token that a full expert turns away would lose its feed-forward, and text would differ from the parent's.
        "capacity_in_eval": False,
    }


def _mixture_bank(parent: ParentText, options: UpcyclingOptions) -> dict[str, Any]:
    """What the parent's experts and router fix for every bank."""
    if options.expert_split != 1 or options.expert_noise:
        raise ValueError(
            f"{parent}: expert_split={options.expert_split} and expert_noise={options.expert_noise} are for the copies "
            "of a dense parent; the experts of a mixture parent are taken as they are"
        )
    fixed = {
        "num_experts": parent.num_experts,
        "num_experts_per_tok": parent.config.num_experts_per_tok,
        "intermediate_size": parent.expert_size,
        "router": "softmax",
        "norm_topk_prob": parent.norm_topk_prob,
        "routed_scaling_factor": 1.0,
        # Our options that the parent's router does not have: any of them would change its choices.
        "topk_groups": None,
        "adaptive_experts": False,
        "capacity_in_eval": False,
    }
    given = {"num_experts": options.num_experts, "num_experts_per_tok": options.num_experts_per_tok}
    return _merged(str(parent), fixed, {key: value for key, value in given.items() if value is not None})


def _merged(where: str, fixed: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    for key in fixed.keys() & settings.keys():
        if settings[key] != fixed[key]:
            raise ValueError(
                f"{where}: {key}={settings[key]} would not compute what the parent computes; it must be {fixed[key]}"
            )
    return {**settings, **fixed}


def _check_bank(bank: LayerBankConfig, split: int) -> None:
    where = f"expert bank {bank.name!r} with expert_split={split}"
    if split == 1:
        return
    sizes = {"num_experts": bank.num_experts, "num_experts_per_tok": bank.num_experts_per_tok}
    if bank.topk_groups not in (None, bank.num_groups):
        sizes["experts in a group"] = bank.num_experts // bank.num_groups
    for name, value in sizes.items():
        if value % split:
            raise ValueError(f"{where}: {name}={value} is not a multiple of {split}, so a copy would be taken in parts")
    if bank.adaptive_experts:
        raise ValueError(f"{where}: adaptive_experts leaves slots unused, so a copy would be taken in parts")
