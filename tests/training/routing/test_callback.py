"""The balance bias moves once per optimizer step, the same everywhere; logs tell what the experts do."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForMultimodalLM, TrainerCallback

from chorus_moe import ChorusForContrastive
from chorus_moe.training.lora import lora_config
from chorus_moe.training.recipe import read_recipe
from chorus_moe.training.routing.balance import biased_routers
from chorus_moe.training.routing.callback import RoutingCallback
from chorus_moe.training.routing.observer import RoutingObserver
from chorus_moe.training.train import run_training
from tests.conftest import tiny_config
from tests.fresh_process import ROOT, run_ranks
from tests.training.routing_streams import (
    BIASED,
    make_trainer,
    rewarded_model,
    router_weights,
    skewed_model,
    stack,
    token_rows,
)
from tests.training.test_train import recipe  # noqa: F401  a fixture


def biases(model: nn.Module) -> list[list[float]]:
    """The bias of every layer's common bank, of the router that runs."""
    return [banks["common"].e_score_correction_bias.tolist() for banks in biased_routers(model).values()]


def metric(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def test_a_skewed_stream_is_balanced_without_a_loss(tmp_path: Path) -> None:
    """Nothing else is learnt: the bias alone brings the strongest of four experts from all tokens to under 1.5 / 4."""
    model, rows = skewed_model(router_aux_loss_coef=1.0), token_rows(64)
    settings = {"max_steps": 60, "logging_steps": 10, "learning_rate": 0.0, "per_device_train_batch_size": 16}
    trainer = make_trainer(model, tmp_path, rows, callbacks=[RoutingCallback()], **settings)
    trainer.train()
    shares = metric(trainer, "routing_strongest_share")
    assert shares[0] > 0.9
    assert shares[-1] < 1.5 / 4
    assert model.train()(**stack(rows[:4])).aux_loss is None


def test_without_the_callback_the_bias_never_moves(tmp_path: Path) -> None:
    model = skewed_model()
    make_trainer(model, tmp_path, token_rows(8)).train()
    assert biases(model) == [[0.0] * 4] * 2


def test_the_bias_moves_once_per_optimizer_step_whatever_the_accumulation(tmp_path: Path) -> None:
    found = []
    for accumulation in (1, 2, 8):
        model = skewed_model()
        sizes = {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}
        make_trainer(
            model, tmp_path, token_rows(16), callbacks=[RoutingCallback()], max_steps=2, learning_rate=0.0, **sizes
        ).train()
        found.append(biases(model))
    assert found[0] == found[1] == found[2]
    # Twice 0.02 down for the expert that has most tokens, twice 0.02 up for the one that has fewest.
    assert max(found[0][0]) - min(found[0][0]) == pytest.approx(0.08, abs=1e-7)


class Evaluations(TrainerCallback):
    """Notes the bias before and after every evaluation."""

    def __init__(self) -> None:
        self.before: list[Any] = []
        self.after: list[Any] = []

    def on_step_end(self, *_: Any, model: nn.Module, **__: Any) -> None:
        self.before.append(biases(model))

    def on_evaluate(self, *_: Any, model: nn.Module, **__: Any) -> None:
        self.after.append(biases(model))


def test_evaluation_moves_and_counts_nothing(tmp_path: Path) -> None:
    runs = {}
    for strategy in ("no", "steps"):
        model, notes = skewed_model(), Evaluations()
        trainer = make_trainer(
            model,
            tmp_path,
            token_rows(16),
            callbacks=[RoutingCallback(), notes],
            eval_strategy=strategy,
            eval_steps=1,
            logging_steps=1,
        )
        trainer.train()
        assert notes.after == (notes.before if strategy == "steps" else [])
        runs[strategy] = biases(model), metric(trainer, "routing_load_entropy")
    assert runs["no"] == runs["steps"]
    assert len(runs["no"][1]) == 4


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_a_resumed_run_has_the_bias_of_an_uninterrupted_one_bit_for_bit(kind: str, tmp_path: Path) -> None:
    def build() -> nn.Module:
        model = skewed_model()
        if kind == "full":
            return model
        return get_peft_model(model, lora_config(model, banks="all", router="train", verbose=False))

    def trainer_of(model: nn.Module) -> Any:
        settings = {"save_strategy": "steps", "save_steps": 2, "logging_steps": 1}
        return make_trainer(model, tmp_path, token_rows(16), callbacks=[RoutingCallback()], **settings)

    whole, resumed = build(), build()
    trainer_of(whole).train()
    trainer_of(resumed).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert biases(whole) == biases(resumed) != [[0.0] * 4] * 2
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name

    checkpoint = tmp_path / "checkpoint-4"
    if kind == "full":
        loaded: nn.Module = AutoModelForMultimodalLM.from_pretrained(checkpoint)
    else:
        loaded = PeftModel.from_pretrained(skewed_model(), checkpoint, is_trainable=True)
    assert biases(loaded) == biases(whole)


def test_a_frozen_router_keeps_its_bias(tmp_path: Path) -> None:
    model = skewed_model()
    adapted = get_peft_model(model, lora_config(model, banks="all", router="frozen", verbose=False))
    make_trainer(adapted, tmp_path, token_rows(8), callbacks=[RoutingCallback()]).train()
    assert biases(adapted) == [[0.0] * 4] * 2


def test_of_two_adapters_the_bias_of_the_trained_one_moves(tmp_path: Path) -> None:
    model = skewed_model()
    options = lora_config(model, banks="all", router="train", verbose=False)
    adapted = get_peft_model(model, options, adapter_name="first")
    adapted.add_adapter("second", options)
    adapted.set_adapter("first")
    make_trainer(adapted, tmp_path, token_rows(8), callbacks=[RoutingCallback()]).train()
    moved = {
        name.rpartition(".router.")[2]
        for name, tensor in adapted.named_buffers()
        if name.endswith("e_score_correction_bias") and tensor.any()
    }
    assert moved == {"modules_to_save.first.e_score_correction_bias"}


def test_a_bias_that_a_checkpoint_would_lose_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = skewed_model()
    adapted = get_peft_model(model, lora_config(model, banks="all", router="frozen", verbose=False))
    for name, parameter in adapted.named_parameters():
        if ".router." in name:
            parameter.requires_grad_(True)
    from transformers.utils import logging

    logging.enable_propagation()
    make_trainer(adapted, tmp_path, token_rows(8), callbacks=[RoutingCallback()], max_steps=1).train()
    logging.disable_propagation()
    assert "router of expert bank 'common' in layer 1 is trained" in caplog.text


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_layers_move_the_bias_once(tmp_path: Path, use_reentrant: bool) -> None:
    found = []
    for checkpointing in (False, True):
        model = skewed_model(router_aux_loss_coef=0.0)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        callback = RoutingCallback()
        make_trainer(model, tmp_path, token_rows(16), callbacks=[callback], logging_steps=1).train()
        found.append((biases(model), [bank.choices_ME.tolist() for bank in callback.last.all()]))
    assert found[0] == found[1]


class Tracker(TrainerCallback):
    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        self.seen.append(dict(logs))


def test_trackers_and_history_get_the_metrics_of_training_alone(tmp_path: Path) -> None:
    trainer = make_trainer(
        skewed_model(),
        tmp_path,
        token_rows(16),
        callbacks=[tracker := Tracker()],
        logging_steps=2,
        eval_strategy="epoch",
    )
    RoutingCallback.add_to(trainer)
    trainer.train()
    for logs in (tracker.seen, trainer.state.log_history):
        assert all(("loss" in entry) == ("routing_load_entropy" in entry) for entry in logs)
        assert sum("routing_load_entropy" in entry for entry in logs) == 2


def test_a_log_counts_the_tokens_since_the_log_before(tmp_path: Path) -> None:
    callback = RoutingCallback()
    make_trainer(skewed_model(), tmp_path, token_rows(16), callbacks=[callback], logging_steps=2).train()
    # Two steps of four rows of 16 tokens.
    assert [int(bank.tokens_M.sum()) for bank in callback.last.all()] == [2 * 4 * 16] * 2


def test_nothing_is_left_on_the_model_after_training(tmp_path: Path) -> None:
    model = skewed_model()
    make_trainer(model, tmp_path, token_rows(8), callbacks=[RoutingCallback()]).train()
    assert not model.model.language_model._forward_pre_hooks


def test_a_recipe_moves_the_bias_by_itself(recipe: Path) -> None:  # noqa: F811
    values = json.loads((recipe.parent / "tiny.json").read_text())
    values["text_config"]["expert_banks"] = {"common": {"balance": "bias", "bias_update_rate": 0.01}}
    (recipe.parent / "tiny.json").write_text(json.dumps(values))
    run_training(read_recipe(recipe, ["--max_steps", "2", "--save_strategy", "no"]))
    loaded = AutoModelForMultimodalLM.from_pretrained(recipe.parent / "out")
    assert all(any(bias) for bias in biases(loaded))


def test_the_contrastive_head_is_balanced_over_all_its_runs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = ChorusForContrastive(tiny_config(expert_banks=BIASED)).train()
    with RoutingObserver(model, training_only=True) as observer:
        model(input_ids=torch.randint(5, 128, (2, 6)), pixel_values=torch.randn(2, 3, 32, 32))
    # Two texts of six tokens, two images of four.
    assert [bank.tokens_M.tolist() for bank in observer.counters.all()] == [[12, 8, 0]] * 2


@pytest.mark.slow
def test_two_processes_move_the_bias_as_one_does(tmp_path: Path) -> None:
    """Each rank sees half of the batch; the integer counts of both make one step, the same on both."""
    for done in run_ranks(ROOT / "tests/training/distributed_routing.py", [str(tmp_path)], cwd=tmp_path):
        assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("rank*.json"))]

    model = skewed_model()
    settings = {"per_device_train_batch_size": 8, "learning_rate": 0.0, "logging_steps": 1, "max_steps": 6}
    callback = RoutingCallback()
    trainer = make_trainer(model, tmp_path / "one", token_rows(48), callbacks=[callback], **settings)
    trainer.train()
    expected: dict[str, list[Any] | Tensor] = {
        "biases": biases(model),
        "choices": [bank.choices_ME.tolist() for bank in callback.last.all()],
        "strongest": metric(trainer, "routing_strongest_share"),
    }
    rewarded = [rank.pop("rewarded") for rank in found]
    assert found == [expected, expected]
    # Every rank draws for itself; the gradients are averaged, so the routers stay the same on both.
    assert rewarded[0] == rewarded[1] != router_weights(rewarded_model())
