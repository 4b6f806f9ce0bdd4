"""Layouts of a number of devices: which are possible for a model, and what a device then holds of each parameter.

Unusual here:
- nothing is divided by hand: which dimension of a parameter is split is read from the plans that transformers applies;
- a dimension that does not divide is rounded up, as FSDP2 pads it: the fullest device decides what fits.
"""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from math import ceil, prod

from chorus_moe.training.scale.layout import Layout, ParallelArguments, layout_of

# Style of a plan -> the dimension of a weight that it splits; styles that are not named split nothing.
SPLIT_DIMENSION = {
    "colwise": -2,
    "chorus_colwise": -2,
    "colwise_gather_output": -2,
    "packed_colwise": -2,
    "rowwise": -1,
    "embedding_rowwise": 0,
    "grouped_gemm": 0,
}


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def layouts(devices: int) -> Iterator[Layout]:
    """Every layout of so many devices that a recipe may ask for, whatever the model; `tensor` and `context` are not put
    together."""
    for tensor, context in [(size, 1) for size in divisors(devices)] + [(1, size) for size in divisors(devices)[1:]]:
        for fsdp in divisors(devices // (tensor * context)):
            for expert in divisors(fsdp * tensor * context):
                asked = ParallelArguments(None, fsdp, tensor, expert, context)
                with suppress(ValueError):
                    yield layout_of(asked, devices)
    if devices > 1:
        yield from (Layout(devices, zero=stage) for stage in (1, 2, 3))


def section(layout: Layout) -> dict[str, int]:
    """The section `parallel` of a recipe."""
    sizes = {name: size for name, size in layout._asdict().items() if size > 1 or (name == "zero" and size)}
    return sizes or {"data": 1}


class Shares:
    """What a device holds of each weight in a layout.

    Args:
        tensor_plan, expert_plan: of the model, as transformers applies them.
    """

    def __init__(self, tensor_plan: Mapping[str, str], expert_plan: Mapping[str, str], layout: Layout):
        self.layout = layout
        self.tensor_plan = tensor_plan if layout.tensor > 1 else {}
        self.expert_plan = expert_plan if layout.expert > 1 else {}

    @property
    def rows(self) -> int:
        """Groups of devices that see different rows."""
        return self.layout.data * self.layout.fsdp

    @property
    def shards(self) -> int:
        """Devices that share the weights outside experts, beyond those of a tensor group."""
        return self.layout.data if self.layout.zero == 3 else self.layout.shards

    @property
    def expert_shards(self) -> int:
        """Devices that share the same experts: what transformers calls `efsdp_size`."""
        layout = self.layout
        return layout.shards * layout.tensor // layout.expert if layout.expert > 1 else self.shards

    @property
    def gradient_shards(self) -> int:
        return self.layout.data if self.layout.zero >= 2 else self.shards

    @property
    def optimizer_shards(self) -> int:
        return self.layout.data if self.layout.zero else self.shards

    def style(self, name: str) -> str | None:
        """The rule of a weight, whose name has `*` for the number of its layer; experts that are dispatched obey no
        other."""
        of_experts = _rule(self.expert_plan, name)
        return _rule(self.tensor_plan, name) if of_experts is None else of_experts

    def is_dispatched(self, name: str) -> bool:
        """Whether a weight is that of experts which other devices do not hold."""
        return _rule(self.expert_plan, name) is not None

    def whole(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """What a device computes with, once FSDP has gathered it."""
        dimension = SPLIT_DIMENSION.get(self.style(name) or "")
        if dimension is None or not shape:
            return shape
        if len(shape) == 1:
            # A bias follows the outputs, which a split by rows keeps whole.
            if dimension == -1:
                return shape
            dimension = 0
        split = list(shape)
        split[dimension] = ceil(
            split[dimension] / (self.layout.expert if self.is_dispatched(name) else self.layout.tensor)
        )
        return tuple(split)

    def held(self, name: str, shape: tuple[int, ...], shards: int | None = None) -> int:
        """Numbers that a device holds between steps; `shards` stands for another number of shards than the weights'."""
        whole = self.whole(name, shape)
        if shards is None:
            shards = self.expert_shards if self.is_dispatched(name) else self.shards
        return prod(whole) if shards == 1 or not whole else ceil(whole[0] / shards) * prod(whole[1:])


def _rule(plan: Mapping[str, str], name: str) -> str | None:
    """Of the weight itself, or of its module."""
    return plan.get(name) or plan.get(name.rpartition(".")[0])
