"""A checkpoint of another model is refused before a step is taken."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import PreTrainedTokenizerFast

from chorus_moe import ChorusProcessor
from chorus_moe.surgery import add_experts, freeze, unfreeze
from chorus_moe.training.lora import lora_config
from chorus_moe.training.recipe import read_recipe
from chorus_moe.training.resume import OptimizerMisfit, check_optimizer_state, check_resume
from chorus_moe.training.train import run_training
from tests.training.conftest import make_model, make_rows
from tests.training.test_data import PLAIN, write_jsonl
from tests.training.test_train import new_model, new_trainer


def checkpoint(kind: str, tokenizer: PreTrainedTokenizerFast, processor: ChorusProcessor, folder: Path) -> Path:
    trainer = new_trainer(new_model(tokenizer, kind), processor, folder, make_rows(4), max_steps=1, save_steps=1)
    trainer.train()
    return folder / "checkpoint-1"


def refused(model: Any, processor: ChorusProcessor, folder: Path, message: str) -> None:
    trainer = new_trainer(model, processor, folder.parent, make_rows(4), max_steps=2)
    with pytest.raises(OptimizerMisfit, match=message):
        check_resume(trainer, folder)
    assert trainer.optimizer is None


def test_a_checkpoint_fits_until_the_model_is_changed(
    tokenizer: PreTrainedTokenizerFast, processor: ChorusProcessor, tmp_path: Path
):
    folder = checkpoint("full", tokenizer, processor, tmp_path)
    model = new_model(tokenizer, "full")
    check_resume(new_trainer(model, processor, tmp_path, make_rows(4), max_steps=2), folder)
    freeze(model, "text")
    refused(model, processor, folder, "parameters in group 0|where model.*has")
    unfreeze(model, "text")
    add_experts(model, "text", 2)
    refused(model, processor, folder, r"has no model.language_model.layers.1.mlp.banks.text_2.*, the model has it with")


def test_other_shapes_and_too_many_weights_are_named(
    tokenizer: PreTrainedTokenizerFast, processor: ChorusProcessor, tmp_path: Path
):
    folder = checkpoint("full", tokenizer, processor, tmp_path)
    wide = make_model(tokenizer, moe_intermediate_size=16)
    refused(wide, processor, folder, r"gate_up_proj of shape \(4, 64, 64\), the model has it with \(4, 32, 64\)")
    fewer = make_model(tokenizer, expert_banks={"text": {}, "image": {}, "audio": {}})
    refused(fewer, processor, folder, r"bank_gate.weight of shape \(4, 64\), the model has it with \(3, 64\)")
    bare = make_model(tokenizer, shared_expert_intermediate_size=0)
    refused(bare, processor, folder, r"shared_experts.down_proj.weight of shape \(64, 32\), the model does not")


def test_an_adapter_is_compared_by_its_optimizer(
    tokenizer: PreTrainedTokenizerFast, processor: ChorusProcessor, tmp_path: Path
):
    folder = checkpoint("adapter", tokenizer, processor, tmp_path)
    trainer = new_trainer(new_model(tokenizer, "adapter"), processor, tmp_path, make_rows(4), max_steps=2)
    check_resume(trainer, folder)
    refused(new_model(tokenizer, "full"), processor, folder, "holds an adapter, the model has none")


def test_a_state_is_compared_parameter_by_parameter():
    one, other = torch.nn.Linear(4, 3), torch.nn.Linear(4, 5)
    optimizers = [torch.optim.AdamW(module.parameters()) for module in (one, other)]
    one(torch.ones(1, 4)).sum().backward()
    optimizers[0].step()
    state = optimizers[0].state_dict()
    check_optimizer_state(one, torch.optim.AdamW(one.parameters()), state)
    with pytest.raises(OptimizerMisfit, match=r"has \(3, 4\) where weight has \(5, 4\); start a new run"):
        check_optimizer_state(other, optimizers[1], state)
    with pytest.raises(OptimizerMisfit, match="has 2 parameters in group 0, 1 are trained now"):
        check_optimizer_state(one, torch.optim.AdamW([one.weight]), state)
    with pytest.raises(OptimizerMisfit, match="has 1 parameter groups, the optimizer 2"):
        check_optimizer_state(one, torch.optim.AdamW([{"params": [p]} for p in one.parameters()]), state)


def test_a_run_is_not_resumed_with_a_grown_model(
    tokenizer: PreTrainedTokenizerFast, processor: ChorusProcessor, tmp_path: Path
):
    run = tmp_path / "run"
    checkpoint("full", tokenizer, processor, run)
    model = new_model(tokenizer, "full")
    add_experts(model, "text", 2)
    for part in (model, processor):
        part.save_pretrained(tmp_path / "grown")
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"messages": PLAIN}] * 2)
    words = ["--model_name_or_path", str(tmp_path / "grown"), "--train_data", str(rows), "--output_dir", str(run)]
    words += ["--resume_from_checkpoint", "auto", "--max_steps", "2", "--use_cpu", "true", "--report_to", "none"]
    words += ["--per_device_train_batch_size", "2"]
    with pytest.raises(OptimizerMisfit, match=r"checkpoint-1 has no .*banks.text_2.*; start a new run from these"):
        run_training(read_recipe(None, words))
    assert not (run / "checkpoint-2").exists()


def test_another_place_of_the_model_below_an_adapter_is_said(
    tokenizer: PreTrainedTokenizerFast,
    processor: ChorusProcessor,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    folder = checkpoint("adapter", tokenizer, processor, tmp_path)
    saved = json.loads((folder / "adapter_config.json").read_text())
    trainer = new_trainer(new_model(tokenizer, "adapter"), processor, tmp_path, make_rows(4), max_steps=2)
    capsys.readouterr()
    check_resume(trainer, folder)
    assert "was trained on" not in capsys.readouterr().err
    (folder / "adapter_config.json").write_text(json.dumps(saved | {"base_model_name_or_path": "the-old-base"}))
    check_resume(trainer, folder)
    said = capsys.readouterr().err
    assert "checkpoint-1: its adapter was trained on 'the-old-base' and continues on " in said


OTHER_LORA = [
    ({"lora_alpha": 7}, r"adapter with lora_alpha=16, the model 7"),
    ({"use_rslora": True}, r"adapter with use_rslora=False, the model True"),
    ({"banks": ["text", "common"]}, r"banks\.\w+\.experts\.\S+ of shape .*, the model's adapter has it with"),
]


@pytest.mark.parametrize(("change", "message"), OTHER_LORA)
def test_another_lora_is_refused_by_what_differs(
    change: dict[str, Any],
    message: str,
    tokenizer: PreTrainedTokenizerFast,
    processor: ChorusProcessor,
    tmp_path: Path,
):
    folder = checkpoint("adapter", tokenizer, processor, tmp_path)
    options = {"banks": ["image", "common"], "cross_modal": True, "router": "train", **change}
    base = make_model(tokenizer, attention_dropout=0.1)
    refused(get_peft_model(base, lora_config(base, **options)), processor, folder, message)
