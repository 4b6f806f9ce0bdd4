"""What a compression comes to in bytes before any work, and the default plan of a target.

The default plan is the first that reaches the target of a list that begins with what costs least accuracy: 8 bits, 8
bits in towers too, 4 bits in experts, 4 bits in attention and dense parts, and then, where there are rows to learn
from, ever fewer experts and ever narrower ones, with distillation before the weights are rounded.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from chorus_moe.modeling.configuration_chorus import ChorusConfig
from chorus_moe.modeling.modeling_generation import ChorusForConditionalGeneration
from chorus_moe.surgery.dense_groups import groups_of, owners_of
from chorus_moe.surgery.experts_prune import least_experts
from chorus_moe.surgery.quantization_formats import DEFAULT, GROUP_SIZES
from chorus_moe.surgery.quantization_formats import groups_of as quantizable
from chorus_moe.training.compression.plan import CompressionRecipe, Distil, Prune, Quantize, Step
from chorus_moe.training.compression.steps import bytes_on_disk, model_without_memory, outline
from chorus_moe.training.sizes import readable

TOWERS = "towers"
# Groups of 4 bits, the mildest first; tables of tokens, connectors and towers stay at 8.
EXPERTS, DENSE = ("experts",), ("experts", "attention", "cross_modal", "shared_experts", "dense")
# Shares of the experts, and of the units of experts and feed-forwards, that stay.
KEPT = ((0.75, 1.0), (0.5, 1.0), (0.5, 0.75), (0.5, 0.5), (0.25, 0.5), (0.25, 0.25))


@dataclass(frozen=True)
class Outlook:
    """A plan with its bytes on disk.

    Args:
        steps: in their order.
        before: bytes of the model.
        after: bytes after each step.
        target: bytes at most; None if only steps were given.
    """

    steps: tuple[Step, ...]
    before: int
    after: tuple[int, ...]
    target: int | None = None

    @property
    def bytes(self) -> int:
        return self.after[-1] if self.after else self.before

    def __str__(self) -> str:
        names = ["now", *(f"{number} {step.name}" for number, step in enumerate(self.steps, start=1))]
        lines = [f"{'plan':<16}{'bytes':>16}{'':>12}{'share':>8}"]
        for name, size in zip(names, (self.before, *self.after), strict=True):
            lines.append(f"{name:<16}{size:>16,}{readable(size):>12}{size / self.before:>8.3f}")
        if self.target is not None:
            share = self.target / self.before
            lines.append(f"{'target':<16}{self.target:>16,}{readable(self.target):>12}{share:>8.3f}")
        return "\n".join(lines)


def look_ahead(recipe: CompressionRecipe, config: ChorusConfig) -> Outlook:
    """The steps of a recipe, or those of the default plan of its target, with their bytes; nothing is allocated.

    Raises:
        ValueError: a step that does not fit the model, or a target that is not reached, with both numbers.
    """
    before = bytes_on_disk(model_without_memory(config))
    target = recipe.target_bytes
    if isinstance(target, float):
        target = int(target * before)
    if recipe.steps:
        found = Outlook(recipe.steps, before, sizes_of(recipe.steps, config), target)
        if target is not None and found.bytes > target:
            raise ValueError(f"compress: the steps come to {found.bytes:,} bytes; the target is {target:,}")
        return found
    assert target is not None  # `read_compression` has seen to it
    if target >= before:
        raise ValueError(f"compress: the model has {before:,} bytes, within the target of {target:,}: nothing to do")
    smallest = before
    has_rows = "train_data" in recipe.data
    for steps in default_plans(config, has_rows):
        sizes = sizes_of(steps, config)
        if sizes[-1] <= target:
            return Outlook(steps, before, sizes, target)
        smallest = min(smallest, sizes[-1])
    cure = "name steps of your own in a recipe" if has_rows else "with training rows (--data) experts can be pruned too"
    raise ValueError(f"compress: the smallest default plan has {smallest:,} bytes; the target is {target:,}; {cure}")


def sizes_of(steps: Sequence[Step], config: ChorusConfig) -> tuple[int, ...]:
    """Bytes on disk after each step.

    Raises:
        ValueError: a step that does not fit the model, by its number.
    """
    model, sizes = model_without_memory(config), []
    for number, step in enumerate(steps, start=1):
        try:
            outline(step, model)
        except ValueError as error:
            raise ValueError(f"compress, step {number} ({step.name}): {error}") from error
        sizes.append(bytes_on_disk(model))
    return tuple(sizes)


def default_plans(config: ChorusConfig, has_rows: bool) -> Iterator[tuple[Step, ...]]:
    """Plans from the mildest to the harshest."""
    model = model_without_memory(config)
    yield (Quantize(formats(model, (), with_towers=False)),)
    for four_bits in ((), EXPERTS, DENSE):
        yield (Quantize(formats(model, four_bits)),)
    if not has_rows or not config.text_config.sparse_layers:
        return
    for experts, units in KEPT:
        smaller = copy.deepcopy(model)
        prune = Prune(experts=fewer_experts(config, experts), dense=narrower(smaller, units))
        outline(prune, smaller)
        distil = Distil({"distillation": {"distilled_layers": same_layers(config)}})
        for four_bits in (EXPERTS, DENSE):
            yield prune, distil, Quantize(formats(smaller, four_bits))


def formats(
    model: ChorusForConditionalGeneration, four_bits: Sequence[str], with_towers: bool = True
) -> Mapping[str, str]:
    """Group -> "int4" for those named, as far as their rows can be divided, and "int8" for the others."""
    found = quantizable(model)
    names = [name for name in (*DEFAULT, *((TOWERS,) if with_towers else ())) if name in found]
    return {
        name: "int4"
        if name in four_bits
        and all(getattr(module, key).shape[-1] % GROUP_SIZES[-1] == 0 for module, key in found[name].values())
        else "int8"
        for name in names
    }


def fewer_experts(config: ChorusConfig, share: float) -> dict[str, int]:
    """Bank -> experts that stay, at least as many as the bank needs."""
    kept = {}
    for bank in config.text_config.banks:
        counts = bank.num_experts if isinstance(bank.num_experts, list) else [bank.num_experts]
        groups = bank.num_groups
        found = max(round(share * min(counts) / groups) * groups, least_experts(bank))
        kept[bank.name] = min(found, min(counts))
    return kept


def narrower(model: ChorusForConditionalGeneration, share: float) -> dict[str, int]:
    """Group -> units of experts and feed-forwards of the decoder that stay, in steps that groups of 4 bits divide."""
    if share == 1:
        return {}
    decoder = owners_of(model.model)["language_model"]
    sizes = {name: group.size for name, group in groups_of(model.config, "language_model", decoder) if name != "heads"}
    step = GROUP_SIZES[-1]
    return {name: max(round(share * size / step) * step, min(size, step)) for name, size in sizes.items()}


def same_layers(config: ChorusConfig) -> dict[int, int]:
    """Half of the layers and all of them, for states that a student learns from a teacher of the same depth."""
    depth = config.text_config.num_hidden_layers
    return {layer: layer for layer in sorted({max(depth // 2, 1), depth})}
