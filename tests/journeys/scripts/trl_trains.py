"""Supervised fine-tuning, or preferences, by TRL on rows in its own layout."""

import json
import sys

import trl
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForMultimodalLM, AutoProcessor

import chorus_moe  # noqa: F401  registers the classes with transformers

settings = json.loads(sys.argv[1])
name, rows = settings["trainer"], load_dataset("json", data_files=settings["rows"], split="train")
if settings["pictures"]:
    from datasets import Image, Sequence

    rows = rows.cast_column("images", Sequence(Image()))
arguments = getattr(trl, f"{name}Config")(
    settings["out"],
    max_steps=settings["steps"],
    per_device_train_batch_size=4,
    learning_rate=settings["learning_rate"],
    logging_steps=settings["steps"],
    save_strategy="no",
    report_to="none",
)
trainer = getattr(trl, f"{name}Trainer")(
    AutoModelForMultimodalLM.from_pretrained(settings["model"]),
    args=arguments,
    train_dataset=rows,
    processing_class=AutoProcessor.from_pretrained(settings["model"]),
    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules=settings["targets"]),
)
trainer.train()
trainer.save_model()
print(json.dumps({key: value for entry in trainer.state.log_history for key, value in entry.items()}))
