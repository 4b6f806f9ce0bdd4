"""A Trainer callback that keeps the balance bias moving and logs what the experts do.

Unusual here:
- only this callback moves the bias of a bank with `balance="bias"`;
- the bias moves once per optimizer step, after all micro-batches and before the weights, from integer counts summed
  over all ranks; so accumulation and ranks change nothing, and all ranks hold the same bias;
- evaluation, generation and a frozen router change nothing.
"""

from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from chorus_moe.training.loading import base_model
from chorus_moe.training.routing.balance import biased_routers, update_balance_bias
from chorus_moe.training.routing.counters import RoutingCounters, sum_over_ranks
from chorus_moe.training.routing.observer import RoutingObserver
from chorus_moe.training.routing.statistics import routing_metrics, summarise

logger = logging.get_logger(__name__)


class RoutingCallback(TrainerCallback):
    """Moves the balance bias and adds `routing_metrics` to the logs: `Trainer(..., callbacks=[RoutingCallback()])`.

    The metrics of a training log are those of all real tokens since the log before, over all ranks. They are in the
    Trainer's `log_history` and in what it prints. Trackers that the Trainer itself adds (`report_to`) are called before
    the callbacks of its argument; `RoutingCallback.add_to(trainer)` puts this callback before them.

    Args:
        log_statistics: False to move the balance bias only.

    Attributes:
        last: counters of the last training log, over all ranks; None before the first.
    """

    def __init__(self, log_statistics: bool = True):
        self.log_statistics = log_statistics
        self.last: RoutingCounters | None = None
        self._observer: RoutingObserver | None = None
        self._window: RoutingCounters | None = None

    @classmethod
    def add_to(cls, trainer: Trainer, log_statistics: bool = True) -> "RoutingCallback":
        """A new callback in front of all others of a Trainer, so that trackers see what it logs."""
        callback = cls(log_statistics)
        # The Trainer calls its own trackers before the callbacks of its argument, so being first takes an insertion.
        trainer.callback_handler.callbacks.insert(0, callback)
        return callback

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = kwargs["model"]
        # A second `train()` of the same Trainer starts with new counters.
        self._detach()
        _warn_of_lost_bias(model)
        self._observer = RoutingObserver(model, training_only=True).attach()
        self._window = RoutingCounters(self._observer.decoder.config, next(model.parameters()).device)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._observer is None or self._window is None:
            return
        # After the last micro-batch and before the weights move: the counts of one step, whatever the accumulation.
        move_balance_bias(self._observer.decoder, self._observer.counters)
        self._window.add(self._observer.counters)
        # The window keeps what is logged; the observer starts the next step from zero.
        self._observer.counters.clear()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        # The logs of an evaluation and of the end of the run have no "loss".
        if not self.log_statistics or self._window is None or logs is None or "loss" not in logs:
            return
        self.last = self._window.over_ranks()
        self._window.clear()
        add_to_logs(routing_metrics(summarise(self.last)), logs, state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._detach()

    def _detach(self) -> None:
        if self._observer is not None:
            self._observer.detach()
        self._observer = self._window = None


def add_to_logs(metrics: dict[str, float], logs: dict[str, float], state: TrainerState) -> None:
    """Figures of a callback beside those of the Trainer, for trackers that come after it and for the history."""
    logs.update(metrics)
    if state.log_history:
        # The Trainer copied `logs` into its history before it called any callback.
        state.log_history[-1].update(metrics)


def move_balance_bias(model: nn.Module, counters: RoutingCounters) -> None:
    """One step of every balance bias, from the counts of one optimizer step. Every rank must call it.

    Args:
        model: the decoder or anything around it.
        counters: this rank's own; they are summed over ranks here.
    """
    # Decided from the configuration, which is the same on all ranks, so either all of them exchange or none.
    if all(bank.balance != "bias" for bank in counters.config.banks):
        return
    routers = biased_routers(model)
    places = [
        (layer, name) for layer, banks in counters.banks.items() for name in banks if name in routers.get(layer, {})
    ]
    # Integers: sums in any order agree, so all ranks move their bias alike.
    counts = sum_over_ranks([counters.banks[layer][name].choices_ME.sum(dim=0) for layer, name in places])
    for (layer, name), count_E in zip(places, counts, strict=True):
        update_balance_bias(routers[layer][name], count_E)


def _warn_of_lost_bias(model: nn.Module) -> None:
    """An adapter's checkpoint holds what PEFT saves: a bias that moves must lie in `modules_to_save`."""
    if base_model(model) is model:
        return
    for layer, banks in biased_routers(model).items():
        for name, router in banks.items():
            # By identity: `modules_to_save` holds a copy of the router, and that copy is the one in use.
            saved = any(module is router for path, module in model.named_modules() if ".modules_to_save." in path)
            if not saved and any(parameter.requires_grad for parameter in router.parameters()):
                logger.warning(
                    f"the router of expert bank {name!r} in layer {layer} is trained, and its balance bias moves, but "
                    "neither is part of the adapter: checkpoints will lose both; use lora_config(..., router='train')"
                )
