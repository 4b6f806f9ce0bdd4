"""Checkpoints that are whole or not there, and a Trainer that writes them.

A checkpoint is written into `_incomplete/checkpoint-N`, then gets a manifest (names, sizes and SHA-256 of its files),
and is renamed last. So a kill or a full disk leaves no folder that looks like a checkpoint and is none, and what was
damaged later is found before a run continues from it.

Unusual here: what the optimizer and the scheduler would take from a checkpoint over the arguments of the new run
(learning rate, weight decay, betas, epsilon; steps between savings, evaluations, logs) is what the arguments say.
"""

import hashlib
import json
import os
import re
import shutil
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from chorus_moe.modeling.modeling_base import make_readable
from chorus_moe.training.saving import INCOMPLETE, begin_aside, drop_aside, files_below, put_on_disk, take_places
from chorus_moe.training.scale.ranks import num_data_ranks

MANIFEST = "manifest.json"
STATE = "trainer_state.json"
# What a run needs to continue -> names of which one must be there. DeepSpeed keeps all but the random numbers and the
# Trainer's state in `global_step*`, FSDP its weights and its optimizer in folders.
PARTS = {
    STATE: (STATE,),
    "weights": (
        *("model*.safetensors", "adapter_model*.safetensors", "*/adapter_model*.safetensors"),
        *("pytorch_model_fsdp*", "global_step*"),
    ),
    "optimizer.pt": ("optimizer.pt", "optimizer.bin", "optimizer_*", "global_step*"),
    "scheduler.pt": ("scheduler.pt", "global_step*"),
    "rng_state.pth": ("rng_state*.pth",),
}
# Settings of an optimizer's groups that arguments give and a saved state would bring back; `initial_lr` is the
# scheduler's. Others, such as `k` of schedule-free optimizers, are state.
ASKED = {
    "initial_lr": "learning_rate",
    "weight_decay": "weight_decay",
    "betas": "adam_beta1, adam_beta2",
    "eps": "adam_epsilon",
}


def numbered_checkpoints(folder: Path) -> list[Path]:
    """The folders `checkpoint-N` of a run, in the order of their steps, whole or not."""
    found = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir() and step_of(path) is not None]
    return sorted(found, key=lambda path: step_of(path) or 0)


def step_of(checkpoint: Path) -> int | None:
    match = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", checkpoint.name)
    return int(match[1]) if match else None


def newest_whole(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint of a run that is whole, and what is wrong with each newer one."""
    faults: list[str] = []
    for checkpoint in reversed(numbered_checkpoints(folder)):
        fault = fault_of(checkpoint)
        if fault is None:
            return checkpoint, faults
        faults.append(f"{checkpoint.name} {fault}")
    return None, faults


def fault_of(checkpoint: Path) -> str | None:
    """Why a run cannot continue from a checkpoint, as in "lacks optimizer.pt"; None if it can.

    Reads every byte. Checkpoints without a manifest, as the stock Trainer writes them, must open.
    """
    if not checkpoint.is_dir():
        return "is not there"
    faults = _against_manifest(checkpoint) if (checkpoint / MANIFEST).is_file() else _damaged(checkpoint)
    faults += [
        f"lacks {part}"
        for part, names in PARTS.items()
        if not any(path for name in names for path in checkpoint.glob(name))
    ]
    return faults[0] if faults else _wrong_step(checkpoint)


def _against_manifest(checkpoint: Path) -> list[str]:
    try:
        files = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"].items()
    except (ValueError, KeyError, AttributeError, TypeError):
        return [f"has a {MANIFEST} that cannot be read"]
    faults = [f"lacks {name}" for name, _ in files if not (checkpoint / name).is_file()]
    # Sizes of all before the hash of any: most damage shows in no time.
    for name, entry in files if not faults else ():
        size = (checkpoint / name).stat().st_size
        if size != entry["size"]:
            faults.append(f"has {name} with {size:,} bytes, its manifest says {entry['size']:,}")
    for name, entry in files if not faults else ():
        if digest(checkpoint / name) != entry["sha256"]:
            return [f"has {name} with another SHA-256 than its manifest says"]
    return faults


def digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _unreadable(path: Path) -> str | None:
    """Whether a file is damaged, as far as it can tell itself: length of weights, sums of what torch wrote, JSON."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):
                pass
        elif path.suffix in (".pt", ".pth", ".bin"):
            with zipfile.ZipFile(path) as archive:
                if archive.testzip() is not None:
                    return f"has {path.name} with a wrong checksum"
        elif path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
    except (SafetensorError, zipfile.BadZipFile, ValueError, EOFError, OSError):
        return f"has {path.name} cut short or damaged"
    return None


def _damaged(checkpoint: Path) -> list[str]:
    """What is wrong with a checkpoint that has no manifest: files that do not open, shards that are not there."""
    faults = [fault for path in files_below(checkpoint) if (fault := _unreadable(path))]
    names: set[str] = set()
    for index in checkpoint.glob("*.safetensors.index.json") if not faults else ():
        names |= set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return faults + [f"lacks {name}" for name in sorted(names) if not (checkpoint / name).is_file()]


def _wrong_step(checkpoint: Path) -> str | None:
    # A folder that was renamed or copied by hand holds another step than its name says.
    found, step = json.loads((checkpoint / STATE).read_text(encoding="utf-8")).get("global_step"), step_of(checkpoint)
    return None if step is None or found == step else f"holds step {found}"


def write_manifest(checkpoint: Path, arguments: TrainingArguments) -> None:
    """List the files of a finished checkpoint, and the arguments that decide which rows come next and what the
    optimizer's state means."""
    for path in files_below(checkpoint):
        make_readable(path)
        # Before an older checkpoint is removed.
        put_on_disk(path)
    files = {
        path.relative_to(checkpoint).as_posix(): {"size": path.stat().st_size, "sha256": digest(path)}
        for path in files_below(checkpoint)
    }
    values = {"version": 1, "arguments": fixed_arguments(arguments), "files": files}
    (checkpoint / MANIFEST).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    put_on_disk(checkpoint / MANIFEST)


def fixed_arguments(arguments: TrainingArguments) -> dict[str, Any]:
    """Arguments that a run keeps when it continues. `rows_per_step` counts all ranks and accumulated batches."""
    rows = arguments.train_batch_size * arguments.gradient_accumulation_steps * num_data_ranks(arguments)
    return {
        # The fused one is the same optimizer.
        "optim": str(getattr(arguments.optim, "value", arguments.optim)).removesuffix("_fused"),
        "lr_scheduler_type": str(getattr(arguments.lr_scheduler_type, "value", arguments.lr_scheduler_type)),
        "lr_scheduler_kwargs": dict(arguments.lr_scheduler_kwargs or {}),
        "seed": arguments.seed,
        "data_seed": arguments.data_seed,
        "rows_per_step": rows,
    }


def saved_arguments(checkpoint: Path) -> dict[str, Any]:
    """`fixed_arguments` of the run that wrote a checkpoint; empty without a manifest."""
    path = checkpoint / MANIFEST
    return json.loads(path.read_text(encoding="utf-8"))["arguments"] if path.is_file() else {}


class AskedSteps(TrainerCallback):
    """Steps between savings, evaluations and logs are those of the arguments; the Trainer's are the checkpoint's."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        state.compute_steps(args, state.max_steps)


class WholeCheckpoints(Trainer):
    """The stock Trainer, whose checkpoints and saved models are whole or not there, and whose arguments hold for a
    resumed run. For a trainer of your own: `class MyTrainer(WholeCheckpoints, SFTTrainer)`."""

    # Whether a checkpoint is being written.
    _is_aside = False

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.add_callback(AskedSteps)

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, INCOMPLETE) if self._is_aside else folder

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        run, name = Path(self._get_output_dir(trial)), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        aside = run / INCOMPLETE / name
        if self.args.should_save:
            # Of a run that was killed while it wrote.
            shutil.rmtree(run / INCOMPLETE, ignore_errors=True)
        # No rank may write before that.
        self.accelerator.wait_for_everyone()
        self._is_aside = True
        try:
            super()._save_checkpoint(model, trial)
            self._name_best(run, aside)
        except BaseException:
            drop_aside(aside)
            raise
        finally:
            self._is_aside = False
        self._finish_checkpoint(run, name)

    def _finish_checkpoint(self, run: Path, name: str) -> None:
        """Give the checkpoint that lies aside its manifest and its name, and remove older ones."""
        aside = run / INCOMPLETE / name
        # Each rank has written its random state.
        self.accelerator.wait_for_everyone()
        # The first rank; then the first one of each machine, where the disk is its own and a part still lies there.
        for writes in (self.is_world_process_zero(), self.is_local_process_zero()):
            if writes and aside.is_dir():
                write_manifest(aside, self.args)
                _rename(aside, run / name)
            self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(run / name))
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=str(run),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    def _name_best(self, run: Path, aside: Path) -> None:
        """The state names the best checkpoint as it will be called, not where it is being written."""
        step = self.state.best_global_step
        if not step:
            return
        best = run / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        if step == self.state.global_step or best.is_dir():
            self.state.best_model_checkpoint = str(best)
            if self.args.should_save:
                self.state.save_to_json(str(aside / STATE))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # The upload goes on in the background: it must find the files under the final name.
        if not self._is_aside:
            super()._push_from_checkpoint(checkpoint_folder)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in transformers; what the folder holds stays until the new model is written."""
        folder = output_dir or self.args.output_dir
        if self._is_aside:
            return super().save_model(folder, _internal_call=True)
        aside = Path(folder) / INCOMPLETE / "model"
        if self.args.should_save:
            begin_aside(folder, "model")
        try:
            super().save_model(str(aside), _internal_call=True)
        except BaseException:
            drop_aside(aside)
            raise
        # With these all ranks save. Otherwise only the first one is sure to be here.
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            self.accelerator.wait_for_everyone()
        if self.args.should_save:
            take_places(aside, folder)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        # DeepSpeed loads its own optimizer, with its own settings.
        if checkpoint is None or self.is_deepspeed_enabled:
            return super()._load_optimizer_and_scheduler(checkpoint)
        groups = self.optimizer.param_groups
        asked = [{name: group[name] for name in ASKED if name in group} for group in groups]
        self._read_states(checkpoint)
        # Loading makes new groups.
        changed = _put_back(asked, self.optimizer.param_groups)
        _put_back_rates(self.lr_scheduler, asked, self.optimizer.param_groups)
        if changed and self.is_world_process_zero():
            print(f"{Path(checkpoint).name}: the run continues with {'; '.join(changed)}", file=sys.stderr)

    def _read_states(self, checkpoint: str) -> None:
        """The states of optimizer and scheduler, with the settings they were saved with."""
        super()._load_optimizer_and_scheduler(checkpoint)


def _put_back(asked: Iterable[dict[str, Any]], groups: Iterable[dict[str, Any]]) -> list[str]:
    """Write asked settings into an optimizer's groups; returns each change once, as in "learning_rate 0.1 -> 0.2"."""
    changed: dict[str, None] = {}
    for settings, group in zip(asked, groups, strict=True):
        for name, value in settings.items():
            found = group.get(name)
            if found != value:
                changed[f"{ASKED[name]} {found} -> {value}"] = None
                if name == "initial_lr" and found:
                    # The rate of the moment, for a scheduler that cannot tell it from the step.
                    group["lr"] = group["lr"] * value / found
                group[name] = value
    return list(changed)


def _put_back_rates(scheduler: Any, asked: list[dict[str, Any]], groups: list[dict[str, Any]]) -> None:
    if not hasattr(scheduler, "base_lrs"):
        return
    scheduler.base_lrs = [group.get("initial_lr", base) for group, base in zip(asked, scheduler.base_lrs, strict=True)]
    if isinstance(scheduler, LambdaLR):
        # Also for another warmup or number of steps: the saved rate is the old schedule's.
        for group, base, schedule in zip(groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
            group["lr"] = base * schedule(scheduler.last_epoch)
    scheduler._last_lr = [group["lr"] for group in groups]


def _rename(aside: Path, target: Path) -> None:
    """Give a finished checkpoint its name, instead of one that a run from an earlier checkpoint finds there."""
    old = aside.with_name(f"replaced-{target.name}")
    if target.exists():
        os.replace(target, old)
    os.replace(aside, target)
    drop_aside(old)
