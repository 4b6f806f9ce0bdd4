"""Supervised fine-tuning, or preferences, by TRL on rows in its own layout."""

import json
import sys

import torch
import trl
from datasets import load_dataset
from transformers import AutoModelForMultimodalLM, AutoProcessor

import chorus_moe  # noqa: F401  registers the classes with transformers
from chorus_moe.training.lora import lora_config

settings = json.loads(sys.argv[1])
name, rows = settings["trainer"], load_dataset("json", data_files=settings["rows"], split="train")
if settings["pictures"]:
    from datasets import Image, Sequence

    rows = rows.cast_column("images", Sequence(Image()))
model = AutoModelForMultimodalLM.from_pretrained(settings["model"])
arguments = getattr(trl, f"{name}Config")(
    settings["out"],
    max_steps=settings["steps"],
    per_device_train_batch_size=4,
    learning_rate=settings["learning_rate"],
    logging_steps=settings["steps"],
    save_strategy="no",
    report_to="none",
    # TRL trains in bfloat16 by default, which its check allows on a CPU only when it is named.
    use_cpu=not torch.cuda.is_available(),
)
trainer = getattr(trl, f"{name}Trainer")(
    model,
    args=arguments,
    train_dataset=rows,
    processing_class=AutoProcessor.from_pretrained(settings["model"]),
    peft_config=lora_config(model, banks="all", attention=True, dense=True, connectors=True, router="train"),
)
trainer.train()
trainer.save_model()
print(json.dumps({key: value for entry in trainer.state.log_history for key, value in entry.items()}))
