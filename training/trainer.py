"""The Trainer of `chorus-moe train`: whole checkpoints, rates by part and depth, guarded steps, more optimizers, token
accuracy."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from chorus_moe.training.guards.steps import FOLDER, StepGuard, keep_batch
from chorus_moe.training.objectives.objective import ClearGradients, Objective, ObjectiveTerms
from chorus_moe.training.rates import Rates, split_groups
from chorus_moe.training.recipe import PRODIGY
from chorus_moe.training.results.tokens import TokenAccuracy
from chorus_moe.training.scale.trainer import SpreadTrainer
from chorus_moe.training.tasks.learning import TaskLearning
from chorus_moe.training.tasks.plan import TaskPlan

MEMORY = "step_guard"


class ChorusTrainer(TokenAccuracy, SpreadTrainer):
    """The Trainer with whole checkpoints and token accuracy, plus rates by part, a guard of its steps, tasks, more
    objectives, and Prodigy.

    Args:
        rates: learning rates by part and depth; None for one rate.
        guard: which steps are skipped; None takes every step.
        tasks: the tasks of the rows, see `plan_tasks`; None for rows of one kind.
        objectives: further terms of the loss. Logs get the mean of each by its name.
    """

    def __init__(
        self,
        *arguments: Any,
        rates: Rates | None = None,
        guard: StepGuard | None = None,
        tasks: TaskPlan | None = None,
        objectives: Sequence[Objective] = (),
        **options: Any,
    ):
        self.rates, self.guard = rates, guard
        # The micro-batches of the step, kept until it is taken.
        self._batches: list[dict[str, Any]] = []
        super().__init__(*arguments, **options)
        self.tasks = TaskLearning(tasks, self) if tasks is not None else None
        if self.tasks is not None:
            self.add_callback(self.tasks)
            objectives = [*objectives, *self.tasks.objectives]
        self.objectives = ObjectiveTerms(objectives).to(self.args.device)
        for objective in objectives:
            objective.check(self.model, self.processing_class)
        if objectives:
            self.add_callback(ClearGradients(self.objectives))

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: TrainingArguments, model: nn.Module | None = None) -> tuple[Any, Any]:
        """As in transformers, which does not have Prodigy."""
        if args.optim != PRODIGY:
            return SpreadTrainer.get_optimizer_cls_and_kwargs(args, model)
        from prodigyopt import Prodigy

        settings = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
        return Prodigy, {"lr": args.learning_rate, "weight_decay": args.weight_decay, **settings}

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_new and self.rates is not None:
            trained = self.model if model is None else model
            split_groups(optimizer, trained, self.rates.of_parameters(trained, self.args.learning_rate))
        for objective in self.objectives.objectives if is_new else ():
            if own := list(objective.parameters()):
                if self.is_spread:
                    raise ValueError(
                        f"{objective.name} learns parameters of its own, which fsdp and tensor do not spread"
                    )
                rate = objective.learning_rate or self.args.learning_rate
                optimizer.add_param_group({"params": own, "lr": rate, "weight_decay": 0.0})
        return optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        # Evaluation reports the model's own loss alone.
        compute = super().compute_loss
        if not model.training or (self.tasks is None and not len(self.objectives)):
            return compute(model, inputs, return_outputs, num_items_in_batch)
        asked = {name: value for name, value in inputs.items() if name not in self.objectives.columns}
        asked |= self.objectives.forward_options()
        if self.tasks is not None:
            model = self.tasks.model_for(model)
            loss, outputs = self.tasks.compute_loss(compute, model, asked, num_items_in_batch)
        else:
            loss, outputs = compute(model, asked, True, num_items_in_batch)
        share, ranks = 1.0, 1
        if self.model_accepts_loss_kwargs and num_items_in_batch is not None:
            # The Trainer does not divide by the number of micro-batches then.
            share = 1 / self.current_gradient_accumulation_steps
            if self.args.average_tokens_across_devices:
                ranks = self.accelerator.num_processes // self.get_tp_size()
        if len(self.objectives):
            terms = self.objectives.loss(model, inputs, outputs, share, num_items_in_batch, ranks)
            loss = loss + terms.to(loss.device)
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *arguments: Any, **options: Any) -> Tensor:
        if self.guard is not None:
            self._batches.append(inputs)
        loss = super().training_step(model, inputs, *arguments, **options)
        if self.tasks is not None and self.accelerator.sync_gradients:
            self.tasks.end_step()
        return loss

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        prepared = super()._prepare_inputs(inputs)
        if self.tasks is not None:
            self.tasks.take_tasks(prepared)
        return prepared

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return super()._get_train_sampler(train_dataset) if self.tasks is None else self.tasks.sampler

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The last hook before the optimizer's step that knows the norm before clipping."""
        norm = super()._get_grad_norm(model, grad_norm)
        if self.objectives.objectives:
            # They count, so that the guard sees a term that breaks.
            norm = math.hypot(float(norm), self.objectives.settle_gradients(self.args.max_grad_norm))
        batches, self._batches = self._batches, []
        if self.guard is None or (self.accelerator.scaler is not None and not torch.isfinite(torch.as_tensor(norm))):
            # A gradient that overflowed in float16 is the scaler's: it skips the step and lowers its scale.
            return norm
        memory, step = self.state.stateful_callbacks.setdefault(MEMORY, {}), self.state.global_step + 1
        if not self.guard.admits(float(norm), step, memory):
            # What has no gradient stays as it is, moments and weight decay included, in every optimizer.
            self.model.zero_grad(set_to_none=True)
            self.objectives.zero_grad(set_to_none=True)
            folder, rank = Path(self.args.output_dir) / FOLDER, self.args.process_index
            keep_batch(folder / f"step-{step}-rank-{rank}.safetensors", batches, memory["skipped"][-1])
            self.guard.check(step, memory, folder)
        return norm

    @property
    def num_skipped_steps(self) -> int:
        return len(self.state.stateful_callbacks.get(MEMORY, {}).get("skipped", ()))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # Logs of an evaluation have no "loss".
        if "loss" in logs:
            logs |= self.objectives.take_means()
            logs |= self.tasks.take_figures() if self.tasks is not None else {}
        super().log(logs, start_time)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            self.objectives.save(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.objectives.load(checkpoint)

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
