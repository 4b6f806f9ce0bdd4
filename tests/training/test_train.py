"""The stock Trainer trains, evaluates, resumes and survives a kill, with and without an adapter."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoModelForMultimodalLM,
    AutoProcessor,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from chorus_moe import ChorusConfig, ChorusProcessor
from chorus_moe.training import train as module
from chorus_moe.training.checkpoints import WholeCheckpoints, numbered_checkpoints
from chorus_moe.training.collator import ChorusDataCollator
from chorus_moe.training.data import RowDataset
from chorus_moe.training.lora import lora_config
from chorus_moe.training.recipe import TRAINER_SETTINGS, build_recipe, read_recipe
from chorus_moe.training.scale.layout import Layout
from chorus_moe.training.train import build_model, find_checkpoint, load_or_build, run_training
from tests.fresh_process import kill
from tests.training.conftest import make_model, make_row, make_rows
from tests.training.test_data import write_splits

KINDS = ["full", "adapter"]
TURN = {"role": "assistant", "content": "three"}


def new_model(tokenizer: PreTrainedTokenizerFast, kind: str) -> nn.Module:
    model = make_model(tokenizer, attention_dropout=0.1)  # dropout shows whether the random state is restored
    if kind == "full":
        return model
    return get_peft_model(model, lora_config(model, banks=["image", "common"], cross_modal=True, router="train"))


def new_trainer(
    model: nn.Module, processor: ChorusProcessor, folder: Path, rows: list[dict[str, Any]], **settings: Any
) -> Trainer:
    defaults = {"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "save_steps": 2}
    arguments = TrainingArguments(
        str(folder),
        **{"report_to": "none", "use_cpu": True, "disable_tqdm": True, **TRAINER_SETTINGS, **defaults, **settings},
    )
    return WholeCheckpoints(
        model,
        arguments,
        data_collator=ChorusDataCollator(processor),
        train_dataset=rows,
        eval_dataset=rows[:3],
        processing_class=processor,
    )


def assert_equal(model: nn.Module, other: nn.Module) -> None:
    weights, others = model.state_dict(), other.state_dict()
    assert weights.keys() == others.keys()
    assert not [name for name in weights if not torch.equal(weights[name], others[name])]


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(
    kind: str, tokenizer: PreTrainedTokenizerFast, processor: ChorusProcessor, tmp_path: Path
) -> None:
    rows = make_rows(6)
    whole = new_trainer(new_model(tokenizer, kind), processor, tmp_path, rows)
    whole.train()
    resumed = new_trainer(new_model(tokenizer, kind), processor, tmp_path, rows)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_equal(whole.model, resumed.model)
    fresh = new_model(tokenizer, kind).state_dict()
    assert any(not torch.equal(fresh[name], tensor) for name, tensor in whole.model.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_finds_the_loss_and_the_best_model(
    kind: str, tokenizer: PreTrainedTokenizerFast, processor: ChorusProcessor, tmp_path: Path
) -> None:
    best = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "max_steps": 3, "save_total_limit": 2}
    best |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    trainer = new_trainer(new_model(tokenizer, kind), processor, tmp_path, make_rows(6), **best)
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(losses) == 3
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_loads_with_its_processor(
    kind: str, tokenizer: PreTrainedTokenizerFast, processor: ChorusProcessor, tmp_path: Path
) -> None:
    trainer = new_trainer(new_model(tokenizer, kind), processor, tmp_path, make_rows(6), max_steps=2)
    trainer.train()
    checkpoint = tmp_path / "checkpoint-2"
    if kind == "full":
        loaded = AutoModelForMultimodalLM.from_pretrained(checkpoint)
    else:
        loaded = PeftModel.from_pretrained(make_model(tokenizer), checkpoint)
    assert_equal(trainer.model, loaded)
    assert AutoProcessor.from_pretrained(checkpoint).to_dict() == processor.to_dict()


class GradientRecorder(TrainerCallback):
    def __init__(self) -> None:
        self.gradients: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, *_: Any, model: nn.Module, **__: Any) -> None:
        self.gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_router_gradients_do_not_depend_on_accumulation(
    tokenizer: PreTrainedTokenizerFast, processor: ChorusProcessor, tmp_path: Path
) -> None:
    """Equal samples, because the balance loss of a batch is no sum over its samples."""
    recorded = []
    for accumulation in (1, 2, 4):
        model = make_model(
            tokenizer, router_aux_loss_coef=1.0, router_z_loss_coef=0.1, alignment_loss_coef=1.0, alignment="maps"
        )
        settings = {"per_device_train_batch_size": 4 // accumulation, "gradient_accumulation_steps": accumulation}
        trainer = new_trainer(
            model,
            processor,
            tmp_path,
            [make_row(2)] * 4,
            max_steps=1,
            max_grad_norm=1e9,
            save_strategy="no",
            **settings,
        )
        trainer.add_callback(recorder := GradientRecorder())
        trainer.train()
        recorded.append(recorder.gradients)
    for name in (name for name in recorded[0] if ".router." in name or ".bank_gate." in name or "q_proj" in name):
        for other in recorded[1:]:
            # The same float32 sum in one, two or four parts; the gradients here are up to 0.3.
            torch.testing.assert_close(other[name], recorded[0][name], atol=1e-6, rtol=1e-4)


def test_a_run_with_broken_files_ends_and_counts_them(
    model: nn.Module, processor: ChorusProcessor, tmp_path: Path
) -> None:
    rows = make_rows(5) + [{**make_row(0), "images": [b"broken"]}] * 3
    trainer = new_trainer(model, processor, tmp_path, rows, save_strategy="no", num_train_epochs=1, max_steps=-1)
    trainer.data_collator = ChorusDataCollator(processor, on_bad_media="skip", max_bad_samples=3)
    assert trainer.train().global_step == 4
    assert trainer.data_collator.num_bad_samples == 3
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.fixture
def recipe(config: ChorusConfig, tmp_path: Path) -> Path:
    """A recipe that builds and trains a tiny model on files."""
    write_splits(tmp_path)
    values = config.to_diff_dict()
    del values["image_token_id"], values["audio_token_id"]
    for name in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id"):
        values["text_config"].pop(name, None)
    (tmp_path / "tiny.json").write_text(json.dumps(values))
    data = {"train_data": str(tmp_path), "eval_data": str(tmp_path)}
    training = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "learning_rate": "1e-2"}
    training |= {"max_steps": 4, "per_device_train_batch_size": 2, "output_dir": str(tmp_path / "out")}
    sections = {"model": {"config": str(tmp_path / "tiny.json"), "tokenizer_vocab_size": 280}, "data": data}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(sections | {"training": training}))
    return path


def test_a_recipe_builds_trains_and_then_adapts_a_model(recipe: Path, tmp_path: Path) -> None:
    metrics = run_training(read_recipe(recipe))
    assert metrics["eval_loss"] > 0
    assert metrics["num_bad_samples"] == 0
    base = AutoModelForMultimodalLM.from_pretrained(tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert all(name in card for name in ("| eval_loss |", "| eval_token_accuracy |", "| starts from | new weights |"))

    sections = yaml.safe_load(recipe.read_text())
    sections["model"] = {"model_name_or_path": str(tmp_path / "out")}
    sections["lora"] = {"banks": ["image"], "cross_modal": True, "lora_rank": 2}
    recipe.write_text(yaml.safe_dump(sections))
    run_training(read_recipe(recipe, ["--output_dir", str(tmp_path / "adapter"), "--max_steps", "1"]))
    adapter = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert adapter.peft_config["default"].r == 2
    AutoProcessor.from_pretrained(tmp_path / "adapter")


@pytest.mark.slow
def test_a_killed_run_goes_on_where_its_last_checkpoint_was(recipe: Path, tmp_path: Path) -> None:
    words = ["--max_steps", "24", "--save_steps", "2", "--save_total_limit", "3", "--resume_from_checkpoint", "auto"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    kill(
        ["train", str(recipe), *words, "--output_dir", str(killed)],
        cwd=tmp_path,
        when=lambda: len(numbered_checkpoints(killed)) >= 2,
    )
    steps = [int(path.name.rpartition("-")[2]) for path in numbered_checkpoints(killed)]
    assert 0 < steps[-1] < 24

    run_training(read_recipe(recipe, [*words, "--output_dir", str(killed)]))
    run_training(read_recipe(recipe, [*words, "--output_dir", str(whole)]))
    resumed, expected = (AutoModelForMultimodalLM.from_pretrained(folder) for folder in (killed, whole))
    assert_equal(resumed, expected)
    histories = [json.loads((folder / "trainer_state.json").read_text()) for folder in (killed, whole)]
    assert histories[0]["global_step"] == histories[1]["global_step"] == 24


def words_of(folder: Path) -> list[str]:
    return ["--output_dir", str(folder), "--max_steps", "2", "--save_steps", "1"]


def test_a_run_continues_from_the_newest_whole_checkpoint_and_says_so(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    auto = ["--resume_from_checkpoint", "auto"]
    run_training(read_recipe(recipe, words_of(out)))
    (out / "checkpoint-2" / "optimizer.pt").unlink()
    run_training(read_recipe(recipe, [*words_of(out), *auto, "--learning_rate", "1e-3"]))
    said = capsys.readouterr().err
    assert "the run continues from checkpoint-1; not whole: checkpoint-2 lacks optimizer.pt\n" in said
    assert "checkpoint-1: the run continues with learning_rate 0.01 -> 0.001\n" in said
    # Continued, the run has written its second checkpoint anew.
    assert find_checkpoint(read_recipe(recipe, [*words_of(out), *auto]).training) == str(out / "checkpoint-2")
    for checkpoint in numbered_checkpoints(out):
        (checkpoint / "scheduler.pt").unlink()
    both = "no checkpoint is whole: checkpoint-2 lacks scheduler.pt, checkpoint-1 lacks scheduler.pt"
    with pytest.raises(ValueError, match=both):
        run_training(read_recipe(recipe, [*words_of(out), *auto]))
    with pytest.raises(ValueError, match="checkpoint-1 lacks scheduler.pt; give a whole checkpoint"):
        run_training(read_recipe(recipe, [*words_of(out), "--resume_from_checkpoint", str(out / "checkpoint-1")]))


FIXED = [
    (["--seed", "7"], "was trained with seed=42, now it is 7: the order of the rows"),
    (["--per_device_train_batch_size", "1"], "with rows_per_step=2, now it is 1: the order of the rows"),
    (["--optim", "sgd"], "with optim='adamw_torch', now it is 'sgd'"),
    (["--lr_scheduler_type", "reduce_lr_on_plateau"], "with lr_scheduler_type='linear', now it is 'reduce"),
]


def test_the_rate_falls_on_a_plateau_and_stays_low_after_a_checkpoint(recipe: Path, tmp_path: Path) -> None:
    # No loss is better by 10: every evaluation but the first is on a plateau.
    kwargs = '{"factor": 0.5, "patience": 0, "threshold": 10, "threshold_mode": "abs"}'
    words = ["--lr_scheduler_type", "reduce_lr_on_plateau", "--lr_scheduler_kwargs", kwargs, "--eval_strategy", "steps"]
    words += ["--eval_steps", "1", "--save_steps", "2", "--logging_steps", "1"]
    folders = [tmp_path / "whole", tmp_path / "resumed"]
    run_training(read_recipe(recipe, [*words, "--output_dir", str(folders[0])]))
    run_training(read_recipe(recipe, [*words, "--output_dir", str(folders[1]), "--max_steps", "2"]))
    resumed = [*words, "--output_dir", str(folders[1]), "--resume_from_checkpoint", "auto"]
    run_training(read_recipe(recipe, resumed))
    for folder in folders:
        log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        assert [entry["learning_rate"] for entry in log if "learning_rate" in entry] == [1e-2, 1e-2, 5e-3, 2.5e-3]
    assert_equal(*map(AutoModelForMultimodalLM.from_pretrained, folders))


def test_what_a_resumed_run_cannot_change_is_refused_by_name(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_training(read_recipe(recipe, words_of(out)))
    for words, message in FIXED:
        extra = ["--eval_strategy", "steps", "--eval_steps", "1"] if "plateau" in words[1] else []
        with pytest.raises(ValueError, match=message):
            run_training(read_recipe(recipe, [*words_of(out), "--resume_from_checkpoint", "auto", *words, *extra]))
    words = ["--resume_from_checkpoint", "auto", "--seed", "7", "--ignore_data_skip", "true", "--max_steps", "3"]
    run_training(read_recipe(recipe, [*words_of(out), *words]))


def test_a_folder_with_another_model_is_replaced_only_when_asked(recipe: Path, tmp_path: Path) -> None:
    out, new = tmp_path / "out", ["--max_steps", "1", "--overwrite_output_dir", "true"]
    run_training(read_recipe(recipe, words_of(out)))
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="holds checkpoint-2 of an earlier run; continue it with"):
        run_training(read_recipe(recipe, words_of(out)))
    for checkpoint in numbered_checkpoints(out):
        shutil.rmtree(checkpoint)
    for asked in ([], ["--resume_from_checkpoint", "auto"]):
        with pytest.raises(ValueError, match=r"holds a model \(config.json, model.safetensors\); choose another"):
            run_training(read_recipe(recipe, [*words_of(out), *asked]))
    words = ["--train_data", str(tmp_path), *words_of(out), "--model_name_or_path", str(out), *new]
    recipe_on_itself = read_recipe(None, words)
    with pytest.raises(ValueError, match="holds the model that the run starts from"):
        run_training(recipe_on_itself)
    assert (out / "model.safetensors").read_bytes() == before

    (out / "checkpoint-90").mkdir()
    (out / "adapter_config.json").write_text("{}")
    run_training(read_recipe(recipe, [*words_of(out), *new]))
    assert [path.name for path in numbered_checkpoints(out)] == ["checkpoint-1"]
    # A folder with it would be loaded as an adapter.
    assert not (out / "adapter_config.json").exists()
    assert (out / "model.safetensors").read_bytes() != before


def test_a_recipe_must_say_what_to_train(recipe: Path) -> None:
    with pytest.raises(ValueError, match="data.train_data is missing"):
        run_training(read_recipe(None, ["--use_cpu", "true", "--report_to", "none"]))
    with pytest.raises(ValueError, match="give exactly one of"):
        run_training(read_recipe(recipe, ["--model_name_or_path", "somewhere"]))
    with pytest.raises(ValueError, match="a LoRA needs a trained model"):
        run_training(read_recipe(recipe, ["--use_lora", "true"]))


def test_a_tokenizer_larger_than_the_model_is_refused(recipe: Path) -> None:
    given = read_recipe(recipe).model
    given.config = json.dumps({"text_config": {"vocab_size": 100}})
    rows = RowDataset([{"messages": [TURN]}], None)
    with pytest.raises(ValueError, match=r"the tokenizer has 2\d\d tokens, text_config.vocab_size is 100"):
        build_model(given, rows)


@pytest.mark.parametrize("layout", [Layout(), Layout(data=2), Layout(fsdp=2), Layout(tensor=2)])
@pytest.mark.parametrize("more", [{}, {"use_lora": True}, {"add_bank": "new"}])
def test_only_a_whole_model_of_a_spread_run_is_loaded_in_shares(
    layout: Layout, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Loaded(Exception):
        pass

    def pretrained(recipe: Any, **options: Any) -> None:
        raise Loaded(options)

    monkeypatch.setattr(module, "loading_in_shares", lambda *given: {"shares": given[0]})
    monkeypatch.setattr(module, "pretrained", pretrained)
    sections = {"model": {"model_name_or_path": "base"}, "training": {"output_dir": str(tmp_path), "use_cpu": True}}
    recipe = build_recipe(sections, "recipe.yaml")
    for section in (recipe.lora, recipe.model):
        vars(section).update({name: value for name, value in more.items() if hasattr(section, name)})
    with pytest.raises(Loaded) as found:
        load_or_build(recipe, make_rows(1), layout=layout)  # type: ignore[arg-type]
    assert found.value.args[0] == (
        {"shares": layout} if layout in (Layout(fsdp=2), Layout(tensor=2)) and not more else {}
    )
