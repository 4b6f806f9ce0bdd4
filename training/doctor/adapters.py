"""Whether an adapter reaches what its configuration names."""

import re
from collections.abc import Iterable
from copy import deepcopy

import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers.utils import cached_file

from chorus_moe.training.doctor.finding import Finding, compared, counted, difference, listed, skipped
from chorus_moe.training.doctor.inputs import Patient, all_labels, answer_labels, gradient_norms
from chorus_moe.training.loading import ModelOrAdapter

WEIGHTS = "adapter_model.safetensors"
# Size of what stands for an untrained B, and the least change of the logits that counts as one.
TRIAL_STD, LEAST_CHANGE = 0.02, 1e-6


def adapters(patient: Patient) -> Finding:
    """Every name of the configuration matches something, every part gets a gradient, the file holds what the model
    has, the adapter changes the output, and merging does not. Copies the model."""
    if not patient.is_adapted:
        return skipped("the model has no adapter")
    parts = adapted_parts(patient.model)
    faults = [f"{name!r} matches nothing" for name in unmatched_names(patient.model, parts)]
    if not parts:
        return counted([*faults, "the adapter has no parameter in this model"], "", CURE)
    batch = patient.encode()
    parameters = {f"{part} {number}": p for part, found in parts.items() for number, p in enumerate(found)}
    # Twice: what no label reaches is a fault; what only the labels of an answer do not reach is a matter of the layout.
    reached, answered = (
        {name.rpartition(" ")[0] for name, norm in gradient_norms(patient, parameters, batch, labels).items() if norm}
        for labels in (all_labels(batch), answer_labels(batch))
    )
    faults += [f"{part} gets no gradient" for part in parts if part not in reached]
    faults += misloaded_tensors(patient)
    warnings = {}
    if unheard := sorted({part.replace(".base_layer", "") for part in reached - answered}):
        warnings[f"the labels of an answer do not reach {listed(unheard, separator=', ')}"] = UNHEARD
    # Copies the model, so it runs only if nothing is wrong so far.
    if not faults:
        faulty, is_trained = _effect(patient)
        if faulty is not None:
            return faulty
        if not is_trained:
            warnings["it changes nothing as it stands"] = UNTRAINED
    return counted(faults, f"{len(parts)} adapted parts get a gradient and can be merged", CURE, warnings)


CURE = (
    "Name parts that the forward pass calls (`chorus-moe`'s `lora_config` finds them by group and refuses what matches "
    "nothing), and load the adapter on the model it was trained on (--base)"
)
UNHEARD = (
    "No later layer lets the words of an answer read these positions (it is the last layer, or a sliding window ends "
    "before them): leave the adapter of these banks out"
)
UNTRAINED = "An adapter whose B is zero was never trained: train it, or look whether the right folder was saved"


def adapted_parts(model: ModelOrAdapter) -> dict[str, list[nn.Parameter]]:
    """Adapted module or parameter -> the adapter's parameters on it, of the active adapter."""
    prefix, adapter = model.base_model.prefix, model.active_adapter
    parts: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        # PEFT stores adapters of several names side by side; only the active one is examined.
        for mark in (f".{prefix}", ".modules_to_save."):
            part, found, rest = name.partition(mark)
            if found and adapter in rest.split("."):
                parts.setdefault(part.removeprefix("base_model.model."), []).append(parameter)
    return parts


def unmatched_names(model: ModelOrAdapter, parts: Iterable[str]) -> list[str]:
    """Names in the adapter's configuration that match nothing in the model: PEFT only minds when none matches."""
    config = model.peft_config[model.active_adapter]
    modules, parameters = model.base_model.targeted_module_names, model.base_model.targeted_parameter_names
    targets = config.target_modules or []
    # PEFT reads a string as a regular expression for the whole name, a list as suffixes.
    regular = [targets] if isinstance(targets, str) else []
    plain = [] if isinstance(targets, str) else list(targets)
    missing = [name for name in regular if not any(re.fullmatch(name, module) for module in modules)]
    missing += [name for name in plain if not _ends_some(name, modules)]
    missing += [name for name in getattr(config, "target_parameters", None) or [] if not _ends_some(name, parameters)]
    missing += [name for name in config.modules_to_save or [] if not _ends_some(name, parts)]
    return missing


def _ends_some(name: str, paths: Iterable[str]) -> bool:
    return any(path == name or path.endswith(f".{name}") for path in paths)


def misloaded_tensors(patient: Patient) -> list[str]:
    """Tensors of the adapter's file that the model lacks or holds otherwise, and the reverse: PEFT only warns."""
    path = patient.source and cached_file(patient.source, WEIGHTS, _raise_exceptions_for_missing_entries=False)
    if not path:
        return []
    stored, loaded = load_file(path), get_peft_model_state_dict(patient.model)
    faults = [f"{name} of the adapter's file is not in the model" for name in stored.keys() - loaded.keys()]
    faults += [f"{name} is not in the adapter's file" for name in loaded.keys() - stored.keys()]
    faults += [
        f"{name} differs from the adapter's file"
        for name in stored.keys() & loaded.keys()
        # In the dtype of the model, to which the file was cast when it was loaded.
        if stored[name].shape != loaded[name].shape or not torch.equal(stored[name].to(loaded[name]), loaded[name])
    ]
    return sorted(faults)


def _effect(patient: Patient) -> tuple[Finding | None, bool]:
    """A finding if the adapter cannot change anything or merging changes something; and whether it changes the output
    as it stands. The work is done on a copy."""
    # Merging changes weights, which no check may do.
    trial = Patient(deepcopy(patient.model), patient.processor)
    batch = patient.encode()
    with torch.no_grad(), trial.model.disable_adapter():
        plain = torch.cat(trial.logits(batch))
    is_trained = difference(torch.cat(trial.logits(batch)), plain) >= LEAST_CHANGE
    # With B = 0 the adapter changes nothing anyway, so noise stands in for what training would write.
    if not is_trained:
        _fill_zeros(trial.model)
    adapted = torch.cat(trial.logits(batch))
    change = difference(adapted, plain)
    if change < LEAST_CHANGE:
        finding = Finding(
            verdict="failed",
            explanation="the adapter changes no output",
            measured=change,
            tolerance=LEAST_CHANGE,
            at_least=True,
            cure=CURE,
        )
        return finding, is_trained
    trial = Patient(trial.model.merge_and_unload(), patient.processor)
    merged = [(difference(torch.cat(trial.logits(batch)), adapted), "all samples")]
    cure = "Merge in float32 (--dtype float32) and cast afterwards, or keep the adapter beside the model"
    finding = compared(merged, patient.tolerance, "merged and unmerged adapter", cure)
    return (finding if finding.verdict == "failed" else None), is_trained


@torch.no_grad()
def _fill_zeros(model: ModelOrAdapter) -> None:
    """Noise for the parameters of an adapter that are zero, which is how B starts."""
    for parameter in (p for parameters in adapted_parts(model).values() for p in parameters):
        if not parameter.any():
            parameter.normal_(std=TRIAL_STD)
