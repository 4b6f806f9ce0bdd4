"""The Trainer of `chorus-moe train`: whole checkpoints, rates by part and depth, guarded steps, more optimizers, token
accuracy."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from chorus_moe.training.checkpoints import WholeCheckpoints
from chorus_moe.training.guards.steps import FOLDER, StepGuard, keep_batch
from chorus_moe.training.rates import Rates, split_groups
from chorus_moe.training.recipe import PRODIGY
from chorus_moe.training.results.tokens import TokenAccuracy

MEMORY = "step_guard"


class ChorusTrainer(TokenAccuracy, WholeCheckpoints):
    """The Trainer with whole checkpoints and token accuracy, plus learning rates by part, a guard of its steps, and
    Prodigy.

    Args:
        rates: learning rates by part and depth; None for one rate.
        guard: which steps are skipped; None takes every step.
    """

    def __init__(self, *arguments: Any, rates: Rates | None = None, guard: StepGuard | None = None, **options: Any):
        self.rates, self.guard = rates, guard
        # The micro-batches of the step, kept until it is taken.
        self._batches: list[dict[str, Any]] = []
        super().__init__(*arguments, **options)

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: TrainingArguments, model: nn.Module | None = None) -> tuple[Any, Any]:
        """As in transformers, which does not have Prodigy."""
        if args.optim != PRODIGY:
            return WholeCheckpoints.get_optimizer_cls_and_kwargs(args, model)
        from prodigyopt import Prodigy

        settings = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
        return Prodigy, {"lr": args.learning_rate, "weight_decay": args.weight_decay, **settings}

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_new and self.rates is not None:
            trained = self.model if model is None else model
            split_groups(optimizer, trained, self.rates.of_parameters(trained, self.args.learning_rate))
        return optimizer

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *arguments: Any, **options: Any) -> Tensor:
        if self.guard is not None:
            self._batches.append(inputs)
        return super().training_step(model, inputs, *arguments, **options)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The last hook before the optimizer's step that knows the norm before clipping."""
        norm = super()._get_grad_norm(model, grad_norm)
        batches, self._batches = self._batches, []
        if self.guard is None or (self.accelerator.scaler is not None and not torch.isfinite(torch.as_tensor(norm))):
            # A gradient that overflowed in float16 is the scaler's: it skips the step and lowers its scale.
            return norm
        memory, step = self.state.stateful_callbacks.setdefault(MEMORY, {}), self.state.global_step + 1
        if not self.guard.admits(float(norm), step, memory):
            # What has no gradient stays as it is, moments and weight decay included, in every optimizer.
            self.model.zero_grad(set_to_none=True)
            folder, rank = Path(self.args.output_dir) / FOLDER, self.args.process_index
            keep_batch(folder / f"step-{step}-rank-{rank}.safetensors", batches, memory["skipped"][-1])
            self.guard.check(step, memory, folder)
        return norm

    @property
    def num_skipped_steps(self) -> int:
        return len(self.state.stateful_callbacks.get(MEMORY, {}).get("skipped", ()))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._take_average()
        super()._save_checkpoint(model, trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        self._take_average()
        super().save_model(output_dir, _internal_call)

    def _take_average(self) -> None:
        """Schedule-free optimizers train other weights than they answer with; only the latter are worth saving."""
        if callable(getattr(self.optimizer, "eval", None)):
            self.optimizer.eval()
