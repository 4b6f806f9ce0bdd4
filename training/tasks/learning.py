"""Tasks inside the Trainer: which rows come next, what their losses weigh, and the figures of each task in the log.

All that a resumed run must know lies in the Trainer's state (settings, losses of windows) or follows from seed, epoch
and step (rows, PCGrad's order).
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from chorus_moe.modeling.modeling_generation import ChorusForConditionalGeneration
from chorus_moe.training.collator import MoreColumns, Row
from chorus_moe.training.layouts import TASK
from chorus_moe.training.loading import base_model
from chorus_moe.training.objectives.objective import Objective
from chorus_moe.training.releases import CHECKPOINTING
from chorus_moe.training.tasks.conflicts import TaskGradients
from chorus_moe.training.tasks.losses import TaskLoss
from chorus_moe.training.tasks.plan import TaskPlan
from chorus_moe.training.tasks.sampler import TaskSampler
from chorus_moe.training.tasks.weights import RateWeights, UncertaintyWeights

MEMORY = "tasks"
TASK_IDS = "task_ids"


def task_columns(names: Sequence[str]) -> MoreColumns:
    """For the collator: batches then have `task_ids` `(B,)`, the place of each row's `task` among the names or -1. The
    Trainer takes them out."""
    # No closure: a worker process that is spawned must be able to unpickle it.
    return partial(_task_ids, {name: number for number, name in enumerate(names)})


def _task_ids(numbers: Mapping[str, int], rows: Sequence[Row], batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # The one row of a batch of which nothing could be read has no task.
    return {TASK_IDS: torch.tensor([numbers.get(str(row.get(TASK)), -1) for row in rows] or [-1])}


def check_memory(plan: TaskPlan | None, remembered: Mapping[str, Any]) -> None:
    """Refuse the checkpoint of a run with other tasks: its rows would come in another order, its state mean others.

    Args:
        remembered: `stateful_callbacks` of the Trainer's state.

    Raises:
        ValueError: naming what differs, with both values.
    """
    saved = remembered.get(MEMORY, {}).get("settings", {})
    settings = plan.settings if plan is not None else dict.fromkeys(saved)
    for name, value in settings.items():
        if saved.get(name) != value:
            raise ValueError(
                f"tasks: the checkpoint is of a run with {name}={saved.get(name)!r}, now it is {value!r}: start a new "
                "run from these weights"
            )


class TaskLearning(TrainerCallback):
    """What `ChorusTrainer` asks at each step of a run with tasks.

    Logs `task_loss/TASK`, the plain loss of a token in training; `task_weight/TASK` where weights change; and
    `grad_cosine/BANK/TASK-TASK` where each task's gradient is taken by itself.

    Args:
        plan: of the Trainer's rows.
        trainer: it reads the model, the arguments and the optimizer from it.

    Raises:
        ValueError: another number of rows than the plan has, a model without a language loss, or a Trainer whose
            gradients or whose order of rows cannot be had by task.
    """

    def __init__(self, plan: TaskPlan, trainer: Trainer):
        self.plan, self.trainer = plan, trainer
        self._check()
        seed = trainer.args.seed if trainer.args.data_seed is None else trainer.args.data_seed
        self.sampler = TaskSampler(plan, seed)
        is_learned = plan.arguments.task_weighting == "uncertainty"
        self.uncertainty = UncertaintyWeights(plan) if is_learned else None
        self.rate: RateWeights | None = None
        self.gradients: TaskGradients | None = None
        self.loss: TaskLoss | None = None
        # The tasks of the rows of the micro-batch.
        self.task_B: Tensor | None = None
        # Sums of losses and numbers of tokens by task: of the step, and since the last log.
        self._of_step, self._logged = torch.zeros(2, len(plan.names)), torch.zeros(2, len(plan.names))

    def _check(self) -> None:
        trainer, given = self.trainer, self.plan.arguments
        base, arguments = base_model(trainer.model), trainer.args
        if not isinstance(base, ChorusForConditionalGeneration):
            raise ValueError(f"tasks: {type(base).__name__} predicts no tokens, so there is no loss to divide by task")
        rows: Any = trainer.train_dataset
        count = len(rows) if hasattr(rows, "__len__") else "a stream"
        if count != self.plan.num_rows:
            raise ValueError(f"tasks: the plan is for {self.plan.num_rows} rows, the Trainer has {count}")
        if arguments.train_sampling_strategy != "random":
            raise ValueError(
                f"tasks: training.train_sampling_strategy={arguments.train_sampling_strategy!r} orders the rows, which "
                "tasks do by their temperature; leave it out"
            )
        if arguments.n_gpu > 1:
            raise ValueError(f"tasks: {arguments.n_gpu} GPUs in one process; start one process a GPU with torchrun")
        is_fsdp = trainer.is_fsdp_enabled or getattr(trainer, "is_spread", False)
        sharded = "FSDP" if is_fsdp else "DeepSpeed" if trainer.is_deepspeed_enabled else None
        if sharded and given.task_weighting == "uncertainty":
            raise ValueError(
                f"tasks.task_weighting=uncertainty trains numbers beside the model, which {sharded} does not know; "
                "choose fixed or rate"
            )
        checkpointing = getattr(arguments, f"{CHECKPOINTING}_kwargs") or {}
        if getattr(arguments, CHECKPOINTING) and checkpointing.get("use_reentrant"):
            sharded = sharded or f"{CHECKPOINTING}_kwargs with use_reentrant"
        if sharded and given.task_conflicts != "none":
            raise ValueError(
                f"tasks.task_conflicts={given.task_conflicts} takes the gradient of each task by itself, which "
                f"{sharded} does not allow; set it to none"
            )

    @property
    def objectives(self) -> list[Objective]:
        """What is trained beside the model."""
        return [] if self.uncertainty is None else [self.uncertainty]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        base = base_model(self.trainer.model)
        # Around what label smoothing may have put there.
        replaced = base.loss_function
        replaced = replaced.replaced if isinstance(replaced, TaskLoss) else replaced
        self.loss = TaskLoss(replaced, len(self.plan.names), args.label_smoothing_factor)
        base.loss_function = self.loss
        memory = self._memory(state)
        if self.plan.arguments.task_weighting == "rate":
            self.rate = RateWeights(self.plan, memory.setdefault("rate", {}))
        if self.plan.arguments.task_conflicts != "none":
            method = self.plan.arguments.task_conflicts
            self.gradients = TaskGradients(self.plan.names, self._trained(), method, args.seed)
        self._of_step, self._logged = self._of_step.to(args.device), self._logged.to(args.device)

    def _memory(self, state: TrainerState) -> dict[str, Any]:
        """What the checkpoint remembers, or a new memory at the first step."""
        if state.global_step == 0:
            state.stateful_callbacks[MEMORY] = {"settings": self.plan.settings}
        check_memory(self.plan, state.stateful_callbacks)
        return state.stateful_callbacks[MEMORY]

    def _trained(self) -> dict[str, nn.Parameter]:
        """What the optimizer changes, by name."""
        names = {id(parameter): name for name, parameter in self.trainer.model.named_parameters()}
        assert self.trainer.optimizer is not None  # the Trainer has made it
        found = [parameter for group in self.trainer.optimizer.param_groups for parameter in group["params"]]
        return {names.get(id(parameter), f"beside the model {n}"): parameter for n, parameter in enumerate(found)}

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # accelerate does not reach the sampler of a loader that skips the batches before a checkpoint on many ranks.
        self.sampler.set_epoch(int(state.epoch or 0))

    def take_tasks(self, inputs: dict[str, Any]) -> None:
        """Take the tasks of the rows out of a batch, which the model does not know."""
        self.task_B = inputs.pop(TASK_IDS, None)

    def weights(self) -> Tensor:
        """`(K,)`: what each task's loss weighs now."""
        if self.uncertainty is not None:
            return self.uncertainty.weights()
        values = self.plan.weights if self.rate is None else self.rate.weights()
        return torch.tensor(values, dtype=torch.float32, device=self.trainer.args.device)

    def model_for(self, model: nn.Module) -> nn.Module:
        """The model that a step runs: not through DistributedDataParallel where tasks are differentiated one by one,
        since it exchanges the gradients of one backward pass."""
        return model if self.gradients is None else self.trainer.accelerator.unwrap_model(model)

    def compute_loss(
        self,
        compute: Callable[..., Any],
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None,
    ) -> tuple[Tensor, Any]:
        """The model's loss with weighed tasks, and its outputs. Where tasks are taken by themselves, it carries the
        graph of the losses of no task alone.

        Args:
            compute: the Trainer's own `compute_loss`.

        Raises:
            ValueError: a batch that does not say what its rows are.
        """
        assert self.loss is not None  # set when training begins
        if self.task_B is None:
            raise ValueError("tasks: the batches name no tasks; make the collator with more=[task_columns(plan.names)]")
        with self.loss.of(self.task_B, self.weights(), is_apart=self.gradients is not None):
            loss, outputs = compute(model, inputs, True, num_items_in_batch)
        # Taken, since it holds the graph of the step.
        found, self.loss.found = self.loss.found, None
        if found is None:
            raise ValueError("tasks: the model was given no labels, so no task has a loss")
        self._of_step += torch.stack([found.sums_K, found.tokens_K])
        if self.uncertainty is not None:
            self.uncertainty.tokens_K = found.tokens_K
        if self.gradients is not None:
            self.gradients.add(found.weighted_K * self._scale(num_items_in_batch), (found.tokens_K > 0).tolist())
            if not loss.requires_grad:
                # Nothing but tasks: the Trainer's backward pass then adds zeros.
                anchor = next(parameter for parameter in model.parameters() if parameter.requires_grad)
                loss = loss + 0.0 * anchor.sum()
        return loss, outputs

    def _scale(self, num_items_in_batch: Tensor | int | None) -> float:
        """What the Trainer does to a loss before it differentiates it."""
        trainer, scale = self.trainer, 1.0
        if num_items_in_batch is None:
            scale = 1 / trainer.current_gradient_accumulation_steps
        elif trainer.args.average_tokens_across_devices:
            scale = trainer.accelerator.num_processes // trainer.get_tp_size()
        scaler = trainer.accelerator.scaler
        return scale if scaler is None else scale * scaler.get_scale()

    def end_step(self) -> None:
        """After the last micro-batch of a step, before its gradient is clipped."""
        accelerator = self.trainer.accelerator
        if self.gradients is not None:
            average = (lambda value: accelerator.reduce(value, "mean")) if accelerator.num_processes > 1 else None
            self.gradients.settle(self.trainer.state.global_step + 1, average)
        sums = accelerator.reduce(self._of_step, "sum")
        if self.rate is not None:
            self.rate.add(*sums)
        # A step that the guard skips would be all that the log says until the next one.
        self._logged += torch.where(torch.isfinite(sums).all(), sums, torch.zeros_like(sums))
        self._of_step = torch.zeros_like(self._of_step)

    def take_figures(self) -> dict[str, float]:
        """What the log gets: means since the last one."""
        losses, tokens = self._logged.tolist()
        names = self.plan.names
        figures = {f"task_loss/{name}": loss / n for name, loss, n in zip(names, losses, tokens, strict=True) if n}
        if self.plan.arguments.task_weighting != "fixed":
            figures |= {f"task_weight/{name}": w for name, w in zip(names, self.weights().tolist(), strict=True)}
        self._logged = torch.zeros_like(self._logged)
        return figures | (self.gradients.take_cosines() if self.gradients is not None else {})
