"""Runs with tasks: the same at any accumulation and number of processes, to the bit after a checkpoint."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, TrainingArguments

from chorus_moe import ChorusProcessor
from chorus_moe.surgery.processor import processor_from_config
from chorus_moe.training.collator import ChorusDataCollator
from chorus_moe.training.guards.steps import StepGuard
from chorus_moe.training.lora import lora_config
from chorus_moe.training.recipe import TRAINER_SETTINGS, read_recipe
from chorus_moe.training.releases import CHECKPOINTING
from chorus_moe.training.stages import check_stages, read_stages
from chorus_moe.training.tasks.arguments import TaskArguments
from chorus_moe.training.tasks.learning import TASK_IDS, task_columns
from chorus_moe.training.tasks.plan import plan_tasks
from chorus_moe.training.train import run_training
from chorus_moe.training.trainer import ChorusTrainer
from tests.fresh_process import ROOT, run_ranks
from tests.training.conftest import make_model, make_rows, make_tokenizer
from tests.training.guards.test_steps import pretend_float16
from tests.training.test_data import write_jsonl
from tests.training.test_train import GradientRecorder, assert_equal, recipe  # noqa: F401  a fixture

TASKS = ("see", "hear", "both")
# What two processes are tried with; `aligned_mtl` exchanges what `pcgrad` does.
DISTRIBUTED = ("fixed", "rate", "uncertainty", "pcgrad")
KINDS: dict[str, dict[str, Any]] = {
    "fixed": {"task_weights": '{"see": 2.5}', "task_temperature": 3.0},
    "rate": {"task_weighting": "rate", "task_rate_steps": 1},
    "uncertainty": {"task_weighting": "uncertainty"},
    "pcgrad": {"task_conflicts": "pcgrad"},
    "aligned_mtl": {"task_conflicts": "aligned_mtl"},
}


def task_rows(count: int = 9) -> list[dict[str, Any]]:
    """More rows of the first task than of the others."""
    return [{**row, "task": TASKS[index % 3]} for index, row in enumerate(make_rows(count)) if index % 9 not in (4, 5)]


def trainer_of(
    model: nn.Module,
    processor: ChorusProcessor,
    folder: Path,
    options: dict[str, Any] | None = None,
    rows: list[dict[str, Any]] | None = None,
    guard: StepGuard | None = None,
    **settings: Any,
) -> ChorusTrainer:
    rows = task_rows() if rows is None else rows
    defaults = {"max_steps": 6, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "save_steps": 5}
    quiet = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "logging_steps": 1}
    plan = None if options is None else plan_tasks(TaskArguments(**options), rows)
    return ChorusTrainer(
        model,
        TrainingArguments(str(folder), **{**TRAINER_SETTINGS, **quiet, **defaults, **settings}),
        data_collator=ChorusDataCollator(processor, more=[task_columns(plan.names)] if plan else ()),
        train_dataset=rows,
        eval_dataset=rows[:4],
        processing_class=processor,
        tasks=plan,
        guard=guard,
    )


def linear_model(tokenizer: PreTrainedTokenizerFast) -> nn.Module:
    """A model whose loss is a sum over rows: balance losses are none."""
    return make_model(tokenizer, router_aux_loss_coef=0.0, router_z_loss_coef=0.0)


def gradients_of(trainer: ChorusTrainer) -> dict[str, Tensor]:
    trainer.add_callback(recorder := GradientRecorder())
    trainer.train()
    return recorder.gradients


ONE_STEP = {"max_steps": 1, "max_grad_norm": 0.0, "save_strategy": "no"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_ends_at_the_same_bits(
    kind: str, tokenizer: PreTrainedTokenizerFast, processor: ChorusProcessor, tmp_path: Path
) -> None:
    # The checkpoint lies in the second epoch of four steps; dropout shows whether random states are restored.
    ends = []
    for checkpoint in (None, str(tmp_path / "checkpoint-5")):
        model = make_model(tokenizer, attention_dropout=0.1)
        trainer = trainer_of(model, processor, tmp_path, KINDS[kind], guard=StepGuard(), max_steps=9)
        trainer.train(resume_from_checkpoint=checkpoint)
        ends.append(trainer)
    assert_equal(ends[0].model, ends[1].model)
    last = [trainer.state.log_history[-2] for trainer in ends]
    assert {name: last[0][name] for name in last[0] if name.startswith("task_")} == {
        name: last[1][name] for name in last[1] if name.startswith("task_")
    }


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_do_not_depend_on_accumulation(
    kind: str, tokenizer: PreTrainedTokenizerFast, processor: ChorusProcessor, tmp_path: Path
) -> None:
    found = []
    for accumulation in (1, 3):
        sizes = {"per_device_train_batch_size": 6 // accumulation, "gradient_accumulation_steps": accumulation}
        trainer = trainer_of(linear_model(tokenizer), processor, tmp_path, KINDS[kind], **ONE_STEP, **sizes)
        found.append(gradients_of(trainer))
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        # The same float32 sums in another order.
        torch.testing.assert_close(found[1][name], gradient, atol=1e-5, rtol=1e-3, msg=name)


def gradients_by_hand(tokenizer: PreTrainedTokenizerFast, processor: ChorusProcessor, rows: list[Any]) -> list[Any]:
    """What each task's rows alone send back from the loss of the whole batch; None where they send nothing."""
    batch = ChorusDataCollator(processor)(rows)
    count, found = (batch["labels"][:, 1:] != -100).sum(), []
    for task in sorted(TASKS):
        model = linear_model(tokenizer).train()
        others = torch.tensor([row["task"] != task for row in rows])
        labels = batch["labels"].masked_fill(others[:, None], -100)
        model(**{**batch, "labels": labels}, num_items_in_batch=count).loss.backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    return found


def test_pcgrad_of_a_model_is_that_of_gradients_taken_by_hand(
    tokenizer: PreTrainedTokenizerFast, processor: ChorusProcessor, tmp_path: Path
) -> None:
    rows = [row for row in task_rows() if row["task"] != "both"][:5]
    by_task = gradients_by_hand(tokenizer, processor, rows)[1:]  # "both" has no rows
    shared = [
        name for name in by_task[0] if all(g[name] is not None and float(g[name].abs().sum()) > 0 for g in by_task)
    ]
    hear, see = (torch.cat([gradients[name].flatten() for name in shared]) for gradients in by_task)
    weights = (1.0, 1.0)
    if (product := hear @ see) < 0:
        weights = (1 - float(product / (hear @ hear)), 1 - float(product / (see @ see)))
    trainer = trainer_of(
        linear_model(tokenizer),
        processor,
        tmp_path,
        KINDS["pcgrad"],
        rows,
        **ONE_STEP,
        per_device_train_batch_size=len(rows),
    )
    found = gradients_of(trainer)
    for name, gradient in found.items():
        parts = [0 if g[name] is None else g[name] for g in by_task]
        expected = sum(w * part for w, part in zip(weights if name in shared else (1, 1), parts, strict=True))
        torch.testing.assert_close(gradient, expected + torch.zeros_like(gradient), atol=1e-5, rtol=1e-3, msg=name)
    own = [name for name in found if ".banks.image.experts." in name]
    assert own and not set(own) & set(shared)
    cosines = trainer.state.log_history[0]
    assert cosines["grad_cosine/common/hear-see"] == pytest.approx(
        float(cosine_of(by_task, [name for name in found if ".banks.common." in name])), abs=1e-4
    )
    assert "grad_cosine/image/hear-see" not in cosines


def cosine_of(by_task: list[Any], names: list[str]) -> Tensor:
    a, b = (torch.cat([gradients[name].flatten() for name in names]) for gradients in by_task)
    return nn.functional.cosine_similarity(a, b, dim=0)


def test_tasks_with_weights_of_one_are_the_run_without_them(
    tokenizer: PreTrainedTokenizerFast, processor: ChorusProcessor, tmp_path: Path
) -> None:
    rows, settings = task_rows(), {**ONE_STEP, "per_device_train_batch_size": 7}
    balanced = {"router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.1}
    found = [
        gradients_of(trainer_of(make_model(tokenizer, **balanced), processor, tmp_path, options, rows, **settings))
        for options in (None, {}, {"task_conflicts": "measure"})
    ]
    for name, gradient in found[0].items():
        for other in found[1:]:
            # The batch has all rows, in another order.
            torch.testing.assert_close(other[name], gradient, atol=2e-5, rtol=1e-3, msg=name)


def test_evaluation_is_that_of_a_run_without_tasks(
    tokenizer: PreTrainedTokenizerFast, processor: ChorusProcessor, tmp_path: Path
) -> None:
    model = make_model(tokenizer)
    plain = trainer_of(model, processor, tmp_path).evaluate()["eval_loss"]
    rows = [*task_rows(), {**make_rows(1)[0], "task": "see"}]
    trainer = trainer_of(model, processor, tmp_path, {"task_weights": '{"see": 9}'}, rows, learning_rate=0.0)
    # Rows that are only evaluated need no task.
    trainer.eval_dataset = [{**row, "task": None} for row in task_rows()[:4]]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(plain, rel=1e-6)


def test_uncertainty_is_learned_and_logged(
    tokenizer: PreTrainedTokenizerFast, processor: ChorusProcessor, tmp_path: Path
) -> None:
    trainer = trainer_of(make_model(tokenizer), processor, tmp_path, KINDS["uncertainty"], max_steps=4)
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert {f"task_weight/{name}" for name in TASKS} <= set(log[0])
    assert trainer.tasks is not None
    # Losses begin near log(vocabulary) = 5.7, so 1 / (2 L) is below 1 and the weights fall.
    assert all(weight < 1 for weight in trainer.tasks.weights().tolist())
    assert all(log[-1][f"task_weight/{name}"] < log[0][f"task_weight/{name}"] for name in TASKS)


@pytest.mark.parametrize("kind", ["pcgrad", "uncertainty"])
def test_an_adapter_learns_by_task(
    kind: str, tokenizer: PreTrainedTokenizerFast, processor: ChorusProcessor, tmp_path: Path
) -> None:
    model = make_model(tokenizer)
    model = get_peft_model(model, lora_config(model, banks=["image", "common"], cross_modal=True, verbose=False))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer = trainer_of(model, processor, tmp_path, KINDS[kind], max_steps=3, save_strategy="no")
    trainer.train()
    changed = {name for name, parameter in model.named_parameters() if not parameter.equal(before[name])}
    assert changed and all("lora_" in name for name in changed)


@pytest.mark.parametrize("settings", [{"bf16": True}, {CHECKPOINTING: True}, {"max_grad_norm": 1.0}])
def test_conflicts_are_resolved_in_other_numbers_and_with_checkpointing(
    settings: dict[str, Any], tokenizer: PreTrainedTokenizerFast, processor: ChorusProcessor, tmp_path: Path
) -> None:
    plain = gradients_of(trainer_of(make_model(tokenizer), processor, tmp_path, KINDS["pcgrad"], **ONE_STEP))
    trainer = trainer_of(make_model(tokenizer), processor, tmp_path, KINDS["pcgrad"], **ONE_STEP | settings)
    found = gradients_of(trainer)
    norm = torch.stack([gradient.norm() for gradient in plain.values()]).norm()
    scale = min(1.0, settings.get("max_grad_norm", torch.inf) / float(norm))
    difference = torch.stack([(found[name] - scale * plain[name]).norm() for name in plain]).norm()
    assert difference / norm < (0.05 if "bf16" in settings else 1e-5)


def test_the_scale_of_float16_is_none_of_the_tasks_business(
    tokenizer: PreTrainedTokenizerFast, processor: ChorusProcessor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, settings = KINDS["pcgrad"] | KINDS["uncertainty"], ONE_STEP | {"max_grad_norm": 1e9}
    plain = gradients_of(trainer_of(make_model(tokenizer), processor, tmp_path, options, **settings))
    trainer = trainer_of(make_model(tokenizer), processor, tmp_path, options, **settings)
    assert pretend_float16(trainer, monkeypatch).get_scale() == 1024
    found = gradients_of(trainer)
    norm = torch.stack([gradient.norm() for gradient in plain.values()]).norm()
    assert torch.stack([(found[name] - plain[name]).norm() for name in plain]).norm() / norm < 0.01


def test_rewarded_routers_learn_beside_tasks(
    recipe: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    path = recipe_with_tasks(recipe, tmp_path, {"task_conflicts": "pcgrad"})
    words = ["--router_reward_banks", "common", "--max_steps", "2", "--logging_steps", "1"]
    words += ["--per_device_train_batch_size", "6"]
    run_training(read_recipe(path, words))
    log = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert {"router_gain", "task_loss/count", "grad_cosine/common/count-name"} <= set(log[0])


def test_a_step_that_is_not_finite_is_skipped(
    tokenizer: PreTrainedTokenizerFast, processor: ChorusProcessor, tmp_path: Path
) -> None:
    trainer = trainer_of(
        make_model(tokenizer), processor, tmp_path, KINDS["aligned_mtl"], guard=StepGuard(), max_steps=3
    )
    weights = trainer.tasks.weights

    def spoiled() -> Tensor:
        return weights() * (torch.nan if trainer.state.global_step == 1 else 1.0)

    trainer.tasks.weights = spoiled
    trainer.train()
    assert trainer.num_skipped_steps == 1
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


@pytest.mark.slow
def test_two_processes_are_one(tmp_path: Path) -> None:
    for done in run_ranks(ROOT / "tests/training/distributed_tasks.py", [str(tmp_path)], cwd=tmp_path):
        assert done.returncode == 0, done.stderr[-3000:]
    found = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    for kind in DISTRIBUTED:
        one, two = (rank[kind] for rank in found)
        for name, weight in one["weights"].items():
            assert weight.equal(two["weights"][name]), f"{kind}: the ranks differ in {name}"
        assert len(one["rows"]) == 6
        assert not set(one["rows"]) & set(two["rows"])
        # The same micro-batches, one after the other.
        alone = distributed_trainer(tmp_path / "alone", KINDS[kind], gradient_accumulation_steps=2)
        alone.train()
        for name, weight in alone.model.state_dict().items():
            torch.testing.assert_close(one["weights"][name], weight, atol=1e-5, rtol=1e-3, msg=f"{kind} {name}")


def distributed_trainer(folder: Path, options: dict[str, Any], **settings: Any) -> ChorusTrainer:
    """The Trainer of `distributed_tasks`."""
    tokenizer = make_tokenizer()
    # Without momentum: Adam turns a rounding into a step where a gradient is nearly zero.
    plain = {"max_steps": 3, "save_strategy": "no", "optim": "sgd", "learning_rate": 0.1}
    model = make_model(tokenizer, router_aux_loss_coef=0.1)
    processor = processor_from_config(model.config, tokenizer)
    return trainer_of(model, processor, folder, options, task_rows(18), **plain, **settings)


def test_a_recipe_learns_by_task(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    sections = recipe_with_tasks(recipe, tmp_path, {"task_temperature": 2, "task_conflicts": "pcgrad"})
    metrics = run_training(read_recipe(sections))
    assert "tasks: count (4 rows), name (2 rows)" in capsys.readouterr().err
    assert metrics["eval_loss"] > 0
    assert "| tasks | count (4 rows), name (2 rows) |" in (tmp_path / "out" / "README.md").read_text()
    sections = recipe_with_tasks(recipe, tmp_path, {"temperature": 2})
    with pytest.raises(ValueError, match="recipe.*section 'tasks' has no 'temperature'; did you mean"):
        read_recipe(sections)


def test_a_recipe_goes_on_with_its_tasks_only(recipe: Path, tmp_path: Path) -> None:  # noqa: F811
    path = recipe_with_tasks(recipe, tmp_path, {"task_weighting": "uncertainty"})
    run_training(read_recipe(path, ["--max_steps", "1", "--save_steps", "1"]))
    words = ["--resume_from_checkpoint", "auto", "--max_steps", "2"]
    for other, message in (
        (["--use_tasks", "false"], "a run with rows={'count': 4, 'name': 2}, now it is None"),
        (["--task_weighting", "rate"], "a run with task_weighting='uncertainty', now it is 'rate'"),
    ):
        with pytest.raises(ValueError, match=message):
            run_training(read_recipe(path, [*words, *other]))
    run_training(read_recipe(path, words))


def recipe_with_tasks(recipe: Path, folder: Path, tasks: dict[str, Any], column: str = "task") -> Path:  # noqa: F811
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "three three three"}]
    rows = [{"messages": turns, column: "count" if index % 3 else "name"} for index in range(6)]
    write_jsonl(folder / "train.jsonl", rows)
    write_jsonl(folder / "test.jsonl", rows[:2])
    sections = yaml.safe_load(recipe.read_text())
    sections["tasks"] = tasks
    if column != "task":
        sections["data"]["columns"] = {"task": column}
    recipe.write_text(yaml.safe_dump(sections))
    return recipe


def test_a_column_of_another_name_and_weights_in_yaml(
    recipe: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    path = recipe_with_tasks(recipe, tmp_path, {"task_weights": {"name": 2.0}}, column="kind")
    assert run_training(read_recipe(path, ["--max_steps", "1"]))["eval_loss"] > 0
    path = recipe_with_tasks(recipe, tmp_path, {"task_weights": {"names": 2.0}}, column="kind")
    with pytest.raises(ValueError, match="no row has the task 'names'; the tasks are count, name"):
        run_training(read_recipe(path))


def test_stages_check_tasks_before_the_first_one(recipe: Path, tmp_path: Path) -> None:  # noqa: F811
    sections = yaml.safe_load(recipe_with_tasks(recipe, tmp_path, {}).read_text())
    del sections["tasks"]
    sections["stages"] = [
        {"name": "one", "train": ["connectors"]},
        {"name": "two", "train": ["all"], "tasks": {"task_names": ["colour"]}},
    ]
    recipe.write_text(yaml.safe_dump(sections))
    with pytest.raises(ValueError, match="stage 'two': tasks.task_names: no row has the task 'colour'"):
        check_stages(read_stages(recipe))


def test_a_checkpoint_of_other_tasks_is_refused(
    tokenizer: PreTrainedTokenizerFast, processor: ChorusProcessor, tmp_path: Path
) -> None:
    trainer_of(make_model(tokenizer), processor, tmp_path, {}, max_steps=1, save_steps=1).train()
    checkpoint = str(tmp_path / "checkpoint-1")
    for options, message in (
        ({"task_temperature": 2.0}, "a run with task_temperature=1.0, now it is 2.0"),
        ({"task_names": ["see", "hear"]}, "a run with rows="),
        ({"task_conflicts": "pcgrad"}, "a run with task_conflicts='none', now it is 'pcgrad'"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer_of(make_model(tokenizer), processor, tmp_path, options).train(resume_from_checkpoint=checkpoint)
    trainer_of(make_model(tokenizer), processor, tmp_path / "plain", max_steps=1, save_steps=1).train()
    with pytest.raises(ValueError, match="a run with rows=None"):
        trainer_of(make_model(tokenizer), processor, tmp_path, {}).train(
            resume_from_checkpoint=str(tmp_path / "plain" / "checkpoint-1")
        )


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        ({"train_sampling_strategy": "sequential"}, {}, "train_sampling_strategy='sequential' orders the rows"),
        (
            {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": True}},
            KINDS["pcgrad"],
            f"task_conflicts=pcgrad takes the gradient of each task by itself, which {CHECKPOINTING}_kwargs",
        ),
    ],
)
def test_a_trainer_that_cannot_do_it_is_refused(
    settings: dict[str, Any],
    options: dict[str, Any],
    message: str,
    tokenizer: PreTrainedTokenizerFast,
    processor: ChorusProcessor,
    tmp_path: Path,
) -> None:
    with pytest.raises(ValueError, match=message):
        trainer_of(make_model(tokenizer), processor, tmp_path, options, **settings)


def test_a_plan_of_other_rows_and_a_collator_without_tasks_are_refused(
    tokenizer: PreTrainedTokenizerFast, processor: ChorusProcessor, tmp_path: Path
) -> None:
    trainer = trainer_of(make_model(tokenizer), processor, tmp_path, {})
    with pytest.raises(ValueError, match="the plan is for 7 rows, the Trainer has 3"):
        ChorusTrainer(trainer.model, trainer.args, train_dataset=task_rows()[:3], tasks=trainer.tasks.plan)
    trainer.data_collator = ChorusDataCollator(processor)
    with pytest.raises(ValueError, match="the batches name no tasks; make the collator with more="):
        trainer.train()


def test_the_collator_names_the_task_of_each_row(processor: ChorusProcessor) -> None:
    rows = [*task_rows()[:2], {**make_rows(1)[0], "task": "else"}]
    assert ChorusDataCollator(processor, more=[task_columns(["hear", "see"])])(rows)[TASK_IDS].tolist() == [1, 0, -1]
    assert TASK_IDS not in ChorusDataCollator(processor)(rows)
