"""The Trainer of a private run.

Unusual here:
- an update draws its rows anew (Poisson sampling), `per_device_train_batch_size * gradient_accumulation_steps` of them
  on average, and deals them among the micro-batches: passes over the data in order would void the accounting;
- each row has its own forward and backward. So its gradient is exact for every parameter, stacked experts included,
  whatever is a mean over a batch is one over the row, and memory does not grow with the rows of an update;
- `max_grad_norm` clips each row's gradient, not the sum;
- logs, and so the card, hold nothing that was measured on the training rows, unless `log_unprotected` asks for it.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from chorus_moe.training.loading import base_model
from chorus_moe.training.privacy.arguments import PrivacyArguments, check_arguments
from chorus_moe.training.privacy.checks import check_private_run
from chorus_moe.training.privacy.ledger import PrivacyLedger, read_ledger, spent_before
from chorus_moe.training.privacy.optimizer import OPTIMIZERS, PrivateOptimizer, secret_generator
from chorus_moe.training.privacy.sampling import ROWS, PoissonBatches, RowByRow
from chorus_moe.training.trainer import ChorusTrainer

MEMORY = "privacy"
# Logged figures that are measured on training rows.
UNPROTECTED = ("loss", "train_loss", "grad_norm", "total_flos")


class PrivateTrainer(ChorusTrainer):
    """A `ChorusTrainer` with differential privacy of each training row.

    Args:
        privacy: how much may be spent, and how.
        private_seed: of rows and noise, for tests; a run with it is not private.

    Raises:
        ValueError: settings, a model or arguments with which the promise would not hold, see `checks.py`.
    """

    current_gradient_accumulation_steps: int

    def __init__(self, *arguments: Any, privacy: PrivacyArguments, private_seed: int | None = None, **options: Any):
        check_arguments(privacy)
        self.privacy, self.private_seed = privacy, private_seed
        # It would see gradients of rows; a row that breaks is left out by the optimizer.
        super().__init__(*arguments, **options | {"guard": None})
        if self.tasks is not None:
            raise ValueError("privacy beside tasks: rows would be drawn by their task, not alike and alone")
        check_private_run(self)
        self.expected_rows = self.args.train_batch_size * self.args.gradient_accumulation_steps
        num_rows = len(self.train_dataset)
        earlier = spent_before(getattr(base_model(self.model), "name_or_path", None))
        self.ledger = PrivacyLedger(privacy, num_rows, self.expected_rows / num_rows, earlier)
        # In front of the trackers and of what saves checkpoints.
        self.callback_handler.callbacks.insert(0, PrivacyCallback(self))

    def get_train_dataloader(self) -> DataLoader:
        num_rows = len(self.train_dataset)
        # A pass has as many updates as one over the rows in order would have.
        steps = -(-num_rows // self.expected_rows)
        generator = secret_generator(seed=self.private_seed)
        parts = self.args.gradient_accumulation_steps
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=PoissonBatches(num_rows, self.ledger.rate, steps, parts, generator),
            collate_fn=RowByRow(self.data_collator),
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
        )
        return self.accelerator.prepare(loader)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        # One that the caller gave, too.
        if not isinstance(_unwrapped(optimizer), PrivateOptimizer):
            self.optimizer = OPTIMIZERS[self.privacy.mechanism](
                optimizer,
                max_grad_norm=self.args.max_grad_norm,
                expected_rows=self.expected_rows,
                seed=self.private_seed,
            )
        return self.optimizer

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        parts, self.current_gradient_accumulation_steps = self.current_gradient_accumulation_steps, 1
        losses = [torch.zeros((), device=self.args.device)]
        for row in inputs[ROWS]:
            # Without a number of items the loss is the mean over the row's own labels.
            losses.append(super().training_step(model, row, None))
            _unwrapped(self.optimizer).add_row()
        self.current_gradient_accumulation_steps = parts
        # As the Trainer has it: micro-batches are summed.
        return torch.stack(losses).sum() / (max(1, len(losses) - 1) * parts)

    def _clip_grad_norm(self, model: nn.Module) -> None:
        """Rows are clipped one by one, when they come."""

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> float:
        """What there is to measure is not for the log."""
        return 0.0

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: the number says how long the drawn rows are."""
        return 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # Logs of an evaluation have neither.
        if "loss" in logs or "train_loss" in logs:
            logs |= {"epsilon": self.ledger.epsilon, "delta": self.ledger.delta}
            for name in () if self.privacy.log_unprotected else UNPROTECTED:
                # Without a loss nothing else is added that is measured on training rows.
                logs.pop(name, None)
        super().log(logs, start_time)


def _unwrapped(optimizer: Any) -> Any:
    """The optimizer below that of accelerate."""
    return getattr(optimizer, "optimizer", optimizer)


class PrivacyCallback(TrainerCallback):
    """Finds the noise of a run, counts its updates, and says what they spend."""

    def __init__(self, trainer: PrivateTrainer):
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        ledger, privacy = self.trainer.ledger, self.trainer.privacy
        if state.global_step:
            if MEMORY not in state.stateful_callbacks:
                raise ValueError(
                    f"the checkpoint of step {state.global_step} was trained without privacy, which no noise from here "
                    "on can give back; start a new run"
                )
            found = [state.stateful_callbacks[MEMORY], read_ledger(args.output_dir)]
            ledger.continue_from([entry for entry in found if entry is not None])
        steps = state.max_steps - state.global_step
        optimizer = _unwrapped(self.trainer.optimizer)
        optimizer.noise_multiplier = ledger.noise_of(steps)
        optimizer.attach_step_hook(self._count)
        state.stateful_callbacks[MEMORY] = ledger.state()
        before = f" after {ledger.num_updates:,} updates (epsilon {ledger.epsilon:.4g})" if ledger.num_updates else ""
        print(
            f"privacy: {privacy.mechanism}, noise {optimizer.noise_multiplier:.4g} x max_grad_norm "
            f"{args.max_grad_norm:g}, {steps:,} updates{before} of {self.trainer.expected_rows} in {ledger.num_rows:,} "
            f"rows on average, delta {ledger.delta:.3g}",
            file=sys.stderr,
        )

    def _count(self, optimizer: PrivateOptimizer) -> None:
        # Before the step: what was interrupted in between counts.
        self.trainer.ledger.take(float(optimizer.noise_multiplier))
        self.trainer.ledger.write(Path(self.trainer.args.output_dir))
        self.trainer.state.stateful_callbacks[MEMORY] = self.trainer.ledger.state()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        ledger = self.trainer.ledger
        broken = _unwrapped(self.trainer.optimizer).num_broken_rows
        lost = f"; gradients of {broken} rows were not finite and left out" if broken else ""
        print(f"privacy: spent epsilon {ledger.epsilon:.4g} at delta {ledger.delta:.3g}{lost}", file=sys.stderr)
        ledger.write(Path(args.output_dir))
