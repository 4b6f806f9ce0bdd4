"""Routers that learn by reward: sampled experts and a policy-gradient loss, as an option of the Trainer.

The experts of the named banks are drawn from the router's distribution. The reward of a token is how much more likely
its label became than with the best-ranked experts, which is REINFORCE with a self-critical baseline (arXiv 1612.00563):

    loss = - mean over rows of the bank of gain * log p(draw)
    gain = log p(label | draw) - log p(label | ranked)

Unusual here:
- it reaches routers that the language loss cannot: with one expert per token and normalised weights that loss
  has no gradient with respect to the router at all;
- its gradient reaches the routers of these banks and nothing else: `log p(draw)` is taken anew from detached states.
  Everything else learns from the language loss of the sampled forward, as ever;
- a token without a label (an image, a question) gets the mean gain of the labels that come after it in its sample;
- the baseline is one more forward, in evaluation mode and without a graph. Train without dropout: the baseline has
  none, so dropout lowers every gain.

Shape suffixes: B batch, S sequence, R rows of a bank, V vocabulary.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chorus_moe.modeling.configuration_banks import check_name
from chorus_moe.modeling.layers import without_autocast
from chorus_moe.modeling.losses import share_of_batch
from chorus_moe.modeling.modeling_generation import ChorusForConditionalGeneration
from chorus_moe.modeling.modeling_outputs import RouterChoice, RoutingOfLayer
from chorus_moe.modeling.moe_routers import Router
from chorus_moe.training.expert_draws import draw_log_probability, open_log_weights
from chorus_moe.training.loading import base_model
from chorus_moe.training.trainer import ChorusTrainer


@torch.no_grad()
def label_log_likelihoods(logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
    """`(B, S)` float32: log-probability of the label that each position predicts, the next one; 0 without a label."""
    # Position i predicts label i + 1, and the last position nothing.
    target_BS = F.pad(labels_BS, (0, 1), value=-100)[:, 1:]
    has_label_BS = target_BS != -100
    found_BS = torch.zeros(target_BS.shape, dtype=torch.float32, device=logits_BSV.device)
    # Labelled positions only: float32 logits of all positions would take several times the memory.
    found_BS[has_label_BS] = -F.cross_entropy(
        logits_BSV[has_label_BS].float(), target_BS[has_label_BS], reduction="none"
    )
    return found_BS


def token_gains(sampled_BS: Tensor, ranked_BS: Tensor, labels_BS: Tensor) -> Tensor:
    """`(B, S)`: the gain of each position's own label, or without one the mean gain of the labels that follow; 0
    where none does.

    Args:
        sampled_BS, ranked_BS: what `label_log_likelihoods` returns for the two ways to route.
    """
    has_label_BS = F.pad(labels_BS, (0, 1), value=-100)[:, 1:] != -100
    gain_BS = (sampled_BS - ranked_BS).masked_fill(~has_label_BS, 0.0)

    def from_here_on(values_BS: Tensor) -> Tensor:
        return values_BS.flip(1).cumsum(dim=1).flip(1)

    # A token without a label influences the answers after it, and no others: attention is causal.
    later_BS = from_here_on(gain_BS) / from_here_on(has_label_BS.float()).clamp(min=1)
    return torch.where(has_label_BS, gain_BS, later_BS)


@contextmanager
def own_log_probabilities(model: nn.Module, banks: Collection[str]) -> Iterator[None]:
    """Within the block, the log-probability of a draw depends on the weights of its router alone, not on what made its
    input. The block must hold the backward pass as well, since activation checkpointing runs a layer again there."""

    def replace(router: nn.Module, arguments: tuple[Any, ...], choice: RouterChoice) -> RouterChoice:
        if not isinstance(router, Router) or choice.log_probs is None:
            return choice
        # As in the router itself: the scores must be those from which the experts were drawn.
        with without_autocast(arguments[0]):
            # Detached: through the input the policy gradient would train the whole trunk with its noise.
            logits_TE = router.score(arguments[0].detach().float())
            log_weights_TE = open_log_weights(router, logits_TE)
            index_TK = choice.selected_experts
            is_unused_TK = index_TK >= router.bank.num_experts
            return choice._replace(log_probs=draw_log_probability(log_weights_TE, index_TK, is_unused_TK))

    routers = [module for module in model.modules() if isinstance(module, Router) and module.bank.name in banks]
    handles = [router.register_forward_hook(replace) for router in routers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def policy_gradient_loss(layers: Iterable[RoutingOfLayer], gain_BS: Tensor, banks: Sequence[str]) -> Tensor:
    """`- gain * log p(draw)`, averaged over the real rows of each bank, then over the banks and layers that had any.

    Args:
        layers: the output `routing` of a forward with `sample_experts=banks`.
        gain_BS: reward of each token over the baseline; carries no gradient.

    Raises:
        ValueError: a bank that was not sampled.
    """
    gain_T = gain_BS.detach().reshape(-1)
    losses, counts = [], []
    for layer in layers:
        for name in banks:
            if name not in layer:
                continue
            routing = layer[name]
            if routing.log_probs is None:
                raise ValueError(f"the experts of bank {name!r} were not sampled; pass sample_experts=({name!r},)")
            gain_R = gain_T.to(routing.log_probs.device)
            gain_R = gain_R if routing.rows is None else gain_R.index_select(0, routing.rows)
            if routing.token_mask is not None:
                # Rows of padding keep their place, since shapes must not depend on data, and count nothing.
                gain_R = gain_R * routing.token_mask
            num_rows = torch.tensor(len(gain_R)) if routing.token_mask is None else routing.token_mask.sum()
            # A mean over rows, so that a bank with many tokens weighs as much as one with few.
            losses.append(-(gain_R * routing.log_probs).sum() / num_rows.clamp(min=1))
            counts.append((num_rows > 0).float())
    # A bank without rows adds a zero with a graph, so that all ranks send gradients for the same parameters.
    device = losses[0].device
    total = torch.stack([loss.to(device) for loss in losses]).sum()
    return total / torch.stack([count.to(device) for count in counts]).sum().clamp(min=1)


class RouterRewardTrainer(ChorusTrainer):
    """The Trainer of `chorus-moe train`, plus the policy-gradient loss for the routers of some banks.

    The coefficient means the same at any number of accumulation steps and ranks. Logs get `router_gain`, the mean gain
    of a labelled token in nats since the log before, on this rank: below 0 while the draw is worse than the ranking.

    Args:
        router_reward_banks: names of the banks; without a capacity, a balance bias or noise.
        router_reward_coef: weight of the loss.

    Raises:
        ValueError: a model that generates no text, no bank or an unknown one, one that cannot be sampled or whose
            routers are frozen, or a coefficient that is not positive.
    """

    def __init__(
        self, *arguments: Any, router_reward_banks: Sequence[str], router_reward_coef: float = 0.1, **options: Any
    ):
        super().__init__(*arguments, **options)
        if isinstance(router_reward_banks, str) or not router_reward_banks:
            raise ValueError(f"router_reward_banks={router_reward_banks!r}; give the names of banks, as in ['common']")
        if not router_reward_coef > 0:
            raise ValueError(f"router_reward_coef={router_reward_coef} must be positive")
        base = base_model(self.model)
        if not isinstance(base, ChorusForConditionalGeneration):
            raise ValueError(f"{type(base).__name__} does not predict tokens, so there is no likelihood to reward")
        known = {bank.name: bank for bank in base.config.text_config.banks}
        for name in router_reward_banks:
            check_name("router_reward_banks", "bank", name, known)
            bank = known[name]
            if bank.expert_capacity is not None or bank.balance == "bias" or bank.router_jitter_noise:
                raise ValueError(
                    f"router_reward_banks names {name!r}, which has expert_capacity={bank.expert_capacity}, balance="
                    f"{bank.balance!r} and router_jitter_noise={bank.router_jitter_noise}: a capacity, a balance bias "
                    "and noise change what is drawn, so its probability is not known"
                )
            part = f".banks.{name}.router."
            if not any(part in path and parameter.requires_grad for path, parameter in self.model.named_parameters()):
                raise ValueError(f"router_reward_banks names {name!r}, whose routers are frozen; unfreeze them")
        # A bank named twice would be rewarded twice.
        self.router_reward_banks = tuple(dict.fromkeys(router_reward_banks))
        self.router_reward_coef = router_reward_coef
        self._gain: Tensor | float = 0.0
        self._num_labels = 0

    def training_step(self, model: nn.Module, *arguments: Any, **options: Any) -> Tensor:
        # Around the whole step, backward pass included: checkpointing runs layers, and their hooks, again there.
        with own_log_probabilities(model, self.router_reward_banks):
            return super().training_step(model, *arguments, **options)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        # Evaluation reports the language loss alone.
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels_BS = inputs["labels"]
        # Before the sampled forward, whose graph then is not in memory beside the baseline.
        ranked_BS = self._ranked(model, inputs)
        sampled = {**inputs, "sample_experts": self.router_reward_banks}
        loss, outputs = super().compute_loss(model, sampled, True, num_items_in_batch)
        sampled_BS = label_log_likelihoods(outputs.logits.detach(), labels_BS)
        gain_BS = token_gains(sampled_BS, ranked_BS, labels_BS)
        # The language loss is divided by the labels of all micro-batches. The reward takes this batch's share of them,
        # so the coefficient means the same at any accumulation.
        share = share_of_batch(labels_BS, num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # What the Trainer does to the loss of the model, against the mean that is taken over ranks.
            share = share * (self.accelerator.num_processes // self.get_tp_size())
        reward = policy_gradient_loss(outputs.routing, gain_BS, self.router_reward_banks)
        loss = loss + self.router_reward_coef * share * reward.to(loss.device)
        self._gain = self._gain + (sampled_BS - ranked_BS).sum()
        self._num_labels += int((labels_BS[:, 1:] != -100).sum())
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def _ranked(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """Log-likelihoods of the labels with the best-ranked experts, without dropout."""
        plain = self.accelerator.unwrap_model(model)
        plain.eval()
        left_out = {"labels", *self.objectives.columns}
        logits_BSV = plain(**{name: value for name, value in inputs.items() if name not in left_out}).logits
        plain.train()
        return label_log_likelihoods(logits_BSV, inputs["labels"])

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # Logs of an evaluation have no "loss".
        if "loss" in logs and self._num_labels:
            logs["router_gain"] = float(self._gain) / self._num_labels
            self._gain, self._num_labels = 0.0, 0
        super().log(logs, start_time)
