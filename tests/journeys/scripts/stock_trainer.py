"""Fine-tune a whole model with transformers' own Trainer, or train labels on it."""

import json
import sys

import torch
from transformers import (
    AutoModelForMultimodalLM,
    AutoModelForSequenceClassification,
    AutoProcessor,
    Trainer,
    TrainingArguments,
)

import chorus_moe  # noqa: F401  registers the classes with transformers
from chorus_moe.training.collator import ChorusDataCollator
from chorus_moe.training.data import load_rows

settings = json.loads(sys.argv[1])
processor = AutoProcessor.from_pretrained(settings["model"])
labels = settings.get("labels")
if labels is None:
    model = AutoModelForMultimodalLM.from_pretrained(settings["model"])
    rows, collator = load_rows(settings["rows"]), ChorusDataCollator(processor)
else:
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: number for number, label in enumerate(labels)}}
    model = AutoModelForSequenceClassification.from_pretrained(settings["model"], num_labels=len(labels), **names)
    with open(settings["rows"]) as file:
        rows = [json.loads(line) for line in file]

    def collator(rows):
        texts = ["<image> which colour?" for _ in rows]
        batch = processor(text=texts, images=[row["images"] for row in rows], return_tensors="pt", padding=True)
        return {**batch, "labels": torch.tensor([labels.index(row["response"]) for row in rows])}


arguments = TrainingArguments(
    settings["out"],
    max_steps=settings["steps"],
    per_device_train_batch_size=8,
    learning_rate=settings["learning_rate"],
    logging_steps=settings["steps"],
    save_strategy="no",
    report_to="none",
    remove_unused_columns=False,
    label_names=["labels"],
)
trainer = Trainer(model, arguments, collator, rows, processing_class=processor)
trainer.train()
trainer.save_model()
print(json.dumps({key: value for entry in trainer.state.log_history for key, value in entry.items()}))
