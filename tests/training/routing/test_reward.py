"""Rewarded routers: the gradient is that of REINFORCE, it reaches routers alone, and it moves what no loss can."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import Tensor, nn

from chorus_moe import ChorusForConditionalGeneration
from chorus_moe.modeling.modeling_outputs import BankRouting
from chorus_moe.modeling.moe_routers import Router
from chorus_moe.training.lora import lora_config
from chorus_moe.training.recipe import read_recipe
from chorus_moe.training.routing.reward import (
    RouterRewardTrainer,
    label_log_likelihoods,
    policy_gradient_loss,
    token_gains,
)
from chorus_moe.training.train import run_training
from tests.conftest import tiny_batch, tiny_config
from tests.training.routing_streams import make_trainer, stack, token_rows
from tests.training.test_train import recipe  # noqa: F401  a fixture

TOP_1: dict[str, Any] = {"common": {"num_experts_per_tok": 1, "balance": "none"}}

BEST = 2  # the expert of the bandit that answers right


def make(seed: int = 0, **text: Any) -> ChorusForConditionalGeneration:
    torch.manual_seed(seed)
    model = ChorusForConditionalGeneration(tiny_config(**{"expert_banks": TOP_1, **text}))
    with torch.no_grad():
        for router in routers(model):
            router.weight.mul_(10)
    return model


def routers(model: nn.Module) -> list[Router]:
    return [module for module in model.modules() if isinstance(module, Router)]


def reward_trainer(model: nn.Module, folder: Path, rows: list[dict[str, Tensor]], **settings: Any) -> Any:
    options = {"router_reward_banks": ["common"], "router_reward_coef": 1.0, **settings}
    return make_trainer(model, folder, rows, RouterRewardTrainer, **options)


def test_log_likelihoods_are_those_of_the_loss() -> None:
    model, batch = make().eval(), tiny_batch(tiny_config())
    outputs = model(**batch)
    found = label_log_likelihoods(outputs.logits, batch["labels"])
    assert torch.equal(found != 0, F.pad(batch["labels"], (0, 1), value=-100)[:, 1:] != -100)
    # The same terms, summed in another order.
    torch.testing.assert_close(-found.sum() / (found != 0).sum(), outputs.loss, rtol=1e-6, atol=0)


def test_gains_of_tokens_without_a_label_are_those_of_the_labels_after_them() -> None:
    labels = torch.tensor([[-100, -100, 7, 8, -100, 9, -100], [-100] * 7])
    sampled = torch.tensor([[0.0, 1.0, 3.0, 0.0, 5.0, 0.0, 0.0], [0.0] * 7])
    # Labels are predicted at positions 1, 2 and 4; the mean of 1, 3 and 5, then of 5, then nothing.
    expected = torch.tensor([[3.0, 1.0, 3.0, 5.0, 5.0, 0.0, 0.0], [0.0] * 7])
    assert torch.equal(token_gains(sampled, torch.zeros(2, 7), labels), expected)


def test_the_gradient_is_that_of_reinforce() -> None:
    """For one draw from a softmax: -gain * (onehot - p), averaged over the rows that count."""
    torch.manual_seed(0)
    logits_TE = torch.randn(6, 4, requires_grad=True)
    drawn_T, gain_BS = torch.tensor([0, 1, 2, 3, 0, 1]), torch.randn(2, 4)
    rows_T, mask_T = torch.tensor([0, 1, 3, 4, 6, 7]), torch.tensor([True, True, False, True, True, True])
    log_probs_T = logits_TE.log_softmax(dim=-1).gather(1, drawn_T[:, None]).squeeze(1)
    routing = BankRouting(
        logits_TE, torch.ones(6, 1), drawn_T[:, None], mask_T, torch.ones(6), rows_T, log_probs=log_probs_T
    )
    policy_gradient_loss([{"common": routing}], gain_BS, ["common"]).backward()
    gain_T1 = (gain_BS.flatten()[rows_T] * mask_T)[:, None]
    expected = -gain_T1 * (F.one_hot(drawn_T, 4) - logits_TE.detach().softmax(dim=-1)) / 5
    # float32 arithmetic in another order; worst difference seen is 3e-8.
    torch.testing.assert_close(logits_TE.grad, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mask", [torch.zeros(0, dtype=torch.bool), torch.zeros(3, dtype=torch.bool)])
def test_a_bank_without_rows_adds_a_zero_with_a_graph(mask: Tensor) -> None:
    """No row at all, or padding only: the mean is over the bank that had any."""
    torch.manual_seed(0)

    def routing(mask_R: Tensor) -> tuple[Tensor, BankRouting]:
        logits = torch.randn(len(mask_R), 4, requires_grad=True)
        index, ones = torch.zeros(len(mask_R), 1, dtype=torch.long), torch.ones(len(mask_R))
        log_probs = logits.log_softmax(dim=-1)[:, 0]
        rows = torch.arange(len(mask_R))
        return logits, BankRouting(logits, ones[:, None], index, mask_R, ones, rows, log_probs=log_probs)

    gain = torch.randn(1, 3)
    (full_logits, full), (none_logits, none) = routing(torch.ones(3, dtype=torch.bool)), routing(mask)
    expected = -(gain[0] * full.log_probs).mean()
    loss = policy_gradient_loss([{"full": full, "none": none}], gain, ["full", "none"])
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert full_logits.grad.any() and not none_logits.grad.any() and none_logits.grad.isfinite().all()
    alone = policy_gradient_loss([{"none": routing(mask)[1]}], gain, ["none"])
    assert alone.item() == 0.0 and alone.requires_grad


def test_steps_leave_no_graph_behind(tmp_path: Path) -> None:
    """What the log sums up over steps must not hold the graph of each of them."""
    trainer = reward_trainer(make(), tmp_path, token_rows(4))
    trainer.create_accelerator_and_postprocess()
    for _ in range(2):
        gradients(trainer, stack(token_rows(4)))
    gc.collect()
    assert not [value for value in gc.get_objects() if issubclass(type(value), Tensor) and value.grad_fn is not None]


def gradients(trainer: Any, batch: dict[str, Tensor], seed: int = 3) -> dict[str, Tensor]:
    trainer.model.zero_grad()
    torch.manual_seed(seed)
    trainer.training_step(trainer.model, dict(batch), (batch["labels"][:, 1:] != -100).sum())
    return {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


def test_a_step_gives_the_router_the_gradient_computed_by_hand(tmp_path: Path) -> None:
    """With one expert a token of weight 1 the language loss gives a router nothing, so all of it is the reward's."""
    model, batch = make(), stack(token_rows(4))
    trainer = reward_trainer(model, tmp_path, token_rows(4), router_reward_coef=0.5)
    trainer.create_accelerator_and_postprocess()
    found = gradients(trainer, batch)

    inputs: list[Tensor] = []
    handles = [r.register_forward_pre_hook(lambda _, given: inputs.append(given[0].detach())) for r in routers(model)]
    torch.manual_seed(3)
    sampled = model.train()(**batch, sample_experts=("common",))
    for handle in handles:
        handle.remove()
    with torch.no_grad():
        ranked = model.eval()(**batch)
    likelihoods = [label_log_likelihoods(outputs.logits, batch["labels"]) for outputs in (sampled, ranked)]
    gain_T1 = token_gains(*likelihoods, batch["labels"]).reshape(-1, 1)
    for layer, (routing, hidden_TD) in enumerate(zip(sampled.routing, inputs, strict=True), start=1):
        drawn_TE = F.one_hot(routing["common"].selected_experts[:, 0], 4)
        error_TE = -gain_T1 * (drawn_TE - routing["common"].router_logits.detach().softmax(dim=-1)) / len(gain_T1)
        expected = 0.5 * error_TE.T @ hidden_TD / 2  # the mean of two layers
        name = f"model.language_model.layers.{layer}.mlp.banks.common.router.weight"
        assert expected.abs().max() > 1e-6
        # Sums of 64 products in another order; worst difference seen is 1e-7 of the largest.
        torch.testing.assert_close(found[name], expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_reward_changes_no_gradient_but_the_routers(tmp_path: Path, top_k: int) -> None:
    model = make(expert_banks={"common": {"num_experts_per_tok": top_k, "balance": "none"}})
    batch, found = stack(token_rows(4)), []
    for coef in (1e-9, 10.0):
        trainer = reward_trainer(model, tmp_path, token_rows(4), router_reward_coef=coef)
        trainer.create_accelerator_and_postprocess()
        found.append(gradients(trainer, batch))
    differing = {name for name in found[0] if not torch.equal(found[0][name], found[1][name])}
    assert differing == {f"model.language_model.layers.{i}.mlp.banks.common.router.weight" for i in (1, 2)}


def test_a_rewarded_step_does_not_depend_on_checkpointing(tmp_path: Path) -> None:
    found = []
    for checkpointing in (False, True):
        model = make()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        trainer = reward_trainer(model, tmp_path, token_rows(4))
        trainer.create_accelerator_and_postprocess()
        found.append(gradients(trainer, stack(token_rows(4))))
    assert found[0].keys() == found[1].keys()
    assert not [name for name in found[0] if not torch.equal(found[0][name], found[1][name])]


def bandit() -> ChorusForConditionalGeneration:
    """Top-1 routers that start collapsed onto expert 0, frozen experts of which only expert 2 is any good.

    The stream repeats one token; the good expert writes the direction that the head reads as that token, the others
    its opposite.
    """
    model = make(num_hidden_layers=2, shared_expert_intermediate_size=0, mlp_layer_types=["dense", "sparse"])
    model.requires_grad_(False)
    with torch.no_grad():
        for router in routers(model):
            router.weight.zero_().requires_grad_(True)
        experts = model.model.language_model.layers[1].mlp.banks["common"].experts
        experts.gate_up_proj.fill_(0.05)
        direction = model.lm_head.weight[7] / model.lm_head.weight[7].norm()
        for expert in range(4):
            sign = 1.0 if expert == BEST else -1.0
            experts.down_proj[expert] = sign * 20 * direction[:, None]
    return model


def bandit_rows() -> list[dict[str, Tensor]]:
    row = torch.full((16,), 7)
    return [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for _ in range(8)]


def choice_of(model: nn.Module) -> list[int]:
    with torch.no_grad():
        layer = model.eval()(**stack(bandit_rows()), output_router_logits=True).routing[0]
    return sorted(set(layer["common"].selected_experts.flatten().tolist()))


def test_a_collapsed_router_finds_the_expert_that_pays(tmp_path: Path) -> None:
    settings = {"max_steps": 60, "learning_rate": 0.05, "logging_steps": 20, "router_reward_coef": 1.0}
    model = bandit()
    assert choice_of(model) == [0]
    trainer = reward_trainer(model, tmp_path, bandit_rows(), **settings)
    trainer.train()
    assert choice_of(model) == [BEST]
    assert all("router_gain" in entry for entry in trainer.state.log_history if "loss" in entry)


def test_without_a_reward_nothing_moves_a_top_1_router(tmp_path: Path) -> None:
    model = bandit()
    # The head's loss keeps a graph only if something besides the router is trained.
    model.lm_head.weight.requires_grad_(True)
    make_trainer(model, tmp_path, bandit_rows(), max_steps=10, learning_rate=0.05, weight_decay=0.0).train()
    assert not any(router.weight.any() for router in routers(model))
    assert choice_of(model) == [0]


def test_the_reward_of_a_micro_batch_weighs_its_share_of_the_labels(tmp_path: Path) -> None:
    """The same micro-batch as a quarter of a step has a quarter of the router's gradient."""
    model, batch = make(), stack(token_rows(4))
    trainer = reward_trainer(model, tmp_path, token_rows(4))
    trainer.create_accelerator_and_postprocess()
    labels = (batch["labels"][:, 1:] != -100).sum()
    found = []
    for factor in (1, 4):
        model.zero_grad()
        torch.manual_seed(3)
        trainer.training_step(model, dict(batch), factor * labels)
        found.append([router.weight.grad.clone() for router in routers(model)])
    for whole, part in zip(*found, strict=True):
        # The gradient of a cumulated sum of exponentials passes through logarithms.
        torch.testing.assert_close(whole, 4 * part, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("bank", "options", "message"),
    [
        ({}, {"router_reward_banks": ["comon"]}, "did you mean 'common'"),
        ({}, {"router_reward_banks": []}, "give the names of banks"),
        ({}, {"router_reward_coef": 0.0}, "router_reward_coef=0.0 must be positive"),
        ({"expert_capacity": 4}, {}, "expert_capacity=4"),
        ({"balance": "bias"}, {}, "balance='bias'"),
        ({"router_jitter_noise": 0.1}, {}, "router_jitter_noise=0.1"),
    ],
)
def test_what_cannot_be_rewarded_is_refused(
    tmp_path: Path, bank: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    model = ChorusForConditionalGeneration(tiny_config(expert_banks={"common": bank}))
    with pytest.raises(ValueError, match=message):
        reward_trainer(model, tmp_path, token_rows(4), **options)


def test_frozen_routers_are_refused(tmp_path: Path) -> None:
    model = make()
    adapted = get_peft_model(model, lora_config(model, banks="all", verbose=False))
    with pytest.raises(ValueError, match="'common', whose routers are frozen"):
        reward_trainer(adapted, tmp_path, token_rows(4))


def test_a_recipe_rewards_the_routers_it_names(recipe: Path) -> None:  # noqa: F811
    words = ["--router_reward_banks", "common", "image", "--router_reward_coef", "0.5", "--logging_steps", "1"]
    run_training(read_recipe(recipe, [*words, "--max_steps", "1", "--save_strategy", "no"]))
    state = (recipe.parent / "out" / "trainer_state.json").read_text()
    assert "router_gain" in state and "routing_load_entropy" in state


def test_a_gain_is_the_mean_since_the_log_before(tmp_path: Path) -> None:
    trainer = reward_trainer(make(), tmp_path, token_rows(2))
    logged: list[dict[str, float]] = []
    trainer.callback_handler.on_log = lambda args, state, control, logs: logged.append(dict(logs))
    for gain, labels in ((6.0, 4), (3.0, 2)):
        trainer._gain, trainer._num_labels = trainer._gain + gain, trainer._num_labels + labels
        trainer.log({"eval_loss": 1.0})
        trainer.log({"loss": 1.0})
        trainer.log({"loss": 1.0})
    assert [entry.get("router_gain") for entry in logged] == [None, 1.5, None] * 2
