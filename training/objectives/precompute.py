"""`chorus-moe precompute-teacher`: the teachers of a recipe answer its training rows, and the answers go to disk."""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoConfig

from chorus_moe.training.collator import ChorusDataCollator
from chorus_moe.training.data import load_rows
from chorus_moe.training.loading import choice_of, load_processor
from chorus_moe.training.objectives.distillation_arguments import check_distillation
from chorus_moe.training.objectives.teacher_files import write_teacher
from chorus_moe.training.objectives.teachers import Teacher
from chorus_moe.training.recipe import Recipe
from chorus_moe.training.stages import Stage
from chorus_moe.training.train import load_or_build


def precompute_teachers(
    stages: Sequence[Stage], device: torch.device | None = None, progress: bool = True
) -> dict[str, Any]:
    """What `teacher.json` holds of each folder that a recipe names; a folder that two stages name is written once.

    Rows, processor, `max_length` and temperature are those of the recipe, so that training finds what it looks for.

    Raises:
        ValueError: no stage names both teachers and a folder, or as in `write_teacher`.
    """
    written: dict[str, Any] = {}
    for stage in stages:
        folder = stage.recipe.distillation.teacher_logits
        if folder is not None and folder not in written:
            # Stages keep the processor of the first one's model; the models of later ones are not there yet.
            written[folder] = _precompute(stage.recipe, stages[0].recipe, device, progress)
    if not written:
        raise ValueError("distillation.teacher_logits is missing: the folder that the teachers' answers go to")
    return written


def _precompute(recipe: Recipe, first: Recipe, device: torch.device | None, progress: bool) -> dict[str, Any]:
    asked, data, start = recipe.distillation, recipe.data, first.model
    check_distillation(asked)
    if not asked.teachers:
        raise ValueError("distillation.teachers is missing: who is asked about the rows")
    if data.train_data is None:
        raise ValueError("data.train_data is missing: a file, a folder or a Hub id")
    rows = load_rows(data.train_data, data.train_split, **data.to_options())
    if start.model_name_or_path is not None:
        config = AutoConfig.from_pretrained(start.model_name_or_path)
        processor = load_processor(start.model_name_or_path)
    else:
        # Its tokenizer may have to be trained on the rows.
        model, processor = load_or_build(first, rows)
        config = model.config
    teacher = Teacher(asked.teachers, asked.teacher_dtype, asked.distillation_temperature)
    teacher.check(config, processor)
    for source, model in zip(teacher.sources, teacher.models, strict=True):
        print(choice_of(source, model, device), file=sys.stderr)
    collator = ChorusDataCollator(
        processor,
        max_length=data.max_length,
        on_bad_media=data.on_bad_media,
        max_bad_samples=data.max_bad_samples,
    )
    found = write_teacher(
        str(asked.teacher_logits),
        teacher,
        rows,
        collator,
        top_k=asked.teacher_top_k,
        batch_size=recipe.training.per_device_eval_batch_size,
        device=device,
        progress=progress,
    )
    print(
        f"{asked.teacher_logits}: {found['rows']:,} of {len(rows):,} rows, {found['positions']:,} tokens, "
        f"{found['top_k']} of {found['num_shared']:,} probabilities each",
        file=sys.stderr,
    )
    return found
