"""Bad steps are skipped, counted and kept, and too many of them end the run."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

from chorus_moe import ChorusProcessor
from chorus_moe.training.collator import ChorusDataCollator
from chorus_moe.training.guards.steps import StepGuard, TrainingBroke
from chorus_moe.training.recipe import TRAINER_SETTINGS
from chorus_moe.training.trainer import ChorusTrainer
from tests.training.conftest import make_model, make_rows
from tests.training.test_train import assert_equal


class Spoiling(ChorusTrainer):
    """Multiplies the loss of some steps."""

    spoiled: dict[int, float] = {}

    def compute_loss(self, *arguments: Any, **options: Any) -> Any:
        loss = super().compute_loss(*arguments, **options)
        return loss * self.spoiled.get(self.state.global_step + 1, 1.0)


def trainer_of(
    tokenizer: PreTrainedTokenizerFast,
    processor: ChorusProcessor,
    folder: Path,
    spoiled: dict[int, float],
    guard: StepGuard,
    **settings: Any,
) -> Spoiling:
    defaults = {"max_steps": 16, "per_device_train_batch_size": 1, "learning_rate": 1e-3, "save_steps": 4}
    quiet = {"report_to": "none", "use_cpu": True, "disable_tqdm": True}
    trainer = Spoiling(
        make_model(tokenizer, attention_dropout=0.1),
        TrainingArguments(str(folder), **{**TRAINER_SETTINGS, **defaults, **quiet, **settings}),
        data_collator=ChorusDataCollator(processor),
        train_dataset=make_rows(6),
        processing_class=processor,
        guard=guard,
    )
    trainer.spoiled = spoiled
    return trainer


@pytest.mark.parametrize("optim", ["adamw_torch", "schedule_free_adamw", "prodigy"])
def test_a_skipped_step_leaves_every_weight_as_it_was(
    optim: str, tokenizer: PreTrainedTokenizerFast, processor: ChorusProcessor, tmp_path: Path
) -> None:
    short = {"max_steps": 2, "save_strategy": "no", "lr_scheduler_type": "constant", "weight_decay": 0.1}
    name = "adamw_torch" if optim == "prodigy" else optim
    trainers = []
    # The same seed for each: the first step of both draws the same dropout.
    for steps, spoiled in ((1, {}), (2, {2: torch.nan})):
        trainer = trainer_of(
            tokenizer, processor, tmp_path, spoiled, StepGuard(), optim=name, **short | {"max_steps": steps}
        )
        trainer.args.optim = optim
        trainer.train()
        trainer._take_average()
        trainers.append(trainer)
    good, bad = trainers
    assert (good.num_skipped_steps, bad.num_skipped_steps) == (0, 1)
    # Schedule-free weights go to and from their average, a rounding.
    for (key, weight), other in zip(good.model.named_parameters(), bad.model.parameters(), strict=True):
        torch.testing.assert_close(weight, other, atol=0 if optim != "schedule_free_adamw" else 1e-6, rtol=0, msg=key)


def test_its_batch_and_a_report_are_kept(
    tokenizer: PreTrainedTokenizerFast, processor: ChorusProcessor, tmp_path: Path
) -> None:
    settings = {"gradient_accumulation_steps": 2, "save_strategy": "no"}
    trainer = trainer_of(tokenizer, processor, tmp_path, {12: 1e4, 14: torch.inf}, StepGuard(20), **settings)
    trainer.train()
    report = json.loads((tmp_path / "guards" / "report.json").read_text())
    assert [entry["step"] for entry in report] == [12, 14]
    assert float(report[0]["norm"]) > 20 * report[0]["typical_norm"] > 0
    with safe_open(tmp_path / "guards" / "step-12-rank-0.safetensors", framework="pt") as file:
        assert {"0.input_ids", "1.input_ids", "0.labels"} <= set(file.keys())
        assert file.metadata()["step"] == "12"
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


def pretend_float16(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> torch.amp.GradScaler:
    """Mixed precision with a loss scaler, which accelerate has for GPUs alone and torch for the CPU as well."""
    # With torch's first scale, 65,536, a gradient of 1 overflows.
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    monkeypatch.setattr(trainer.accelerator.state, "_mixed_precision", "fp16")
    trainer.accelerator.native_amp, trainer.accelerator.scaler = True, scaler
    return scaler


def test_an_overflow_in_float16_is_the_scalers(
    tokenizer: PreTrainedTokenizerFast, processor: ChorusProcessor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"max_steps": 3, "save_strategy": "no", "logging_steps": 1}
    trainer = trainer_of(tokenizer, processor, tmp_path, {2: 1e36}, StepGuard(20, max_skipped_steps=0), **settings)
    scaler = pretend_float16(trainer, monkeypatch)
    first = scaler.get_scale()
    trainer.train()
    # Skipped and scaled down once; the guard saw norms without the scale, and nothing to mind in them.
    assert scaler.get_scale() == first / 2
    assert trainer.num_skipped_steps == 0
    assert not (tmp_path / "guards").exists()
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "loss" in entry]
    assert [norm < 100 for norm in norms] == [True, False, True]
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


def test_in_bfloat16_the_guard_skips_what_is_not_finite(
    tokenizer: PreTrainedTokenizerFast, processor: ChorusProcessor, tmp_path: Path
) -> None:
    settings = {"max_steps": 3, "save_strategy": "no", "bf16": True}
    trainer = trainer_of(tokenizer, processor, tmp_path, {2: torch.inf}, StepGuard(), **settings)
    trainer.train()
    assert trainer.num_skipped_steps == 1
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


def test_too_many_end_the_run_with_a_report(
    tokenizer: PreTrainedTokenizerFast, processor: ChorusProcessor, tmp_path: Path
) -> None:
    spoiled = dict.fromkeys(range(5, 16), torch.nan)
    trainer = trainer_of(tokenizer, processor, tmp_path, spoiled, StepGuard(max_skipped_steps=2))
    with pytest.raises(
        TrainingBroke, match="3 of the last 7 steps were skipped, guards.max_skipped_steps is 2; step 7"
    ):
        trainer.train()
    assert len(list((tmp_path / "guards").glob("step-*.safetensors"))) == 3


def test_a_resumed_run_decides_as_an_uninterrupted_one(
    tokenizer: PreTrainedTokenizerFast, processor: ChorusProcessor, tmp_path: Path
) -> None:
    # Step 14 is above the ratio only beside the norms of the steps before the checkpoint.
    ends: list[nn.Module] = []
    for checkpoint in (None, str(tmp_path / "checkpoint-12")):
        trainer = trainer_of(tokenizer, processor, tmp_path, {3: torch.nan, 14: 1e3}, StepGuard(20))
        trainer.train(resume_from_checkpoint=checkpoint)
        assert trainer.num_skipped_steps == 2
        ends.append(trainer.model)
    assert_equal(*ends)


def test_the_running_norm_is_that_of_steps_that_were_taken() -> None:
    guard, memory = StepGuard(5), {}
    assert all(guard.admits(1.0, step, memory) for step in range(1, 10))
    # Nine norms are too few to call one large.
    assert guard.admits(100.0, 10, memory)
    assert not guard.admits(5.1, 11, memory)
    assert guard.admits(4.9, 12, memory)
    assert not guard.admits(float("nan"), 13, memory)
    assert [entry["step"] for entry in memory["skipped"]] == [11, 13]
    json.dumps(memory, allow_nan=False)


@pytest.mark.parametrize(("options", "message"), [({"norm_ratio": 1}, "above 1"), ({"max_skipped_steps": -1}, "negat")])
def test_settings_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StepGuard(**options)
