"""Token accuracy of a run: the share of labelled tokens whose most likely prediction is the label."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from chorus_moe.training.routing.counters import sum_over_ranks


class TokenAccuracy(Trainer):
    """Logs `token_accuracy` beside each loss, of all tokens since the log before and over all ranks, and adds
    `PREFIX_token_accuracy` to the metrics of every evaluation.

    Teacher forced: each token is predicted from the true tokens before it. Heads without logits `(B, S, V)` log none.
    """

    # Right and labelled tokens; None before the first batch, which says on which device they are counted.
    _tokens: Tensor | None = None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        labels_BS = inputs.get("labels")
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        counted = count_right(outputs, labels_BS)
        if counted is not None:
            self._tokens = counted if self._tokens is None else self._tokens + counted
        return (loss, outputs) if return_outputs else loss

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        # What training has counted since its last log is put aside meanwhile.
        of_training, self._tokens = self._tokens, None
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        self._add_accuracy(output.metrics, f"{metric_key_prefix}_token_accuracy")
        self._tokens = of_training
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            self._add_accuracy(logs, "token_accuracy")
        super().log(logs, start_time)

    def _add_accuracy(self, metrics: dict[str, float], name: str) -> None:
        tokens, self._tokens = self._tokens, None
        # A rank whose batches had no label takes part in the exchange all the same.
        none = torch.zeros(2, dtype=torch.int64, device=self.args.device)
        right, labelled = sum_over_ranks([none if tokens is None else tokens])[0].tolist()
        if labelled:
            metrics[name] = right / labelled


@torch.no_grad()
def count_right(outputs: Mapping[str, Any], labels_BS: Tensor | None) -> Tensor | None:
    """`[right, labelled]` tokens of a batch, int64 `(2,)`; None for outputs that predict no token."""
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else None
    if labels_BS is None or logits is None or logits.ndim != 3 or labels_BS.shape != logits.shape[:2]:
        return None
    target_BS = labels_BS[:, 1:].to(logits.device)
    is_labelled_BS = target_BS != -100
    # Labelled positions first: the rest of the logits need not be searched.
    right = logits[:, :-1][is_labelled_BS].argmax(dim=-1) == target_BS[is_labelled_BS]
    return torch.stack([right.sum(), is_labelled_BS.sum()])
