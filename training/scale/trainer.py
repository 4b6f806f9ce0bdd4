"""The Trainer of a model that is spread over processes: its batches, its checkpoints, its steps."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import SCHEDULER_NAME

from chorus_moe.training.checkpoints import WholeCheckpoints
from chorus_moe.training.loading import base_model
from chorus_moe.training.scale.background import BackgroundWriter
from chorus_moe.training.scale.ranks import num_copies, num_data_ranks, num_slices
from chorus_moe.training.scale.shards import (
    OPTIMIZER,
    load_adapter,
    load_optimizer,
    load_weights,
    optimizer_state,
    save_optimizer,
    save_settings,
    save_weights,
    weights_of,
)

ADAPTER = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)


class SpreadTrainer(WholeCheckpoints):
    """Whole checkpoints, whose weights and optimizer are written by all ranks where each has a share of them.

    Args:
        background_saves: write those of whole models from a copy, while the run goes on.
    """

    def __init__(self, *arguments: Any, background_saves: bool = False, **options: Any):
        args = options.get("args", arguments[1] if len(arguments) > 1 else None)
        model = options.get("model", arguments[0] if arguments else None)
        self._mesh: Any = None
        self._writer: BackgroundWriter | None = None
        # The checkpoint that is being written: its run and its name.
        self._unfinished: tuple[Path, str] | None = None
        if args is None or not getattr(model, "is_distributed_loading_by_transformers", False):
            super().__init__(*arguments, **options)
            return
        # transformers refuses checkpoints of such models, of which it would write what rank 0 has. This class does not.
        kept, args.save_only_model = args.save_only_model, True
        try:
            super().__init__(*arguments, **options)
        finally:
            args.save_only_model = kept
        if background_saves and base_model(self.model) is self.model:
            if args.load_best_model_at_end:
                raise ValueError("parallel.background: load_best_model_at_end may ask for a model not yet written")
            self._writer = BackgroundWriter()
            self.add_callback(FinishCheckpoints(self))

    @property
    def is_spread(self) -> bool:
        return bool(self.is_distributed_loading_by_transformers)

    def _build_accelerator_args(self, **options: Any) -> dict[str, Any]:
        built = super()._build_accelerator_args(**options)
        if self.args.device.type == "cpu" and built.get("parallelism_config") is not None:
            # accelerate refuses it on a CPU, where it needs to know no more than who sees the same rows.
            self._mesh = built.pop("parallelism_config")
        return built

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self._mesh is not None:
            self.accelerator.state.parallelism_config = self._mesh
            self.accelerator.state.device_mesh = self._mesh.get_device_mesh("cpu")
        if num_slices() > 1:
            # By which accelerate gives neighbours the same rows. Its own context parallelism is not entered: it is for
            # plain causal attention, without masks.
            sizes = (num_data_ranks(self.args), num_copies())
            mesh = init_device_mesh(self.args.device.type, sizes, mesh_dim_names=("dp_shard", "cp"))
            self.accelerator.state.device_mesh = mesh

    def get_tp_size(self) -> int:
        """Processes with the same rows, by which transformers divides what it counts over all."""
        return super().get_tp_size() * num_slices()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self.is_spread or state_dict is not None:
            super()._save(output_dir, state_dict)
            return
        folder, model = Path(output_dir or self.args.output_dir), base_model(self.model)
        if model is not self.model:
            # An adapter is small: one rank may hold all of it.
            state = get_model_state_dict(self.model, options=ADAPTER)
            if self.args.should_save:
                super()._save(output_dir, state)
            return
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            save_settings(model, folder)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)
        dist.barrier()
        if self._writer is None or not self._is_aside:
            save_weights(weights_of(model), folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_spread:
            return super()._save_optimizer_and_scheduler(output_dir)
        state = optimizer_state(self.model, unwrapped(self.optimizer))
        if self._writer is None:
            save_optimizer(*state, Path(output_dir))
        else:
            self._writer.begin(weights_of(self.model), *state, Path(output_dir))
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        # A DTensor's own number is that of this rank's share.
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.finish_checkpoint()
        super()._save_checkpoint(model, trial)

    def _finish_checkpoint(self, run: Path, name: str) -> None:
        if self._writer is not None and self._writer.is_writing:
            self._unfinished = run, name
        else:
            super()._finish_checkpoint(run, name)

    def finish_checkpoint(self, wait: bool = True) -> None:
        """Finish the checkpoint that is being written in the background, if there is one. Every rank must call it.

        Args:
            wait: False to leave it for later while a rank still writes.
        """
        if self._writer is None or self._unfinished is None or not (wait or self._writer.all_done()):
            return
        self._writer.settle()
        unfinished, self._unfinished = self._unfinished, None
        super()._finish_checkpoint(*unfinished)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self.is_spread:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        if base_model(self.model) is self.model:
            load_weights(self.model, Path(resume_from_checkpoint))
        else:
            load_adapter(self.model, Path(resume_from_checkpoint))

    def _read_states(self, checkpoint: str) -> None:
        folder = Path(checkpoint)
        if not (folder / OPTIMIZER).is_dir():
            if self.is_spread:
                raise ValueError(
                    f"{folder} has the optimizer of a run without fsdp or tensor in one file, which is not spread; "
                    "continue without them, or start a new run from these weights"
                )
            return super()._read_states(checkpoint)
        load_optimizer(self.model, unwrapped(self.optimizer), folder)
        saved, own = torch.load(folder / SCHEDULER_NAME, weights_only=True), self.lr_scheduler.state_dict()
        # Lists with an entry for each group of parameters, which are more where experts have a mesh of their own.
        lists = {name for name, value in saved.items() if isinstance(value, list) and isinstance(own.get(name), list)}
        self.lr_scheduler.load_state_dict({name: own[name] if name in lists else saved[name] for name in saved})


class FinishCheckpoints(TrainerCallback):
    """After each step, finishes the checkpoint that has been written meanwhile; at the end, waits for it."""

    def __init__(self, trainer: SpreadTrainer):
        self.trainer = trainer

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trainer.finish_checkpoint(wait=False)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.finish_checkpoint()


def unwrapped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Without accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)
