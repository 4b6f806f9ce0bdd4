"""The Trainer of a model that is spread over processes: its batches, its checkpoints, its steps."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers.trainer import SCHEDULER_NAME

from chorus_moe.training.checkpoints import WholeCheckpoints
from chorus_moe.training.loading import base_model
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
    """Whole checkpoints, whose weights and optimizer are written by all ranks where each has a share of them."""

    def __init__(self, *arguments: Any, **options: Any):
        args = options.get("args", arguments[1] if len(arguments) > 1 else None)
        model = options.get("model", arguments[0] if arguments else None)
        self._mesh: Any = None
        if args is None or not getattr(model, "is_distributed_loading_by_transformers", False):
            super().__init__(*arguments, **options)
            return
        # transformers refuses checkpoints of such models, of which it would write what rank 0 has. This class does not.
        kept, args.save_only_model = args.save_only_model, True
        try:
            super().__init__(*arguments, **options)
        finally:
            args.save_only_model = kept

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
        save_weights(weights_of(model), folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_spread:
            return super()._save_optimizer_and_scheduler(output_dir)
        save_optimizer(*optimizer_state(self.model, unwrapped(self.optimizer)), Path(output_dir))
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

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
        self.lr_scheduler.load_state_dict(torch.load(folder / SCHEDULER_NAME, weights_only=True))


def unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    return getattr(optimizer, "optimizer", optimizer)
