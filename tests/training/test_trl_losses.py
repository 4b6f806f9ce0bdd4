"""TRL's trainers with their defaults: supervised fine-tuning, preferences and policy gradients."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig
from PIL import Image
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

from chorus_moe import ChorusForConditionalGeneration, ChorusProcessor
from chorus_moe.surgery.processor import processor_from_config
from chorus_moe.training.collator import ChorusDataCollator
from tests.training.conftest import ANSWERS, QUESTION, make_model, make_rows

trl = pytest.importorskip("trl", reason="TRL is not installed (it is in the extra `dev`)")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

# Every loss that a model with exits and gates can have, none of them small beside the others.
ALL_LOSSES: dict[str, Any] = {
    "router_aux_loss_coef": 0.1,
    "router_z_loss_coef": 0.05,
    "alignment_loss_coef": 0.2,
    "cross_modal_layers": [1],
    "exit_layers": [1],
    "exit_loss_coef": 0.3,
    "skip_layers": [1],
    "skip_budget": 0.5,
    "skip_loss_coef": 0.4,
}
PICTURE = Image.new("RGB", (40, 30), (200, 20, 20))
ADAPTER = LoraConfig(r=2, target_modules=["o_proj"])


def options(kind: type, folder: Path, **more: Any) -> Any:
    given = {"max_steps": 2, "per_device_train_batch_size": 2, "report_to": "none", "use_cpu": True, "logging_steps": 1}
    if kind is trl.GRPOConfig:
        given |= {"num_generations": 2, "max_completion_length": 3}
    return kind(output_dir=str(folder / "out"), **given | more)


def turn(role: str, text: str, with_picture: bool) -> dict[str, Any]:
    if not with_picture:
        return {"role": role, "content": text}
    picture = [{"type": "image"}] if role == "user" else []
    return {"role": role, "content": [*picture, {"type": "text", "text": text}]}


def rows_for(trainer: str, with_picture: bool) -> Dataset:
    prompt = [turn("user", QUESTION, with_picture)]
    chosen, rejected = ([turn("assistant", answer, with_picture)] for answer in ANSWERS[:2])
    row: dict[str, Any] = {
        "SFT": {"messages": prompt + chosen},
        "DPO": {"prompt": prompt, "chosen": chosen, "rejected": rejected},
        "GRPO": {"prompt": prompt},
    }[trainer]
    return Dataset.from_list([row | ({"images": [PICTURE]} if with_picture else {})] * 4)


def lengths(completions: list[Any], **kwargs: Any) -> list[float]:
    return [float(len(str(completion))) for completion in completions]


def make_trainer(name: str, folder: Path, with_picture: bool = False, adapter: Any = None, **more: Any) -> Any:
    """A trainer of TRL on a model folder, as its documentation has it: everything else is its default."""
    reward = {"reward_funcs": lengths} if name == "GRPO" else {}
    return getattr(trl, f"{name}Trainer")(
        model=str(folder),
        args=options(getattr(trl, f"{name}Config"), folder, **more),
        train_dataset=rows_for(name, with_picture),
        peft_config=adapter,
        processing_class=ChorusProcessor.from_pretrained(folder),
        **reward,
    )


def saved(folder: Path, tokenizer: PreTrainedTokenizerFast, **text: Any) -> Path:
    model = make_model(tokenizer, **text)
    model.save_pretrained(folder)
    processor_from_config(model.config, tokenizer).save_pretrained(folder)
    return folder


def extra_losses(model: ChorusForConditionalGeneration, batch: dict[str, torch.Tensor]) -> float:
    """What training adds to the language loss, by the model's own forward."""
    outputs = type(model).forward(model, **batch)
    words = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    return float((outputs.loss - words).detach())


def table_of_all_media() -> Dataset:
    """Pictures and sound. The contents of a column are all lists in an Arrow table."""
    rows = make_rows(6)
    for row in rows:
        for message in row["messages"]:
            if isinstance(message["content"], str):
                message["content"] = [{"type": "text", "text": message["content"]}]
    return Dataset.from_list(rows)


@pytest.mark.parametrize("adapter", [None, ADAPTER], ids=["full", "LoRA"])
@pytest.mark.parametrize("with_picture", [False, True], ids=["text", "picture"])
@pytest.mark.parametrize("name", ["SFT", "DPO", "GRPO"])
def test_a_trainer_with_its_defaults_trains(
    name: str, with_picture: bool, adapter: Any, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    trainer = make_trainer(name, saved(tmp_path, tokenizer), with_picture, adapter)
    trained = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}

    trainer.train()

    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(history) == 2 and all(math.isfinite(entry["loss"]) for entry in history)
    # A balance loss of 1 is that of experts that are used alike.
    assert all(0.9 < entry["aux_loss"] < 1.5 for entry in history)
    after = dict(trainer.model.named_parameters())
    assert any(not torch.equal(value, after[n]) for n, value in trained.items())


@pytest.mark.parametrize("text", [{}, ALL_LOSSES], ids=["defaults", "all losses"])
def test_losses_are_those_of_the_stock_trainer(
    text: dict[str, Any], tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    losses = []
    for kind, config in ((Trainer, TrainingArguments), (trl.SFTTrainer, trl.SFTConfig)):
        is_trl = kind is trl.SFTTrainer
        model = make_model(tokenizer, **text)
        processor = processor_from_config(model.config, tokenizer)
        more: dict[str, Any] = {"dataset_kwargs": {"skip_prepare_dataset": True}} if is_trl else {}
        # What TRL chooses for itself.
        more |= {"learning_rate": 2e-5, "remove_unused_columns": False, "bf16": False, "gradient_checkpointing": True}
        trainer = kind(
            model=model,
            args=options(config, tmp_path, max_steps=3, eval_strategy="steps", eval_steps=3, **more),
            train_dataset=table_of_all_media(),
            eval_dataset=table_of_all_media(),
            data_collator=ChorusDataCollator(processor),
            processing_class=processor,
        )
        trainer.train()
        log = trainer.state.log_history
        losses.append([entry[key] for entry in log for key in ("loss", "eval_loss") if key in entry])
    assert len(losses[0]) == 4
    # float32 sums in another order, at losses of 6.
    assert losses[1] == pytest.approx(losses[0], abs=2e-4)


def test_preferences_get_every_loss(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    trainer = make_trainer("DPO", saved(tmp_path, tokenizer, **ALL_LOSSES), with_picture=True, bf16=False)
    batch = next(iter(trainer.get_train_dataloader()))
    model = trainer.model.train()
    found = trainer.compute_loss(model, dict(batch)).detach()
    completion = batch.pop("completion_mask")
    expected = extra_losses(model, batch | {"labels": batch["input_ids"].masked_fill(completion == 0, -100)})
    # Before the first step policy and reference agree, and the loss of a preference is log 2.
    assert expected > 0.1
    assert float(found) == pytest.approx(math.log(2) + expected, abs=1e-4)


def test_policy_gradients_get_every_loss(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    folder = saved(tmp_path, tokenizer, **ALL_LOSSES)
    trainer = make_trainer("GRPO", folder, with_picture=True, bf16=False)
    model = trainer.model.train()
    processor, messages = ChorusProcessor.from_pretrained(folder), [turn("user", QUESTION, True)]
    batch = processor.apply_chat_template(
        [messages], images=[[PICTURE]], tokenize=True, return_dict=True, return_tensors="pt"
    )
    kept = 4
    labels = batch["input_ids"].clone()
    labels[:, :-kept] = -100
    _, _, found = trainer._get_per_token_logps_and_entropies(
        model, **batch, num_images=[1], logits_to_keep=kept, compute_aux_loss=True
    )
    expected = extra_losses(model, dict(batch) | {"labels": labels})
    assert expected > 0.1
    assert float(found.detach()) * trainer.router_aux_loss_coef == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", ["router_z_loss_coef", "exit_loss_coef", "skip_loss_coef", "alignment_loss_coef"])
def test_a_loss_that_a_trainer_would_leave_out_is_refused(
    name: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    others = [key for key in ALL_LOSSES if key.endswith("loss_coef") and key != name]
    trainer = make_trainer("SFT", saved(tmp_path, tokenizer, **ALL_LOSSES | dict.fromkeys(others, 0.0)))
    with pytest.raises(ValueError, match=rf"{name}={ALL_LOSSES[name]} would have no effect.*router_aux_loss_coef"):
        trainer.train()


def test_no_loss_but_that_of_the_words_is_no_error(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    trainer = make_trainer("SFT", saved(tmp_path, tokenizer, router_aux_loss_coef=0.0))
    assert math.isfinite(trainer.train().training_loss)


def test_the_model_answers_as_before_after_a_trainer(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    trainer = make_trainer("SFT", saved(tmp_path, tokenizer))
    model, ids = trainer.model.eval(), torch.tensor([[5, 6, 7]])
    expected = type(model).forward(model, input_ids=ids).logits
    assert torch.equal(model(input_ids=ids).logits, expected)
    assert model.generate(input_ids=ids, max_new_tokens=2).shape == (1, 5)
