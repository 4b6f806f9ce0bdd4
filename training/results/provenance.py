"""Where the weights of a run come from, for its card: recipe, data, hyperparameters, seed, versions and commit."""

import os
import subprocess
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml
from transformers import Trainer

from chorus_moe.training.data import RowDataset, RowReader
from chorus_moe.training.loading import base_model
from chorus_moe.training.recipe import SECTIONS, Recipe, field_names
from chorus_moe.training.results.confusion import cell_of

PACKAGES = ("chorus-moe", "torch", "transformers", "peft", "datasets", "timm", "torchaudio")
HYPERPARAMETERS = (
    *("optim", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "world_size"),
    *("bf16", "fp16", "label_smoothing_factor", "seed"),
)


def run_section(recipe: Recipe, trainer: Trainer, rows: RowReader, eval_rows: RowDataset | None) -> list[str]:
    """Lines of a card on how its weights came about. Of local paths only the last name is told."""
    data, state = recipe.data, trainer.state
    facts = {"starts from": start_of(recipe, trainer)}
    count = f"{len(rows):,} rows" if isinstance(rows, RowDataset) else "streamed"
    facts["data"] = f"{name_of(data.train_data)}, {data.train_split}: {count}"
    if eval_rows is not None:
        facts["evaluation data"] = f"{name_of(data.eval_data)}, {data.eval_split}: {len(eval_rows):,} rows"
    if (tasks := getattr(trainer, "tasks", None)) is not None:
        facts["tasks"] = str(tasks.plan).removeprefix("tasks: ")
    facts["steps"] = f"{state.global_step:,} ({state.epoch or 0:.2f} epochs)"
    facts |= {name: str(plain_value(getattr(trainer.args, name))) for name in HYPERPARAMETERS}
    facts["versions"] = ", ".join(f"{name} {found}" for name in PACKAGES if (found := installed(name)))
    if (commit := commit_here()) is not None:
        facts["commit"] = commit
    return [
        "## How it was trained",
        "",
        "| | |",
        "| --- | --- |",
        *(f"| {name} | {cell_of(value, longest=400)} |" for name, value in facts.items()),
        "",
        "What the recipe said:",
        "",
        "```yaml",
        yaml.safe_dump(given_of(recipe), sort_keys=False, allow_unicode=True).rstrip(),
        "```",
        "",
    ]


def start_of(recipe: Recipe, trainer: Trainer) -> str:
    """The model that the run starts from, with its commit where it comes from the Hub."""
    if recipe.model.model_name_or_path is None:
        return "new weights"
    commit = getattr(base_model(trainer.model).config, "_commit_hash", None)
    return name_of(recipe.model.model_name_or_path) + (f" at {commit}" if commit else "")


def given_of(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Section -> what the recipe and the command line said, without access tokens."""
    found: dict[str, dict[str, Any]] = {}
    for section, kind in SECTIONS.items():
        for name in sorted(recipe.given & field_names(kind)):
            if not name.endswith("_token"):
                value = plain_value(getattr(getattr(recipe, section), name))
                # Said as "none", which the Trainer's arguments read as an empty list.
                found.setdefault(section, {})[name] = "none" if name == "report_to" and not value else value
    return found


def plain_value(value: object) -> object:
    """A value as YAML knows it; of a local path its last name."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, list | tuple):
        return [plain_value(item) for item in value]
    if isinstance(value, dict):
        return {str(key): plain_value(item) for key, item in value.items()}
    if value is None or isinstance(value, bool | int | float):
        return value
    return name_of(str(value))


def name_of(source: str | None) -> str:
    """A name without the folders above it, which mean nothing elsewhere and may tell more than their owner wants."""
    source = str(source)
    # A text of configuration may be longer than a path can be.
    is_path = len(source) < 1_000 and "\n" not in source and (os.path.isabs(source) or os.path.exists(source))
    return Path(source).name if is_path else source


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit_here() -> str | None:
    """The commit of the repository that the run was started in, with a note of changes; None outside of one."""
    try:
        commit = _git("rev-parse", "HEAD")
        return f"{commit} with changes" if _git("status", "--porcelain", "--untracked-files=no") else commit
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()
