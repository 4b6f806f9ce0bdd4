"""Further terms of the loss: weighted, the same under accumulation, logged, and their parameters saved and resumed."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, TrainingArguments

from chorus_moe import ChorusProcessor
from chorus_moe.training.collator import ChorusDataCollator
from chorus_moe.training.objectives.objective import FILE, Objective
from chorus_moe.training.trainer import ChorusTrainer
from tests.training.conftest import make_model
from tests.training.test_checkpoints import SETTINGS

TEXTS = ("three", "four five three", "five", "four three four three")
ROWS = [
    {"messages": [{"role": "user", "content": "what is it?"}, {"role": "assistant", "content": text}]} for text in TEXTS
]


class Level(Objective):
    """Pulls the labelled logits to a level that is learned as well."""

    by_labels = True

    def __init__(self, name: str = "level", weight: float = 0.5):
        super().__init__(name, weight)
        self.level = nn.Parameter(torch.ones(3))

    def forward(self, model: nn.Module, inputs: Any, outputs: Any) -> Tensor:
        is_labelled = inputs["labels"][:, 1:] != -100
        assert outputs.hidden_states is not None
        return (outputs.logits[:, :-1][is_labelled].mean(-1) - self.level.sum()).square().mean()

    def forward_options(self) -> dict[str, Any]:
        return {"output_hidden_states": True}


class Frozen(Objective):
    def check(self, model: nn.Module, processor: ChorusProcessor) -> None:
        raise ValueError("this model cannot")


@pytest.fixture
def parts(tokenizer: PreTrainedTokenizerFast, processor: ChorusProcessor) -> dict[str, Any]:
    model = make_model(tokenizer, router_aux_loss_coef=0.0, router_z_loss_coef=0.0, alignment_loss_coef=0.0)
    return {
        "model": model,
        "data_collator": ChorusDataCollator(processor),
        "train_dataset": ROWS,
        "processing_class": processor,
    }


def trainer_of(parts: dict[str, Any], folder: Path, objectives: list[Objective], **settings: Any) -> ChorusTrainer:
    given = SETTINGS | {"weight_decay": 0.0, "save_strategy": "no"} | settings
    return ChorusTrainer(args=TrainingArguments(str(folder), **given), objectives=objectives, **parts)


def test_the_term_is_added_with_its_weight(parts: dict[str, Any], tmp_path: Path) -> None:
    objective = Level(weight=0.5)
    trainer = trainer_of(parts, tmp_path, [objective])
    model, batch = trainer.model.train(), parts["data_collator"](ROWS)
    plain = model(**batch).loss
    outputs = model(**batch, output_hidden_states=True)
    torch.testing.assert_close(trainer.compute_loss(model, batch), plain + 0.5 * objective(model, batch, outputs))
    torch.testing.assert_close(trainer.compute_loss(model.eval(), batch), plain)


def test_accumulated_micro_batches_equal_one_batch(parts: dict[str, Any], tmp_path: Path) -> None:
    start, found = {k: v.clone() for k, v in parts["model"].state_dict().items()}, []
    for size in (4, 1):
        parts["model"].load_state_dict(start)
        objective = Level()
        # Plain descent: Adam's first step has the size of the rate, whatever the gradient.
        options = {"optim": "sgd", "max_steps": 1, "max_grad_norm": 0.0, "learning_rate": 0.1}
        trainer = trainer_of(parts, tmp_path, [objective], per_device_train_batch_size=size,
                             gradient_accumulation_steps=4 // size, **options)  # fmt: skip
        trainer.train()
        found.append({**{k: v.clone() for k, v in parts["model"].state_dict().items()}, "level": objective.level.data})
    whole, accumulated = found
    assert not torch.equal(whole["level"], torch.ones(3))
    # Sums in another order: 2e-8 was the worst.
    torch.testing.assert_close(accumulated, whole, rtol=0, atol=1e-6)


def test_own_gradients_do_not_pile_up(parts: dict[str, Any], tmp_path: Path) -> None:
    """With a model that stands still, each step of plain descent moves the level by the gradient of that step."""
    for parameter in parts["model"].parameters():
        parameter.requires_grad_(False)
    parts["model"].lm_head.weight.requires_grad_(True)
    objective = Level(weight=1.0)
    trainer = trainer_of(parts, tmp_path, [objective], optim="sgd", max_steps=3, learning_rate=0.01,
                         per_device_train_batch_size=4, lr_scheduler_type="constant",
                         max_grad_norm=0.0)  # fmt: skip
    trainer.create_optimizer()
    # What is left of the model's own loss does not move it.
    trainer.optimizer.param_groups[0]["lr"] = trainer.optimizer.param_groups[1]["lr"] = 0.0
    batch = parts["data_collator"](ROWS)
    with torch.no_grad():
        logits = parts["model"].train()(**batch).logits[:, :-1][batch["labels"][:, 1:] != -100].mean(-1)
    level = torch.ones(3)
    for _ in range(3):
        level = level - 0.01 * 2 * (level.sum() - logits).mean()
    trainer.train()
    torch.testing.assert_close(objective.level.data, level, rtol=0, atol=1e-5)


def test_own_gradients_are_clipped_and_count_in_the_norm(parts: dict[str, Any], tmp_path: Path) -> None:
    objective = Level(weight=1000.0)
    options = {"optim": "sgd", "max_steps": 1, "max_grad_norm": 0.5, "learning_rate": 1.0, "logging_steps": 1}
    trainer = trainer_of(parts, tmp_path, [objective], per_device_train_batch_size=4, **options)
    trainer.train()
    torch.testing.assert_close((objective.level.data - 1).norm(), torch.tensor(0.5), rtol=1e-5, atol=0)
    assert next(entry["grad_norm"] for entry in trainer.state.log_history if "loss" in entry) > 1000


def test_the_mean_of_each_term_is_logged_by_its_name(parts: dict[str, Any], tmp_path: Path) -> None:
    trainer = trainer_of(parts, tmp_path, [Level("first"), Level("second", weight=0.1)], logging_steps=2)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 2 and all(math.isfinite(entry["first"]) and "second" in entry for entry in logs)


def test_own_parameters_are_resumed_bit_for_bit(
    parts: dict[str, Any], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    found = []
    for name in ("whole", "resumed"):
        objective = Level()
        # Trainers put their dropout's and rows' order into the model's process, so each has a model of its own.
        parts["model"] = make_model(tokenizer, attention_dropout=0.1)
        trainer = trainer_of(parts, tmp_path / "run", [objective], save_strategy="steps")
        trainer.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2") if name == "resumed" else None)
        found.append((objective.level.data, trainer.model.state_dict()))
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(tensor, found[1][1][name]) for name, tensor in found[0][1].items())
    manifest = json.loads((tmp_path / "run/checkpoint-4/manifest.json").read_text())
    assert FILE in manifest["files"]
    assert torch.equal(load_file(tmp_path / "run/checkpoint-4" / FILE)["0.level"], found[0][0])


def test_a_checkpoint_of_other_objectives_is_refused(parts: dict[str, Any], tmp_path: Path) -> None:
    trainer_of(parts, tmp_path / "run", [], save_strategy="steps").train()
    with pytest.raises(ValueError, match="written with other objectives: 0 tensors, this run has 1; .*'0.level'"):
        trainer_of(parts, tmp_path / "run", [Level()]).objectives.load(str(tmp_path / "run/checkpoint-2"))


@pytest.mark.parametrize("weight", [0.0, -1.0, math.inf, math.nan])
def test_a_weight_that_is_none_is_refused(weight: float) -> None:
    with pytest.raises(ValueError, match=f"objective 'level': its weight must be positive and finite, found {weight}"):
        Level(weight=weight)


def test_what_cannot_be_trained_is_refused_before_the_first_step(parts: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="this model cannot"):
        trainer_of(parts, tmp_path, [Frozen("frozen")])
    with pytest.raises(ValueError, match="two objectives are called 'level'"):
        trainer_of(parts, tmp_path, [Level(), Level()])
