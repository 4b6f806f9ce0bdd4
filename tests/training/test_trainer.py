"""What ChorusTrainer does around a step, with a parent of our own in the place of transformers' Trainer."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import TrainingArguments

from chorus_moe.training import trainer as module
from chorus_moe.training.guards.steps import StepGuard, TrainingBroke
from chorus_moe.training.objectives.objective import Objective, ObjectiveTerms
from chorus_moe.training.results.tokens import TokenAccuracy
from chorus_moe.training.scale.trainer import SpreadTrainer
from chorus_moe.training.trainer import MEMORY, ChorusTrainer

Patch = Callable[..., list[Any]]


@pytest.fixture
def parent(monkeypatch: pytest.MonkeyPatch) -> Patch:
    """Replace a method of the parents; what it was called with is returned."""

    def replace(name: str, answer: Any = None) -> list[Any]:
        seen: list[Any] = []

        def method(self: Any, *given: Any, **options: Any) -> Any:
            seen.append(given)
            return answer

        kind = TokenAccuracy if name in vars(TokenAccuracy) else SpreadTrainer
        monkeypatch.setattr(kind, name, method)
        return seen

    return replace


class Term(Objective):
    columns = ("masked",)

    def forward_options(self) -> dict[str, Any]:
        return {"output_hidden_states": True}


def trainer(folder: Path | None = None, objectives: Any = (), **values: Any) -> Any:
    made = ChorusTrainer.__new__(ChorusTrainer)
    state = SimpleNamespace(stateful_callbacks={}, global_step=4)
    args = SimpleNamespace(output_dir=str(folder), process_index=2, max_grad_norm=1.0, should_save=True)
    accelerator = SimpleNamespace(scaler=None, sync_gradients=True, num_processes=6)
    given = {"rates": None, "guard": None, "tasks": None, "state": state, "args": args, "_batches": []}
    vars(made).update(given | {"accelerator": accelerator, "objectives": ObjectiveTerms(objectives)} | values)
    return made


@pytest.mark.parametrize("has_terms", [True, False])
@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("return_outputs", [True, False])
def test_terms_are_added_in_training_alone(
    has_terms: bool, is_training: bool, return_outputs: bool, parent: Patch, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = parent("compute_loss", (torch.tensor(1.0), "outputs") if is_training and has_terms else "as it is")
    monkeypatch.setattr(ObjectiveTerms, "loss", lambda self, *given: seen.append(given) or torch.tensor(0.5))
    made = trainer(objectives=[Term("t")] if has_terms else (), model_accepts_loss_kwargs=False)
    model, inputs = nn.Linear(1, 1).train(is_training), {"input_ids": 1, "masked": 2}
    found = made.compute_loss(model, inputs, return_outputs, 8)
    if not (has_terms and is_training):
        assert found == "as it is" and seen == [(model, inputs, return_outputs, 8)]
        return
    asked = {"input_ids": 1, "output_hidden_states": True}
    assert seen[0] == (model, asked, True, 8)
    # The terms get all columns, and one share of the whole.
    assert seen[1] == (model, inputs, "outputs", 1.0, 8, 1)
    loss = found[0] if return_outputs else found
    assert loss.item() == 1.5 and (not return_outputs or found[1] == "outputs")


@pytest.mark.parametrize(
    ("accepts", "items", "averages", "share", "ranks"),
    [
        (True, 8, True, 0.25, 3),
        (True, 8, False, 0.25, 1),
        (True, None, True, 1.0, 1),
        (False, 8, True, 1.0, 1),
    ],
)
def test_terms_know_their_share_of_the_step(
    accepts: bool, items: int | None, averages: bool, share: float, ranks: int,
    parent: Patch, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    parent("compute_loss", (torch.tensor(1.0), "outputs"))
    seen: list[Any] = []
    monkeypatch.setattr(ObjectiveTerms, "loss", lambda self, *given: seen.append(given) or torch.tensor(0.5))
    monkeypatch.setattr(ChorusTrainer, "get_tp_size", lambda self: 2)
    options = {"model_accepts_loss_kwargs": accepts, "current_gradient_accumulation_steps": 4}
    made = trainer(objectives=[Term("t")], **options)
    made.args.average_tokens_across_devices = averages
    made.compute_loss(nn.Linear(1, 1), {}, False, items)
    assert seen[0][3:] == (share, items, ranks)


def test_the_batches_of_a_step_are_kept_only_for_a_guard(parent: Patch) -> None:
    seen = parent("training_step", torch.tensor(2.0))
    for guard, kept in ((None, []), (StepGuard(), [{"a": 1}])):
        made = trainer(guard=guard)
        assert made.training_step("model", {"a": 1}, 5).item() == 2
        assert made._batches == kept
    assert seen == [("model", {"a": 1}, 5)] * 2


@pytest.mark.parametrize(("is_last", "ends"), [(True, 1), (False, 0)])
def test_tasks_end_a_step_with_its_last_micro_batch(is_last: bool, ends: int, parent: Patch) -> None:
    parent("training_step", torch.tensor(2.0))
    ended: list[Any] = []
    made = trainer(tasks=SimpleNamespace(end_step=lambda: ended.append(1)))
    made.accelerator.sync_gradients = is_last
    made.training_step("model", {})
    assert len(ended) == ends


def guarded(folder: Path, max_skipped_steps: int = 10) -> Any:
    made = trainer(folder, guard=StepGuard(max_skipped_steps=max_skipped_steps), model=nn.Linear(2, 1))
    made.model(torch.ones(1, 2)).sum().backward()
    made._batches = [{"input_ids": torch.tensor([[3]]), "text": "no tensor"}, {"input_ids": torch.tensor([[4]])}]
    return made


def test_a_step_that_would_break_the_run_is_taken_out_and_kept(parent: Patch, tmp_path: Path) -> None:
    parent("_get_grad_norm", math.nan)
    made = guarded(tmp_path)
    assert made.num_skipped_steps == 0
    assert math.isnan(made._get_grad_norm(made.model))
    assert made.num_skipped_steps == 1 and made._batches == []
    assert [parameter.grad for parameter in made.model.parameters()] == [None, None]
    with safe_open(tmp_path / "guards" / "step-5-rank-2.safetensors", "pt") as file:
        assert sorted(file.keys()) == ["0.input_ids", "1.input_ids"] and file.get_tensor("1.input_ids").item() == 4
        assert file.metadata()["step"] == "5"
    report = json.loads((tmp_path / "guards" / "report.json").read_text())
    assert report == [{"step": 5, "norm": "nan", "typical_norm": None}]
    with pytest.raises(TrainingBroke, match="1 of the last 5 steps were skipped"):
        guarded(tmp_path / "other", 0)._get_grad_norm(None)


@pytest.mark.parametrize(("norm", "scaler"), [(0.5, None), (math.inf, object()), (0.5, object())])
def test_other_steps_and_overflows_of_float16_are_left_to_the_optimizer(
    norm: float, scaler: object, parent: Patch, tmp_path: Path
) -> None:
    parent("_get_grad_norm", torch.tensor(norm))
    made = guarded(tmp_path)
    made.accelerator.scaler = scaler
    assert made._get_grad_norm(made.model) == norm and made._batches == []
    assert all(parameter.grad is not None for parameter in made.model.parameters())
    assert made.num_skipped_steps == 0 and not any(tmp_path.iterdir())
    # What overflowed is no norm to compare others with.
    norms = made.state.stateful_callbacks.get(MEMORY, {}).get("norms")
    assert norms == (None if math.isinf(norm) else [norm])


def test_parameters_of_terms_count_in_the_norm(parent: Patch, monkeypatch: pytest.MonkeyPatch) -> None:
    parent("_get_grad_norm", torch.tensor(3.0))
    asked: list[float] = []
    monkeypatch.setattr(ObjectiveTerms, "settle_gradients", lambda self, most: asked.append(most) or 4.0)
    assert float(trainer()._get_grad_norm(None)) == 3.0 and asked == []
    assert trainer(objectives=[Term("t")])._get_grad_norm(None) == 5.0 and asked == [1.0]


@pytest.mark.parametrize("has_tasks", [True, False])
def test_means_are_logged_beside_a_loss_alone(has_tasks: bool, parent: Patch, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = parent("log")
    monkeypatch.setattr(ObjectiveTerms, "take_means", lambda self: {"t": 2.0})
    made = trainer(tasks=SimpleNamespace(take_figures=lambda: {"task": 3.0}) if has_tasks else None)
    made.log({"loss": 1.0}, 5.0)
    made.log({"eval_loss": 1.0})
    own = {"loss": 1.0, "t": 2.0} | ({"task": 3.0} if has_tasks else {})
    assert [given[0] for given in seen] == [own, {"eval_loss": 1.0}]


def test_tasks_bring_a_sampler_of_their_own_and_take_their_column(parent: Patch) -> None:
    parent("_get_train_sampler", "stock")
    parent("_prepare_inputs", {"a": 1})
    taken: list[Any] = []
    assert trainer()._get_train_sampler() == "stock" and trainer()._prepare_inputs({}) == {"a": 1}
    made = trainer(tasks=SimpleNamespace(sampler="own", take_tasks=taken.append))
    assert made._get_train_sampler() == "own" and made._prepare_inputs({}) == {"a": 1} and taken == [{"a": 1}]


def test_an_average_is_saved_where_an_optimizer_has_one(parent: Patch) -> None:
    said: list[str] = []
    saved, checkpoints = parent("save_model"), parent("_save_checkpoint")
    made = trainer(optimizer=SimpleNamespace(eval=lambda: said.append("averaged")))
    made.save_model("folder", True)
    made._save_checkpoint("model", None)
    assert said == ["averaged"] * 2 and saved == [("folder", True)] and checkpoints == [("model", None)]
    plain = trainer(optimizer=SimpleNamespace(eval=3))
    plain.save_model()
    assert saved[1] == (None, False)


@pytest.mark.parametrize(("should_save", "count"), [(True, 1), (False, 0)])
def test_terms_are_saved_by_one_and_read_by_all(
    should_save: bool, count: int, parent: Patch, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved, loaded = [], []
    monkeypatch.setattr(ObjectiveTerms, "save", lambda self, folder: saved.append(folder))
    monkeypatch.setattr(ObjectiveTerms, "load", lambda self, folder: loaded.append(folder))
    parent("_save_optimizer_and_scheduler")
    parent("_load_optimizer_and_scheduler")
    made = trainer()
    made.args.should_save = should_save
    made._save_optimizer_and_scheduler("f")
    made._load_optimizer_and_scheduler(None)
    made._load_optimizer_and_scheduler("g")
    assert saved == ["f"] * count and loaded == ["g"]


class Learned(Term):
    def __init__(self, name: str, rate: float | None):
        super().__init__(name)
        self.scale, self.learning_rate = nn.Parameter(torch.zeros(1)), rate


def test_terms_learn_at_their_own_rate_or_the_runs(parent: Patch) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5, weight_decay=0.1)
    parent("create_optimizer", optimizer)
    terms = [Learned("a", 0.25), Term("b"), Learned("c", None)]
    options: Any = {"optimizer": None, "is_distributed_loading_by_transformers": False, "model": nn.Linear(1, 1)}
    made = trainer(objectives=terms, **options)
    made.args.learning_rate = 0.5
    assert made.create_optimizer() is optimizer
    groups = [(group["params"], group["lr"], group["weight_decay"]) for group in optimizer.param_groups[1:]]
    assert groups == [([terms[0].scale], 0.25, 0.0), ([terms[2].scale], 0.5, 0.0)]
    # One that is there already has them.
    made.optimizer = optimizer
    made.create_optimizer()
    assert len(optimizer.param_groups) == 3
    spread = trainer(objectives=terms, **options | {"is_distributed_loading_by_transformers": True})
    with pytest.raises(ValueError, match="a learns parameters of its own, which fsdp and tensor do not spread"):
        spread.create_optimizer()


def test_rates_split_the_groups_of_a_new_optimizer(parent: Patch, monkeypatch: pytest.MonkeyPatch) -> None:
    parent("create_optimizer", "optimizer")
    seen: list[Any] = []
    monkeypatch.setattr(module, "split_groups", lambda *given: seen.append(given))
    rates = SimpleNamespace(of_parameters=lambda model, rate: (model, rate))
    made = trainer(rates=rates, optimizer=None, model="own")
    made.args.learning_rate = 0.5
    made.create_optimizer()
    made.create_optimizer("given")
    made.optimizer = "there"
    made.create_optimizer()
    assert seen == [("optimizer", name, (name, 0.5)) for name in ("own", "given")]


def test_prodigy_is_made_of_the_runs_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = ModuleType("prodigyopt")
    vars(stand_in)["Prodigy"] = kind = type("Prodigy", (), {})
    monkeypatch.setitem(sys.modules, "prodigyopt", stand_in)
    settings: dict[str, Any] = {"learning_rate": 0.5, "adam_beta1": 0.8, "adam_beta2": 0.7, "adam_epsilon": 1e-3}
    args: Any = SimpleNamespace(optim=module.PRODIGY, weight_decay=0.25, **settings)
    expected = {"lr": 0.5, "weight_decay": 0.25, "betas": (0.8, 0.7), "eps": 1e-3}
    assert ChorusTrainer.get_optimizer_cls_and_kwargs(args) == (kind, expected)
    stock = TrainingArguments(str(tmp_path), optim="adamw_torch", report_to="none", use_cpu=True, **settings)
    found, options = ChorusTrainer.get_optimizer_cls_and_kwargs(stock)
    assert found is torch.optim.AdamW and (options["lr"], options["betas"], options["eps"]) == (0.5, (0.8, 0.7), 1e-3)
