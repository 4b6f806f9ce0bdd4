"""A plan for many devices, from the configuration alone: memory, traffic and time of layouts, and the best ones."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from math import prod
from typing import Any

import torch

from chorus_moe.modeling.configuration_banks import check_name
from chorus_moe.modeling.configuration_chorus import ChorusConfig
from chorus_moe.surgery import parameter_report
from chorus_moe.training.scale.layout import Layout
from chorus_moe.training.scale.plan_layouts import Shares, layouts, section
from chorus_moe.training.scale.plan_memory import Pieces, Rows, measure_pieces
from chorus_moe.training.scale.plan_model import PlannedModel, Unit
from chorus_moe.training.scale.plan_rates import Rates
from chorus_moe.training.scale.plan_time import Bytes, Step, step_flops, traffic
from chorus_moe.training.sizes import readable

REASONS = 5
# Share of the device's memory that a plan may use: the context of the driver, libraries and fragments take the rest.
USABLE = 0.92


@dataclass(frozen=True)
class Precision:
    """Bytes of a number, by what it is part of; `dtype` is what is computed in."""

    dtype: torch.dtype
    weights: int
    gradients: int
    moments: int

    @property
    def compute(self) -> int:
        return self.dtype.itemsize


PRECISIONS = {
    "float32": Precision(torch.float32, 4, 4, 4),
    "bfloat16": Precision(torch.bfloat16, 2, 2, 2),
    # Weights, gradients and moments in float32, products in bfloat16: the Trainer's `bf16: true`.
    "mixed": Precision(torch.bfloat16, 4, 4, 4),
}


@dataclass(frozen=True)
class Question:
    """What is planned for.

    Args:
        gpus, per_node: devices in all, and in one node.
        memory: bytes of one device.
        sequence_length: tokens of a sequence.
        batch: sequences of a step on all devices; each group with rows of its own takes its share in several turns.
        micro_batch: sequences that such a group computes at a time.
        train: one of `TRAINED`.
        precision: one of `PRECISIONS`.
        mix: modality -> share of the tokens.
        on_gpu: whether a GPU's kernels are counted; the CPU's are for checking the plan.

    Raises:
        ValueError: a number that is not positive, numbers that do not divide, or an unknown name.
    """

    gpus: int
    memory: int
    rates: Rates
    per_node: int = 8
    sequence_length: int = 4096
    batch: int = 0
    micro_batch: int = 1
    train: str = "whole"
    precision: str = "mixed"
    mix: Mapping[str, float] | None = None
    on_gpu: bool = True

    def __post_init__(self) -> None:
        if not self.batch:
            object.__setattr__(self, "batch", self.gpus * self.micro_batch)
        for name in ("gpus", "per_node", "sequence_length", "batch", "micro_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"plan: {name}={getattr(self, name)} must be at least 1")
        if self.gpus > self.per_node and self.gpus % self.per_node:
            raise ValueError(f"plan: gpus={self.gpus} do not divide into nodes of per_node={self.per_node}")
        check_name("plan", "precision", self.precision, PRECISIONS)

    def mix_of(self, config: ChorusConfig) -> dict[str, float]:
        """Share of each modality: as asked for, or half text and the rest even.

        Raises:
            ValueError: a modality that the model does not take, or shares that do not sum to one.
        """
        if self.mix is None:
            media = config.modalities[1:]
            return {"text": 0.5 if media else 1.0, **{name: 0.5 / len(media) for name in media}}
        for name, share in self.mix.items():
            check_name("plan", "modality of the model", name, config.modalities)
            if share < 0:
                raise ValueError(f"plan: the share {name}={share:g} must not be negative")
        if abs(sum(self.mix.values()) - 1) > 1e-6:
            raise ValueError(f"plan: the shares of {', '.join(self.mix)} sum to {sum(self.mix.values()):g}, not to 1")
        return dict(self.mix)


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest device at its fullest moment.

    Args:
        parameters: held between steps, and what FSDP gathers of them for a moment.
        activations: what comes on top of the other three, with working memory.
    """

    parameters: int
    optimizer: int
    gradients: int
    activations: int

    @property
    def states(self) -> int:
        return self.parameters + self.optimizer + self.gradients

    @property
    def total(self) -> int:
        return self.states + self.activations

    def largest(self) -> str:
        return max(asdict(self), key=lambda name: getattr(self, name))


@dataclass(frozen=True)
class Estimate:
    """One layout.

    Args:
        why_not: what is wrong with it, with both numbers; None if it fits.
        memory: with activations of 0 where the rest alone does not fit.
    """

    layout: Layout
    checkpointing: bool
    memory: Memory
    step: Step
    seconds: float
    why_not: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "parallel": section(self.layout),
            "activation_checkpointing": self.checkpointing,
            **asdict(self.memory),
            "total": self.memory.total,
            "flops": self.step.flops,
            "sent_in_node": {name: round(size.in_node) for name, size in self.step.sent.items()},
            "sent_between_nodes": {name: round(size.between) for name, size in self.step.sent.items()},
            "seconds": self.seconds,
            "why_not": self.why_not,
        }


class Planner:
    """Estimates layouts of one model for one question; what several share is measured once."""

    def __init__(self, config: ChorusConfig, question: Question):
        self.config, self.question = config, question
        self.mix = question.mix_of(config)
        self.model = PlannedModel(config, question.train)
        self.precision = PRECISIONS[question.precision]
        self._pieces: dict[Any, Pieces] = {}

    @cached_property
    def flops(self) -> dict[bool, tuple[float, float]]:
        """Of a step, with and without activation checkpointing: of the layers, and of all else."""
        length = self.question.sequence_length
        tokens, both = self.question.batch * length, {}
        for again in (False, True):
            layers, rest = step_flops(self.model, self.mix, length, again)
            both[again] = layers * tokens, rest * tokens
        return both

    def rows(self, layout: Layout) -> Rows:
        # Groups with few rows have no full micro-batch.
        sequences = min(self.question.micro_batch, self.question.batch // self.model.shares(layout).rows)
        return Rows(sequences, self.question.sequence_length, self.mix)

    def micro_steps(self, layout: Layout) -> int:
        return self.question.batch // self.model.shares(layout).rows // self.rows(layout).sequences

    def refusal(self, layout: Layout) -> str | None:
        """Why a layout is not possible; None if it is."""
        if layout.tensor > self.question.per_node:
            return f"tensor above the {self.question.per_node} devices of a node: every layer would wait"
        groups, batch = self.model.shares(layout).rows, self.question.batch
        if batch % groups or batch // groups % min(self.question.micro_batch, batch // groups):
            return f"{batch} sequences a step, {self.question.micro_batch} at a time, do not divide by {groups} ranks"
        return self.model.refusal(layout)

    def step(self, layout: Layout, checkpointing: bool) -> Step:
        sent = traffic(
            self.model,
            layout,
            self.rows(layout),
            micro_steps=self.micro_steps(layout),
            per_node=self.question.per_node,
            compute_bytes=self.precision.compute,
            gradient_bytes=self.precision.gradients,
            checkpointing=checkpointing,
        )
        layers, rest = self.flops[checkpointing]
        # Encoders, embeddings and the head run whole on each device of a context group.
        return Step((layers + rest * layout.context) / self.question.gpus, sent)

    def states(self, layout: Layout) -> Memory:
        """Weights, optimizer and gradients, without activations."""
        shares, precision = self.model.shares(layout), self.precision
        weights = optimizer = gradients = 0
        for unit, count in self.model.kinds.items():
            for weight in unit:
                held = shares.held(weight.name, weight.shape)
                weights += count * held * precision.weights
                if weight.is_trained:
                    optimizer += count * 2 * self._held(shares, weight, shares.optimizer_shards) * precision.moments
                    gradients += count * self._held(shares, weight, shares.gradient_shards) * precision.gradients
        gathered = self._gathered(shares)
        if layout.replicas > 1 and not layout.is_sharded and not layout.zero:
            # DDP sums gradients in buckets of its own.
            gradients *= 2
        return Memory(weights + gathered, optimizer, gradients, 0)

    @staticmethod
    def _held(shares: Shares, weight: Any, shards: int) -> int:
        """Of gradients or moments: shared as the weights are, except by the first stages of ZeRO."""
        is_zero = shares.layout.zero in (1, 2)
        return shares.held(weight.name, weight.shape, shards if is_zero else None)

    def _gathered(self, shares: Shares) -> int:
        """Bytes of whole weights beside the shards: FSDP keeps the head, and has two layers at a time, the one that is
        computed and the next. Without shards, a copy in the dtype of the products if it is another."""
        precision = self.precision
        is_sharded = shares.shards > 1 or shares.expert_shards > 1
        if not is_sharded:
            is_copied = precision.compute != precision.weights
            return is_copied * sum(self._whole(shares, unit) * count for unit, count in self.model.kinds.items())
        others = [self._whole(shares, unit) for unit in self.model.units[:-1]]
        return self._whole(shares, self.model.head) + sum(sorted(others)[-2:])

    def _whole(self, shares: Shares, unit: Unit) -> int:
        return sum(prod(shares.whole(weight.name, weight.shape)) for weight in unit) * self.precision.compute

    def pieces(self, layout: Layout) -> Pieces:
        rows = self.rows(layout)
        # Layouts that differ in copies and shards alone compute the same.
        size = (rows.sequences, rows.length)
        key = (layout.tensor, layout.expert, layout.context, size)
        if key not in self._pieces:
            found = next((pieces for (*_, given), pieces in self._pieces.items() if given == size), None)
            encoders = None if found is None else found.encoders
            self._pieces[key] = measure_pieces(
                self.model, layout, rows, self.precision.dtype, self.question.on_gpu, encoders
            )
        return self._pieces[key]

    def memory(self, layout: Layout, checkpointing: bool) -> Memory:
        states, shares, precision = self.states(layout), self.model.shares(layout), self.precision
        left, reduced = [], 0
        for unit in self.model.units:
            trained = [weight for weight in unit if weight.is_trained]
            sizes = [self._held(shares, weight, shares.gradient_shards) for weight in trained]
            left.append(sum(sizes) * precision.gradients)
            if shares.shards > 1:
                whole = sum(prod(shares.whole(weight.name, weight.shape)) for weight in trained)
                # FSDP copies the gradients of a layer into one buffer, which it sends.
                reduced = max(reduced, whole * precision.gradients)
        if self.micro_steps(layout) > 1:
            # Those of the first turn are all there in the second.
            activations = self.pieces(layout).peak([0] * len(left), checkpointing)
        else:
            activations = self.pieces(layout).peak(left, checkpointing) - sum(left)
        return Memory(states.parameters, states.optimizer, states.gradients, max(0, activations) + reduced)

    def estimate(self, layout: Layout, checkpointing: bool) -> Estimate:
        """All of a layout that is possible; activations are measured if the rest fits."""
        step, usable = self.step(layout, checkpointing), self.question.memory * USABLE
        seconds = step.seconds(self.question.rates)
        memory = self.states(layout)
        if memory.total <= usable:
            memory = self.memory(layout, checkpointing)
        why = None
        if memory.total > usable:
            part = memory.largest()
            lacking = "" if memory.activations else " without activations"
            why = (
                f"{readable(memory.total)}{lacking} of {readable(round(usable))}; "
                f"{readable(getattr(memory, part))} are {part}"
            )
        return Estimate(layout, checkpointing, memory, step, seconds, why)

    def possible(self) -> Iterator[tuple[Layout, bool]]:
        """Layouts that the model can run in, each without and with activation checkpointing."""
        for layout in layouts(self.question.gpus):
            if self.refusal(layout) is None:
                yield from ((layout, checkpointing) for checkpointing in (False, True))

    def plan(self, best: int = 3) -> "Plan":
        """The fastest layouts that fit; where none does, those that lack least."""
        steps = [(self.step(*asked).seconds(self.question.rates), asked) for asked in self.possible()]
        fitting: list[Estimate] = []
        others: list[Estimate] = []
        # Of equal times without checkpointing, which waits for the same links.
        for _, asked in sorted(steps, key=lambda pair: (float(f"{pair[0]:.3g}"), pair[1][1])):
            # Slower ones are not looked at once enough are found, nor a layout again that fits without checkpointing.
            if len(fitting) < best and asked[0] not in [found.layout for found in fitting]:
                found = self.estimate(*asked)
                (fitting if found.why_not is None else others).append(found)
        refused: dict[str, list[Layout]] = {}
        for layout in layouts(self.question.gpus):
            if (why := self.refusal(layout)) is not None:
                refused.setdefault(why, []).append(layout)
        return Plan(self, fitting, sorted(others, key=lambda found: found.memory.states), refused, len(steps))


@dataclass(frozen=True)
class Plan:
    """What was found.

    Args:
        fitting: the best layouts, fastest first.
        others: faster ones that do not fit, the smallest first; all possible ones if none fits.
        refused: why layouts are not possible -> those layouts.
        num_possible: layouts that the model can run in, with and without activation checkpointing.
    """

    planner: Planner
    fitting: list[Estimate]
    others: list[Estimate]
    refused: dict[str, list[Layout]]
    num_possible: int

    def to_dict(self) -> dict[str, Any]:
        question = asdict(self.planner.question) | {"mix": self.planner.mix}
        return {
            "question": question,
            "parameters": self.planner.model.size,
            "best": [found.to_dict() for found in self.fitting],
            "too_large": [found.to_dict() for found in self.others],
            "refused": {why: len(found) for why, found in self.refused.items()},
        }

    def __str__(self) -> str:
        planner, question = self.planner, self.planner.question
        report = parameter_report(planner.config)
        active = ", ".join(f"{count / 1e9:,.1f} for {name}" for name, count in report.active.items())
        mix = ", ".join(f"{share:.0%} {name}" for name, share in planner.mix.items())
        lines = [
            f"{report.total / 1e9:,.1f} billion parameters, active a token: {active}",
            f"{question.gpus} devices of {readable(question.memory)}, {question.per_node} a node; "
            f"train {question.train}, {question.precision}",
            f"a step: {question.batch} sequences of {question.sequence_length} tokens ({mix})",
            "",
        ]
        if self.fitting:
            lines += [
                f"the fastest of {self.num_possible} layouts that fit; bytes of one device",
                "",
                *table(self.fitting),
            ]
            lines += ["", *links(self.fitting)]
        else:
            lines += [f"none of {self.num_possible} layouts fits; the nearest, bytes of one device", ""]
            lines += table(self.others[:3])
        if self.others:
            lines += ["", f"{'faster and ' if self.fitting else ''}too large: {len(self.others)}, the nearest"]
            lines += [f"  {label(found)}: {found.why_not}" for found in self.others[:3]]
        if self.refused:
            reasons = sorted(self.refused.items(), key=lambda pair: -len(pair[1]))
            lines += ["", "not possible", *(f"  {len(found):>4}  {why}" for why, found in reasons[:REASONS])]
            if left := sum(len(found) for _, found in reasons[REASONS:]):
                lines.append(f"  {left:>4}  for {len(reasons) - REASONS} other reasons, see --json")
        return "\n".join(lines)


def label(found: Estimate) -> str:
    return f"{found.layout.name}{', checkpointed' if found.checkpointing else ''}"


COLUMNS = ("parameters", "optimizer", "gradients", "activations", "total")


def table(found: list[Estimate]) -> list[str]:
    width = max(len(label(one)) for one in found) + 2
    lines = [f"{'layout':<{width}}" + "".join(f"{name:>13}" for name in COLUMNS) + f"{'s a step':>11}"]
    for one in found:
        values = [getattr(one.memory, name) for name in COLUMNS]
        sizes = "".join(f"{readable(value) if value else '-':>13}" for value in values)
        lines.append(f"{label(one):<{width}}{sizes}{one.seconds:>11.3g}")
    return lines


def links(found: list[Estimate]) -> list[str]:
    """Bytes sent a step, by what for, in the node and between nodes."""
    width = max(len(label(one)) for one in found) + 2
    lines = [f"{'sent a step':<{width}}{'for':>13}{'in node':>13}{'between':>13}"]
    for one in found:
        names = {name: size for name, size in one.step.sent.items() if size != Bytes()}
        for row, (name, size) in enumerate(names.items()):
            first = label(one) if not row else ""
            lines.append(
                f"{first:<{width}}{name:>13}{readable(round(size.in_node)):>13}{readable(round(size.between)):>13}"
            )
    return lines


def read_mix(text: str) -> dict[str, float]:
    """ "text=0.5,image=0.5" as a mapping.

    Raises:
        ValueError: it is none.
    """
    pairs = [word.partition("=") for word in text.split(",")]
    try:
        return {name.strip(): float(share) for name, _, share in pairs}
    except ValueError as error:
        raise ValueError(f"--mix {text!r}: expected shares such as text=0.6,image=0.3,audio=0.1") from error


def make_plan(config: ChorusConfig, question: Question, best: int = 3) -> Plan:
    """The plan of a model; nothing of it is allocated."""
    return Planner(config, question).plan(best)
