"""A checkpoint is whole or not there, a run continues from the newest whole one, and its arguments hold."""

import errno
import hashlib
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

from chorus_moe import ChorusProcessor
from chorus_moe.training.checkpoints import WholeCheckpoints, fault_of, newest_whole, numbered_checkpoints
from chorus_moe.training.collator import ChorusDataCollator
from chorus_moe.training.recipe import TRAINER_SETTINGS
from tests.fake_hub import FakeHub
from tests.fresh_process import run_fresh
from tests.training.conftest import make_model, make_rows

SETTINGS: dict[str, Any] = {
    **{"report_to": "none", "use_cpu": True, "disable_tqdm": True, "max_steps": 4, "save_steps": 2},
    **{"per_device_train_batch_size": 2, "learning_rate": 1e-2, **TRAINER_SETTINGS},
}


def trainer_of(
    tokenizer: PreTrainedTokenizerFast,
    processor: ChorusProcessor,
    folder: Path,
    kind: type[Trainer] = WholeCheckpoints,
    **settings: Any,
) -> Any:
    rows = make_rows(6)
    return kind(
        make_model(tokenizer, attention_dropout=0.1),
        TrainingArguments(str(folder), **SETTINGS | settings),
        data_collator=ChorusDataCollator(processor),
        train_dataset=rows,
        eval_dataset=rows[:2],
        processing_class=processor,
    )


@pytest.fixture
def run(tokenizer: PreTrainedTokenizerFast, processor: ChorusProcessor, tmp_path: Path) -> Path:
    trainer_of(tokenizer, processor, tmp_path / "run").train()
    return tmp_path / "run"


def test_the_manifest_lists_every_file_with_its_hash(run: Path) -> None:
    assert [path.name for path in sorted(run.iterdir())] == ["checkpoint-2", "checkpoint-4"]
    folder = run / "checkpoint-4"
    files = json.loads((folder / "manifest.json").read_text())["files"]
    assert files.keys() == {path.name for path in folder.iterdir()} - {"manifest.json"}
    for name, entry in files.items():
        data = (folder / name).read_bytes()
        assert entry == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    modes = {path.stat().st_mode for path in folder.iterdir()}
    assert len(modes) == 1
    assert fault_of(folder) is None


PARTS = ["optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors", "trainer_state.json"]


@pytest.mark.parametrize("has_manifest", [True, False])
@pytest.mark.parametrize("name", PARTS)
def test_a_damaged_part_gives_way_to_the_checkpoint_before(run: Path, name: str, has_manifest: bool) -> None:
    path = run / "checkpoint-4" / name
    data = path.read_bytes()
    if not has_manifest:
        (run / "checkpoint-4" / "manifest.json").unlink()
    path.unlink()
    lacking = "weights" if name == "model.safetensors" and not has_manifest else name
    assert newest_whole(run) == (run / "checkpoint-2", [f"checkpoint-4 lacks {lacking}"])
    path.write_bytes(data[: len(data) // 2])
    found, faults = newest_whole(run)
    assert found == run / "checkpoint-2" and f"checkpoint-4 has {name}" in faults[0]
    # One bit: only a sum over the bytes shows it; a file of weights without a manifest has none.
    damaged = bytearray(data)
    damaged[len(data) * 2 // 3] ^= 1
    path.write_bytes(damaged)
    if has_manifest:
        assert newest_whole(run)[1] == [f"checkpoint-4 has {name} with another SHA-256 than its manifest says"]
    path.write_bytes(data)
    assert newest_whole(run) == (run / "checkpoint-4", [])


def test_a_folder_with_another_name_is_no_checkpoint_of_that_step(run: Path) -> None:
    shutil.copytree(run / "checkpoint-2", run / "checkpoint-6")
    assert newest_whole(run) == (run / "checkpoint-4", ["checkpoint-6 holds step 2"])


def test_a_full_disk_leaves_no_half_checkpoint(
    tokenizer: PreTrainedTokenizerFast, processor: ChorusProcessor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(tokenizer, processor, tmp_path)

    def full(self: Any, folder: str) -> None:
        if self.state.global_step == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        Trainer._save_rng_state(self, folder)

    monkeypatch.setattr(WholeCheckpoints, "_save_rng_state", full)
    with pytest.raises(OSError, match="No space left"):
        trainer.train()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    assert fault_of(tmp_path / "checkpoint-2") is None


KILLED = """
import os, signal, sys
from pathlib import Path
from chorus_moe.surgery import processor_from_config
from chorus_moe.training import checkpoints
from tests.training.conftest import make_model, make_tokenizer
from tests.training.test_checkpoints import trainer_of

folder, name = Path(sys.argv[1]), sys.argv[2]
tokenizer = make_tokenizer()
processor = processor_from_config(make_model(tokenizer).config, tokenizer)
trainer = trainer_of(tokenizer, processor, folder)
original = getattr(trainer, name, None) or getattr(checkpoints, name)

def die(*arguments):
    if trainer.state.global_step == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments)

setattr(trainer if hasattr(trainer, name) else checkpoints, name, die)
trainer.train()
"""


@pytest.mark.parametrize("where", ["_save_optimizer_and_scheduler", "write_manifest"])
def test_a_kill_while_saving_leaves_the_checkpoint_before(
    where: str, tokenizer: PreTrainedTokenizerFast, processor: ChorusProcessor, tmp_path: Path
) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = run_fresh(KILLED, [str(tmp_path), where], cwd=tmp_path, environment=environment)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (tmp_path / "_incomplete" / "checkpoint-4" / "model.safetensors").is_file()
    assert newest_whole(tmp_path) == (tmp_path / "checkpoint-2", [])
    # The run goes on to the same end as one that nothing interrupted, and clears what the kill left.
    trainer = trainer_of(tokenizer, processor, tmp_path)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    whole = trainer_of(tokenizer, processor, tmp_path / "other", save_strategy="no")
    whole.train()
    for one, other in zip(trainer.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert not (tmp_path / "_incomplete").exists()


def test_the_best_checkpoint_has_its_final_name_and_survives_rotation(
    tokenizer: PreTrainedTokenizerFast, processor: ChorusProcessor, tmp_path: Path
) -> None:
    best = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "save_total_limit": 2}
    best |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    # The loss falls, and the largest counts as best: an early step is to be kept beside the last.
    trainer = trainer_of(tokenizer, processor, tmp_path, **best)
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    step = losses.index(max(losses)) + 1
    assert step < 4
    expected = str(tmp_path / f"checkpoint-{step}")
    assert trainer.state.best_model_checkpoint == expected
    kept = numbered_checkpoints(tmp_path)
    assert {path.name for path in kept} == {f"checkpoint-{step}", "checkpoint-4"} and len(kept) <= 2
    for folder in kept:
        assert json.loads((folder / "trainer_state.json").read_text())["best_model_checkpoint"] == expected
    assert trainer.evaluate()["eval_loss"] == pytest.approx(max(losses), abs=1e-6)


@pytest.mark.slow
def test_pushes_while_training_carry_whole_checkpoints(
    fake_hub: FakeHub, tokenizer: PreTrainedTokenizerFast, processor: ChorusProcessor, tmp_path: Path
) -> None:
    push = {"push_to_hub": True, "hub_model_id": "tester/run", "hub_strategy": "all_checkpoints"}
    trainer = trainer_of(tokenizer, processor, tmp_path, hub_always_push=True, **push)
    trainer.train()
    files = fake_hub.files("tester/run")
    assert not [name for name in files if "_incomplete" in name]
    for step in (2, 4):
        folder = tmp_path / f"checkpoint-{step}"
        for path in folder.iterdir():
            assert files[f"checkpoint-{step}/{path.name}"] == path.read_bytes()
    assert files["model.safetensors"] == (tmp_path / "checkpoint-4" / "model.safetensors").read_bytes()


APPLIED = {
    "learning_rate": (3e-3, lambda group: group["initial_lr"]),
    "weight_decay": (0.3, lambda group: group["weight_decay"]),
    "adam_beta2": (0.9, lambda group: group["betas"][1]),
    "adam_epsilon": (1e-4, lambda group: group["eps"]),
}


@pytest.mark.parametrize("name", APPLIED)
def test_an_optimizers_setting_is_applied_to_a_resumed_run_and_said(
    name: str,
    run: Path,
    tokenizer: PreTrainedTokenizerFast,
    processor: ChorusProcessor,
    capsys: pytest.CaptureFixture[str],
) -> None:
    value, read = APPLIED[name]
    trainer = trainer_of(tokenizer, processor, run, max_steps=4, save_strategy="no", **{name: value})
    trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    # The first group decays, the second (norms, biases) does not.
    assert read(trainer.optimizer.param_groups[0]) == value
    said = capsys.readouterr().err
    assert "checkpoint-2: the run continues with" in said and name in said and str(value) in said.split("->")[1]


def test_the_rate_of_a_resumed_step_is_the_new_schedules(
    run: Path, tokenizer: PreTrainedTokenizerFast, processor: ChorusProcessor
) -> None:
    trainer = trainer_of(tokenizer, processor, run, logging_steps=1, save_strategy="no", learning_rate=4e-3)
    trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    rates = {entry["step"]: entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry}
    # Linear decay from 4e-3 to 0 in 4 steps; the log of a step shows the rate that it used.
    assert rates[3] == pytest.approx(4e-3 * 2 / 4) and rates[4] == pytest.approx(4e-3 * 1 / 4)


def test_an_unchanged_run_says_nothing_and_other_steps_between_savings_hold(
    run: Path, tokenizer: PreTrainedTokenizerFast, processor: ChorusProcessor, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = trainer_of(tokenizer, processor, run, max_steps=4, save_steps=1)
    trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    assert "continues with" not in capsys.readouterr().err
    assert [path.name for path in numbered_checkpoints(run)] == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]
