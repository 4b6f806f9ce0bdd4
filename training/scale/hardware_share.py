"""Tokens a second, and the share of its devices' peak that a run reaches, in the logs and so in every tracker."""

import time
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from chorus_moe.modeling.configuration_modalities import MODALITY_IDS
from chorus_moe.modeling.modeling_generation import ChorusForConditionalGeneration
from chorus_moe.surgery.parts import decoder_of
from chorus_moe.training.loading import ModelOrAdapter, base_model
from chorus_moe.training.routing.callback import add_to_logs
from chorus_moe.training.routing.counters import sum_over_ranks
from chorus_moe.training.scale.plan_model import PlannedModel
from chorus_moe.training.scale.plan_rates import DEVICES
from chorus_moe.training.scale.plan_time import step_flops


class HardwareShare(TrainerCallback):
    """Adds `tokens_per_second`, of all ranks together, and `mfu` to the logs of training.

    `mfu` is the model flops utilisation of PaLM (arXiv 2204.02311, appendix B): the operations of forward and backward
    that the tokens need, without those that checkpointing does again, over what the devices could do in the time since
    the log before; so the time of evaluations and checkpoints counts. Operations are those of `chorus-moe plan`: of an
    expert bank the chosen experts alone.

    Args:
        model: what is trained; an adapter is counted as `plan` does, with its default groups.
        peak: operations a second of one device.

    Raises:
        ValueError: a peak that is not positive, or a model that does not generate.
    """

    def __init__(self, model: ModelOrAdapter, peak: float):
        below = base_model(model)
        if not (isfinite(peak) and peak > 0):
            raise ValueError(f"parallel.device_flops: expected a positive number, found {peak}")
        if not isinstance(below, ChorusForConditionalGeneration):
            raise ValueError(
                f"parallel.device_flops={peak:g} counts operations of models that generate, not of a "
                f"{type(below).__name__}; leave it out"
            )
        frozen = any("_tower." in name and not parameter.requires_grad for name, parameter in below.named_parameters())
        kind = "lora" if below is not model else "frozen_towers" if frozen else "whole"
        self.planned, self.peak = PlannedModel(below.config, kind), peak
        self._decoder = decoder_of(model)
        self._handle: RemovableHandle | None = None

    @classmethod
    def add_to(cls, trainer: Trainer, peak: float | None) -> None:
        """In front of all callbacks, so that trackers see what it logs; without a peak, that of a GPU that is known.

        A run in 16 bits alone has the peak of the table. Other devices log nothing.
        """
        arguments = trainer.args
        if peak is None:
            is_known = arguments.device.type == "cuda" and (arguments.bf16 or arguments.fp16)
            peak = known_peak(torch.cuda.get_device_name(arguments.device)) if is_known else None
            if peak is None or not isinstance(base_model(trainer.model), ChorusForConditionalGeneration):
                return
        trainer.callback_handler.callbacks.insert(0, cls(trainer.model, peak))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # By modality, then sequences and their lengths together; on the device, so that no step waits for a number.
        self._counts = torch.zeros(len(MODALITY_IDS) + 2, dtype=torch.double, device=args.device)
        self._handle = self._decoder.register_forward_pre_hook(self._count, with_kwargs=True)
        self._since = time.perf_counter()

    def _count(self, decoder: nn.Module, _: tuple[Any, ...], options: dict[str, Any]) -> None:
        if not (decoder.training and torch.is_grad_enabled()) or torch.compiler.is_compiling():
            return
        inputs: Tensor = options["inputs_embeds"] if options.get("input_ids") is None else options["input_ids"]
        batch, length = inputs.shape[:2]
        types_BS, mask = options.get("mm_token_type_ids"), options.get("attention_mask")
        if types_BS is None:
            types_BS = torch.zeros(batch, length, dtype=torch.long, device=inputs.device)
        real_BS = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else torch.ones_like(types_BS).bool()
        for place, number in enumerate(MODALITY_IDS.values()):
            self._counts[place] += ((types_BS == number) & real_BS).sum()
        self._counts[-2:] += torch.tensor([batch, batch * length], dtype=torch.double, device=self._counts.device)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if self._handle is None or logs is None or "loss" not in logs:
            return
        # Reading waits for the device, so the time is taken after it.
        *tokens, sequences, lengths = sum_over_ranks([self._counts])[0].tolist()
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        self._counts.zero_()
        if not (total := sum(tokens)):
            return
        mix = {name: count / total for name, count in zip(MODALITY_IDS, tokens, strict=True)}
        flops = total * sum(step_flops(self.planned, mix, round(lengths / sequences), False))
        found = {"tokens_per_second": total / seconds, "mfu": flops / (seconds * args.world_size * self.peak)}
        add_to_logs(found, logs, state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._handle is not None:
            self._handle.remove()
        self._handle = None


def known_peak(device: str) -> float | None:
    """Operations a second of a device of the table, by the name that its driver gives it; None of another one."""
    name = device.lower().replace(" ", "")
    return next((rates.flops for known, rates in DEVICES.items() if known in name), None)
