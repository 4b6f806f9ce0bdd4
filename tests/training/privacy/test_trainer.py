"""A private run: exact gradients of rows, noise, sampling, what it spends, and how it goes on."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import PreTrainedTokenizerFast, TrainerCallback

from benchmarks.privacy import secrets
from chorus_moe import ChorusProcessor
from chorus_moe.training.collator import ChorusDataCollator
from chorus_moe.training.lora import lora_config
from chorus_moe.training.privacy.arguments import PrivacyArguments
from tests.training.conftest import make_model, make_rows
from tests.training.privacy.conftest import REASON, make_trainer

pytest.importorskip("opacus", reason=REASON)

from chorus_moe.training.privacy.sampling import PoissonBatches  # noqa: E402

SMALL = {"num_hidden_layers": 2, "expert_banks": {"text": {}, "image": {}, "common": {}}}
KINDS = ["full", "adapter", "bank"]
LAPLACE = {"mechanism": "laplace", "epsilon_per_update": 0.5}


def new_model(tokenizer: PreTrainedTokenizerFast, kind: str) -> nn.Module:
    model = make_model(tokenizer, router_aux_loss_coef=0.5, router_z_loss_coef=0.1, **SMALL)
    if kind == "adapter":
        # On stacked experts, routers and linear layers; B starts at zero, and A would have no gradient.
        adapted = get_peft_model(
            model, lora_config(model, banks="all", cross_modal=True, router="train", verbose=False)
        )
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
        return adapted
    if kind == "bank":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".banks.common." in name)
    return model


class Steps(TrainerCallback):
    """The gradients with which each step was taken."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, torch.Tensor]] = []

    def on_optimizer_step(self, *_: Any, model: nn.Module, **__: Any) -> None:
        self.gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_the_sum_of_single_rows_gradients_each_clipped(
    kind: str, tokenizer: PreTrainedTokenizerFast, processor: ChorusProcessor, tmp_path: Path
) -> None:
    reference = new_model(tokenizer, kind).train()
    trained = {name: p for name, p in reference.named_parameters() if p.requires_grad}
    expected = {name: torch.zeros_like(p) for name, p in trained.items()}
    # The rows that the run will draw, one by one, with nothing but torch.
    drawn = next(iter(PoissonBatches(6, 4 / 6, 1, 1, torch.Generator().manual_seed(0))))
    assert 2 <= len(drawn) < 6
    rows, collate = make_rows(6), ChorusDataCollator(processor)
    gradients: list[dict[str, torch.Tensor]] = []
    for number in drawn:
        reference.zero_grad()
        reference(**collate([rows[number]])).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in trained.items() if p.grad is not None})
    norms = [float(torch.cat([g.flatten() for g in row.values()]).norm()) for row in gradients]
    # Between the least and the largest, so that one row is clipped and one is not.
    clip = (min(norms) + max(norms)) / 2
    for row, norm in zip(gradients, norms, strict=True):
        for name, gradient in row.items():
            expected[name] += gradient * min(1.0, clip / norm) / 4
    model = new_model(tokenizer, kind)
    trainer = make_trainer(model, processor, tmp_path, {"noise_multiplier": 1e-9}, max_steps=1, max_grad_norm=clip)
    trainer.add_callback(steps := Steps())
    trainer.train()
    found = steps.gradients[0]
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-5)
    assert any("experts" in name and bool(gradient.any()) for name, gradient in expected.items())


def test_updates_without_rows_and_uneven_batches_are_taken(
    tokenizer: PreTrainedTokenizerFast, processor: ChorusProcessor, tmp_path: Path
) -> None:
    seed = 3
    sizes = [len(rows) for rows in PoissonBatches(6, 1 / 6, 6, 1, torch.Generator().manual_seed(seed))]
    assert 0 in sizes and max(sizes) > 1
    model = new_model(tokenizer, "bank")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = make_trainer(
        model,
        processor,
        tmp_path,
        LAPLACE,
        seed=seed,
        max_steps=6,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
    )
    assert trainer.train().global_step == 6
    assert trainer.ledger.num_updates == 6
    moved = {name for name, p in model.named_parameters() if not torch.equal(before[name], p)}
    assert moved == {name for name in before if ".banks.common." in name}


def spent_in(folder: Path) -> tuple[int, dict[str, Any]]:
    state = json.loads((folder / "trainer_state.json").read_text())["stateful_callbacks"]["privacy"]
    return sum(steps for _, _, steps in state["history"]), state


def test_a_resumed_run_spends_no_less_and_lost_steps_count(
    tokenizer: PreTrainedTokenizerFast, processor: ChorusProcessor, tmp_path: Path
) -> None:
    saving = {"max_steps": 4, "save_steps": 2, "save_strategy": "steps"}
    whole = make_trainer(new_model(tokenizer, "bank"), processor, tmp_path, LAPLACE, **saving)
    whole.train()
    assert spent_in(tmp_path / "checkpoint-2")[0] == 2
    assert spent_in(tmp_path / "checkpoint-4")[0] == 4
    # With the file it knows that four updates were taken before it takes two more.
    resumed = make_trainer(new_model(tokenizer, "bank"), processor, tmp_path, LAPLACE, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.ledger.num_updates == 6
    # Without it, in another folder, the checkpoint alone knows.
    shutil.copytree(tmp_path / "checkpoint-2", tmp_path / "else" / "checkpoint-2")
    moved = make_trainer(new_model(tokenizer, "bank"), processor, tmp_path / "else", LAPLACE, **saving)
    moved.train(resume_from_checkpoint=str(tmp_path / "else" / "checkpoint-2"))
    assert moved.ledger.num_updates == 4
    assert resumed.ledger.epsilon > moved.ledger.epsilon == whole.ledger.epsilon > 0
    # A second call goes on from what the first has spent.
    moved.train()
    assert moved.ledger.num_updates == 8


def test_a_budget_is_kept_by_a_resumed_run(
    tokenizer: PreTrainedTokenizerFast, processor: ChorusProcessor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    budget = {"mechanism": "laplace", "epsilon": 3.0, "delta": 1e-3}
    saving = {"max_steps": 2, "save_steps": 1, "save_strategy": "steps"}
    trainer = make_trainer(new_model(tokenizer, "bank"), processor, tmp_path, budget, **saving)
    metrics = trainer.train().metrics
    assert 2.95 < metrics["epsilon"] <= 3.0 and metrics["delta"] == 1e-3
    assert f"privacy: spent epsilon {metrics['epsilon']:.4g} at delta 0.001" in capsys.readouterr().err
    again = make_trainer(new_model(tokenizer, "bank"), processor, tmp_path, budget, **saving)
    with pytest.raises(ValueError, match=r"epsilon=3 is spent: the updates so far have spent"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    # More budget: the two lost or kept updates count, and what is left pays for one more.
    budget["epsilon"] = 4.0
    again = make_trainer(new_model(tokenizer, "bank"), processor, tmp_path, budget, **saving)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert again.ledger.num_updates == 3 and 3.9 < again.ledger.epsilon <= 4.0


def test_a_checkpoint_without_privacy_is_refused(
    tokenizer: PreTrainedTokenizerFast, processor: ChorusProcessor, tmp_path: Path
) -> None:
    saving = {"max_steps": 2, "save_steps": 1, "save_strategy": "steps"}
    trainer = make_trainer(new_model(tokenizer, "bank"), processor, tmp_path, LAPLACE, **saving)
    trainer.train()
    path = tmp_path / "checkpoint-1" / "trainer_state.json"
    state = json.loads(path.read_text())
    del state["stateful_callbacks"]["privacy"]
    path.write_text(json.dumps(state))
    with pytest.raises(ValueError, match="checkpoint of step 1 was trained without privacy"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_logs_tell_what_is_spent_and_nothing_of_the_rows(
    tokenizer: PreTrainedTokenizerFast, processor: ChorusProcessor, tmp_path: Path
) -> None:
    protected = make_trainer(new_model(tokenizer, "bank"), processor, tmp_path / "a", LAPLACE)
    metrics = protected.train().metrics
    steps = [entry for entry in protected.state.log_history if "learning_rate" in entry]
    assert len(steps) == 2 and steps[0]["epsilon"] < steps[1]["epsilon"] == protected.ledger.epsilon
    told = {name for entry in [*protected.state.log_history, metrics] for name in entry}
    assert not {"loss", "train_loss", "grad_norm", "token_accuracy", "total_flos"} & told
    assert not [name for name in told if "routing" in name]
    unprotected = make_trainer(
        new_model(tokenizer, "bank"), processor, tmp_path / "b", {**LAPLACE, "log_unprotected": True}
    )
    metrics = unprotected.train().metrics
    assert metrics["train_loss"] > 0
    assert all({"loss", "token_accuracy", "epsilon"} <= entry.keys() for entry in unprotected.state.log_history[:2])


def test_a_planted_secret_is_recovered_without_privacy_and_not_with_it() -> None:
    """Each of 16 names has a code of four digits. An attacker ranks the true code among a hundred, and tells names that
    were learned from names that were not, by how likely the model finds their codes."""
    plain = secrets(0, None, steps=60, batch=16, count=32, probed=6)
    assert plain["rank"] < 1.5 and plain["auc"] > 0.95
    private = PrivacyArguments(use_privacy=True, mechanism="gaussian", noise_multiplier=2.0, accountant="rdp")
    hidden = secrets(0, private, steps=10, batch=8, count=32, probed=6, private_seed=0)
    # Chance: ranks of 50.5 with a standard error of 12, and 0.5 with one of 0.1.
    assert 25 < hidden["rank"] < 76 and 0.3 < hidden["auc"] < 0.7


def test_noise_covers_the_rows_of_a_run(
    tokenizer: PreTrainedTokenizerFast, processor: ChorusProcessor, tmp_path: Path
) -> None:
    """The gradients of two runs on the same rows differ by the noise alone: its deviation is what was asked for."""
    gradients = []
    for noise in (1e-9, 5.0):
        model = new_model(tokenizer, "bank")
        trainer = make_trainer(model, processor, tmp_path, {"noise_multiplier": noise}, max_steps=1, max_grad_norm=0.2)
        trainer.add_callback(steps := Steps())
        trainer.train()
        gradients.append(torch.cat([gradient.flatten() for gradient in steps.gradients[0].values()]))
    noise = gradients[1] - gradients[0]
    # 5 x 0.2 over 4 rows, on some 13,000 numbers.
    assert len(noise) > 10_000
    assert float(noise.std()) == pytest.approx(5.0 * 0.2 / 4, rel=0.03)
