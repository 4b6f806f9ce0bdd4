"""A private run on a tiny model."""

from pathlib import Path
from typing import Any

import pytest
from torch import nn
from transformers import TrainingArguments

from chorus_moe import ChorusProcessor
from chorus_moe.training.collator import ChorusDataCollator
from chorus_moe.training.privacy.arguments import PrivacyArguments
from chorus_moe.training.recipe import TRAINER_SETTINGS
from tests.training.conftest import make_rows

REASON = "opacus is not installed: pip install 'chorus-moe[privacy]', or .ci/matrix privacy"


def make_trainer(
    model: nn.Module,
    processor: ChorusProcessor,
    folder: Path,
    privacy: dict[str, Any] | None = None,
    rows: list[dict[str, Any]] | None = None,
    seed: int | None = 0,
    parts: dict[str, Any] | None = None,
    **settings: Any,
) -> Any:
    """A `PrivateTrainer`; privacy without noise unless asked, updates of 4 of 6 rows in two micro-batches."""
    pytest.importorskip("opacus", reason=REASON)
    from chorus_moe.training.privacy.trainer import PrivateTrainer

    defaults = {
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "save_strategy": "no",
    }
    defaults |= {"learning_rate": 1e-2, "report_to": "none", "use_cpu": True, "disable_tqdm": True, "logging_steps": 1}
    return PrivateTrainer(
        model,
        TrainingArguments(str(folder), **{**TRAINER_SETTINGS, **defaults, **settings}),
        privacy=PrivacyArguments(use_privacy=True, **(privacy or {"noise_multiplier": 1.0})),
        private_seed=seed,
        data_collator=ChorusDataCollator(processor),
        train_dataset=make_rows(6) if rows is None else rows,
        processing_class=processor,
        **(parts or {}),
    )
