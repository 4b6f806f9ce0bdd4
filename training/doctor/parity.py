"""Checks that two ways to compute the same agree: cached, padded, batched, by another implementation, recomputed."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, StaticCache

from chorus_moe.fastpaths.experts_cpu import CPU_EXPERTS
from chorus_moe.modeling.moe_banks import ChorusExperts
from chorus_moe.training.doctor.finding import Finding, compared, difference, listed, skipped
from chorus_moe.training.doctor.inputs import NUM_ANSWER_TOKENS, SEQUENCES, Batch, Patient, all_labels, train_mode
from chorus_moe.training.doctor.state import recorded_inputs
from chorus_moe.training.releases import CHECKPOINTING

ATTENTION = ("sdpa", "flex_attention")
EXPERTS = ("eager", "batched_mm", "grouped_mm", CPU_EXPERTS)
# Rows shown to each implementation of the experts: `batched_mm` copies the weights of every row's experts.
NUM_ROWS = 16


def cache(patient: Patient) -> Finding:
    """Logits of the last tokens, computed at once and one by one with a dynamic and with a static cache."""
    config = patient.text_config
    if not config.is_causal:
        return skipped("a bidirectional model has no cache")
    limited = [bank.name for bank in config.banks if bank.limits_capacity(False)]
    if limited:
        return skipped(f"the banks {limited} have a capacity in evaluation, which the model refuses with a cache")
    found = []
    batch = patient.encode()
    length = batch["input_ids"].shape[1]
    # The two write and mask their keys differently: one grows, the other has empty places from the start.
    for kind in (DynamicCache(config=config), StaticCache(config, max_cache_len=length)):
        found.append((_cached_difference(patient, batch, kind), type(kind).__name__))
    return compared(
        found,
        patient.tolerance,
        "one pass and cached steps",
        "Generated text is not what the model was trained to write. Look at what depends on the position or the length "
        "of the input (positions, masks, sliding windows, a layer of your own). Until it is found: "
        "generate(use_cache=False)",
    )


@torch.no_grad()
def _cached_difference(patient: Patient, batch: Batch, cache: Cache) -> float:
    model, steps = patient.base, NUM_ANSWER_TOKENS
    expected = model(**batch).logits[:, -steps:]
    ids, mask = batch["input_ids"], batch["attention_mask"]
    start = ids.shape[1] - steps
    model(**{n: value[:, :start] if n in SEQUENCES else value for n, value in batch.items()}, past_key_values=cache)
    # One token at a time, as `generate` does.
    logits = []
    for stop in range(start + 1, start + steps + 1):
        step = model(input_ids=ids[:, stop - 1 : stop], attention_mask=mask[:, :stop], past_key_values=cache)
        logits.append(step.logits)
    return difference(torch.cat(logits, dim=1), expected)


def padding_side(patient: Patient) -> Finding:
    """Logits of the same samples, padded on the left as for generation and on the right as for training."""
    left, right = (patient.logits(patient.encode(side=side)) for side in ("left", "right"))
    return compared(
        _by_sample(left, right),
        patient.tolerance,
        "padding on the left and on the right",
        "Padding is seen by real tokens. Look at the attention mask and at anything that counts or averages tokens",
    )


def batch_mates(patient: Patient) -> Finding:
    """Logits of each sample in a batch with others, with and without media, and alone."""
    together = patient.logits(patient.encode(side=None))
    alone = [patient.logits(patient.encode([row]))[0] for row in patient.rows]
    return compared(
        _by_sample(together, alone),
        patient.tolerance,
        "each sample alone and in a batch",
        "A sample's answer depends on its batch mates. Look for what is counted, sorted or normalised over the batch "
        "(capacity over the batch, batch norm in training mode), and for media given to the wrong sample",
    )


def _by_sample(found: list[Tensor], expected: list[Tensor]) -> list[tuple[float, str]]:
    pairs = enumerate(zip(found, expected, strict=True))
    return [(difference(one, other), f"sample {number}") for number, (one, other) in pairs]


def implementations(patient: Patient) -> Finding:
    """Logits under each implementation of attention, and outputs of every bank's experts under each of theirs; the
    reference is `eager`."""
    results = [*_attention_differences(patient), *_expert_differences(patient)]
    unusable = [where for value, where in results if value is None]
    return compared(
        [(value, where) for value, where in results if value is not None],
        patient.tolerance,
        "implementations of attention and experts" + (f" (not usable here: {listed(unusable)})" if unusable else ""),
        "Two implementations compute different things. Load with attn_implementation='eager' or "
        "experts_implementation='eager', whichever is named, until it is found; look at what only one of them reads "
        "(masks, scaling, sentinel expert ids)",
    )


# Each yields a difference from `eager`; or None and the reason, for an implementation that cannot run here.
Differences = Iterator[tuple[float | None, str]]
UNUSABLE = (ImportError, RuntimeError, ValueError)


def _attention_differences(patient: Patient) -> Differences:
    batch = patient.encode()
    patient.decoder.set_attn_implementation("eager")
    expected = torch.cat(patient.logits(batch))
    for name in ATTENTION:
        # On the CPU flex_attention has to be compiled first, which takes longer than all checks together.
        if name == "flex_attention" and patient.device.type == "cpu":
            continue
        try:
            patient.decoder.set_attn_implementation(name)
            yield difference(torch.cat(patient.logits(batch)), expected), f"attention {name}"
        except UNUSABLE as error:
            yield None, f"{name}: {str(error).splitlines()[0]}"


@torch.no_grad()
def _expert_differences(patient: Patient) -> Differences:
    modules: dict[str, nn.Module] = {
        name: module for name, module in patient.decoder.named_modules() if isinstance(module, ChorusExperts)
    }
    # Each implementation gets the same inputs, so a difference in one layer does not grow through the ones behind it.
    with recorded_inputs(modules) as inputs:
        patient.base(**patient.encode())
    # A bank that no token entered has nothing to compare.
    inputs = {name: tuple(value[:NUM_ROWS] for value in args) for name, args in inputs.items() if len(args[0])}
    expected: dict[str, Tensor] = {}
    for implementation in EXPERTS:
        try:
            patient.decoder.set_experts_implementation(implementation)
            outputs = {name: modules[name](*args) for name, args in inputs.items()}
        except UNUSABLE as error:
            yield None, f"{implementation}: {str(error).splitlines()[0]}"
            continue
        # `eager` comes first in the list.
        expected = expected or outputs
        yield from (
            (difference(output, expected[name]), f"experts {implementation}, {name}")
            for name, output in outputs.items()
            if implementation != "eager"
        )


def checkpointing(patient: Patient) -> Finding:
    """Loss and gradients with and without activation checkpointing, and whether layers are computed again. Holds one
    set of gradients of what is trained."""
    parameters = _trained(patient)
    if not parameters:
        return skipped("no parameter can be trained")
    patient.model.requires_grad_(False)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    train_mode(patient)
    batch = patient.encode(side="right")
    passes: list[int] = []
    # A layer that is computed again calls its norm twice.
    norm: Any = patient.decoder.layers[0].input_layernorm
    handle = norm.register_forward_pre_hook(lambda *_: passes.append(1))
    with _checkpointing(patient.base, False):
        plain_loss = _step(patient.base, batch)
    expected = {name: parameter.grad for name, parameter in parameters.items()}
    passes.clear()
    with _checkpointing(patient.base, True), _compared_gradients(parameters, expected) as gaps:
        loss = _step(patient.base, batch)
    handle.remove()
    finding = compared(
        [(abs(loss - plain_loss) / max(abs(plain_loss), 1e-9), "the loss"), *((gap, n) for n, gap in gaps.items())],
        patient.tolerance,
        "loss and gradients with and without checkpointing",
        "Train without activation checkpointing until it is found. Look for random numbers, state or statistics that "
        "change between the two passes of a layer",
    )
    if finding.verdict == "ok" and len(passes) != 2:
        return Finding(
            verdict="warning",
            explanation=f"checkpointing is on, but layer 0 ran {len(passes)} times in a step, expected 2",
            measured=len(passes),
            tolerance=2,
            cure="Checkpointing saves no memory here: a layer that is no GradientCheckpointingLayer, or frozen inputs",
        )
    return finding


@contextmanager
def _checkpointing(model: Any, enable: bool) -> Iterator[None]:
    """Activation checkpointing on or off, and afterwards as it was."""
    was_on = getattr(model, f"is_{CHECKPOINTING}")
    _switch(model, enable)
    try:
        yield
    finally:
        _switch(model, was_on)


def _switch(model: Any, enable: bool) -> None:
    if enable:
        # Non-reentrant: the reentrant kind needs inputs with gradients and hides routers from the losses.
        getattr(model, f"{CHECKPOINTING}_enable")({"use_reentrant": False})
    else:
        getattr(model, f"{CHECKPOINTING}_disable")()
        model.disable_input_require_grads()


@contextmanager
def _compared_gradients(
    parameters: Mapping[str, nn.Parameter], expected: dict[str, Tensor | None]
) -> Iterator[dict[str, float]]:
    """Gaps between expected gradients and those of a backward pass within; either is freed once it is compared."""
    gaps: dict[str, float] = {}

    def compare(name: str, parameter: nn.Parameter) -> None:
        gaps[name] = _gradient_gap(parameter.grad, expected.pop(name))
        parameter.grad = None

    handles = []
    for name, parameter in parameters.items():
        parameter.grad = None
        handles.append(parameter.register_post_accumulate_grad_hook(lambda p, name=name: compare(name, p)))
    try:
        yield gaps
    finally:
        for handle in handles:
            handle.remove()
    # What is left got no gradient in the second run.
    gaps |= {name: _gradient_gap(None, gradient) for name, gradient in expected.items()}


def _trained(patient: Patient) -> dict[str, nn.Parameter]:
    """What training would train: the adapter's parameters, or all of a model without one."""
    mark = patient.model.base_model.prefix if patient.is_adapted else ""
    return {
        name: parameter
        for name, parameter in patient.model.named_parameters()
        if parameter.is_floating_point() and (mark in name or ".modules_to_save." in name)
    }


def _step(model: nn.Module, batch: Batch) -> float:
    # Dropout and sampled experts must be the same in both runs.
    torch.manual_seed(0)
    loss = model(**batch, labels=all_labels(batch)).loss
    loss.backward()
    return float(loss.detach())


def _gradient_gap(found: Tensor | None, expected: Tensor | None) -> float:
    """Norm of the difference over the norm of the gradient itself."""
    if found is None or expected is None:
        return 0.0 if found is expected else float("inf")
    # A gradient of zero has no scale; roundings around it must not count as differences.
    scale = max(float(expected.float().norm()), 1e-6)
    return float((found.float() - expected.float()).norm()) / scale
