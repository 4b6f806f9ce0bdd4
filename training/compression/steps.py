"""The steps of a compression, each twice: on a model without memory, for its size before work, and on the model itself.

Unusual here: on the meta device, every expert and unit has the same score. Which ones stay has no part in the size.
"""

import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from chorus_moe.modeling.configuration_chorus import ChorusConfig
from chorus_moe.modeling.modeling_generation import ChorusForConditionalGeneration
from chorus_moe.processors.processing_chorus import ChorusProcessor
from chorus_moe.surgery import bytes_report, merge_experts, prune_dense, prune_experts, quantize
from chorus_moe.surgery.dense_groups import owners_of, tower_depth
from chorus_moe.surgery.experts_merge import OPERATION as MERGE
from chorus_moe.surgery.parts import decoder_of
from chorus_moe.surgery.report import OperationReport
from chorus_moe.training.collator import ChorusDataCollator
from chorus_moe.training.compression.importance import Scores, measure_importance
from chorus_moe.training.compression.plan import CompressionRecipe, Distil, Merge, Prune, Quantize, Step
from chorus_moe.training.data import RowDataset
from chorus_moe.training.loading import ModelOrAdapter
from chorus_moe.training.readiness import check_recipe
from chorus_moe.training.recipe import Recipe, build_recipe
from chorus_moe.training.routing.saliency import expert_saliency

# Few and small steps: the student is the teacher but for what was taken away.
DISTIL_TRAINING: dict[str, Any] = {
    "num_train_epochs": 3,
    "per_device_train_batch_size": 16,
    "learning_rate": 1e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "save_strategy": "epoch",
    "save_total_limit": 1,
    "report_to": "none",
}


def model_without_memory(config: ChorusConfig) -> ChorusForConditionalGeneration:
    """The generative model of a configuration, in its numbers, on the meta device."""
    with torch.device("meta"):
        return ChorusForConditionalGeneration._from_config(copy.deepcopy(config), dtype=config.dtype or torch.float32)


def bytes_on_disk(model: nn.Module) -> int:
    """Bytes of the safetensors file that `save_pretrained` would write, its header included."""
    offset, header = 0, {}
    for name, tensor in model.state_dict().items():
        size = tensor.numel() * tensor.element_size()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [offset, offset + size]}
        offset += size
    return bytes_report(model).bytes + len(json.dumps(header, separators=(",", ":"))) + 8


def outline(step: Step, model: ChorusForConditionalGeneration) -> None:
    """Give a model on the meta device the shapes and numbers that it has after the step.

    Raises:
        ValueError: what the step names does not fit the model.
    """
    if isinstance(step, Prune):
        if step.experts:
            prune_experts(model, step.experts, even_scores(model))
        if step.dense:
            prune_dense(model, step.dense, layer_scores(model, 1.0))
    elif isinstance(step, Merge):
        for bank in decoder_of(model).config.banks:
            if bank.name in step.banks and bank.expert_depth > 1:
                raise ValueError(f"{MERGE}: bank {bank.name!r} has expert_depth={bank.expert_depth}; prune it instead")
        prune_experts(model, step.banks, even_scores(model))
    elif isinstance(step, Quantize):
        quantize(model, step.groups, verbose=False)
    elif getattr(model.config, "quantization_config", None) is not None:
        raise ValueError("distil: the weights are quantised by then and cannot be trained; put distil before quantize")


def even_scores(model: nn.Module) -> dict[int, dict[str, torch.Tensor]]:
    """Layer -> bank -> ones."""
    layers: Any = decoder_of(model)
    return {
        layer: {name: torch.ones(bank.num_experts) for name, bank in layers.layers[layer].mlp.banks.items()}
        for layer in layers.config.sparse_layers
    }


def layer_scores(model: ChorusForConditionalGeneration, value: float) -> Scores:
    """The same score for all layers of decoder and towers."""
    found: Scores = {}
    for owner, part in owners_of(model.model).items():
        is_decoder = owner == "language_model"
        config: Any = part.config
        depth = config.num_hidden_layers if is_decoder else tower_depth(part, config)
        if depth is not None:
            found["layers" if is_decoder else f"{owner}.layers"] = {"": torch.full((depth,), value)}
    return found


def apply(
    step: Step, model: ModelOrAdapter, processor: ChorusProcessor, rows: RowDataset | None, batch_size: int
) -> list[OperationReport]:
    """Carry out a step that is no training on a model; what it did.

    Args:
        rows: for scores; None where no step needs any.
    """
    reports = []
    if isinstance(step, Quantize):
        return [quantize(model, step.groups, verbose=False)]
    assert not isinstance(step, Distil) and rows is not None  # `check_data` has seen to it
    chosen = [rows[index] for index in range(min(step.rows, len(rows)))]
    if isinstance(step, Merge):
        found = expert_saliency(model, processor, chosen, batch_size=batch_size)
        whole: Any = model
        return [merge_experts(whole, bank, count, found.uses, step.similarity) for bank, count in step.banks.items()]
    if step.experts:
        found = expert_saliency(model, processor, chosen, batch_size=batch_size)
        reports.append(prune_experts(model, step.experts, getattr(found, step.by)))
    if step.dense:
        # Measured on what is left: what the experts did that are gone, others do now.
        scores = measure_importance(model, batches(processor, chosen, batch_size))
        reports.append(prune_dense(model, step.dense, scores))
    return reports


def batches(
    processor: ChorusProcessor, rows: Sequence[Mapping[str, Any]], batch_size: int
) -> Iterable[Mapping[str, Any]]:
    """Rows with their labels."""
    collator, left = ChorusDataCollator(processor), iter(rows)
    while batch := list(islice(left, batch_size)):
        yield collator(batch)


def distil_recipe(
    step: Distil, recipe: CompressionRecipe, student: str, folder: Path, device: torch.device | None = None
) -> Recipe:
    """The training recipe of a distil step, checked.

    Args:
        student: the model before the step.
        folder: where the trained one goes; a run that was interrupted there goes on.
        device: where it is trained; None for an accelerator if there is one.

    Raises:
        ValueError: as `build_recipe` and `check_recipe`.
    """
    data = {name: value for name, value in recipe.data.items() if not name.startswith("eval_")}
    training = {"seed": recipe.seed, **DISTIL_TRAINING, **step.sections.get("training", {})}
    if device is not None and device.type == "cpu":
        training["use_cpu"] = True
    sections = {
        **step.sections,
        "model": {"model_name_or_path": student},
        "data": data,
        "distillation": {"teachers": [recipe.model], **step.sections.get("distillation", {})},
        "training": {**training, "output_dir": str(folder), "resume_from_checkpoint": "auto"},
    }
    built = build_recipe(sections, "compress, distil")
    check_recipe(built)
    return built
