"""Label pictures with a saved classifier."""

import json
import sys

import torch
from transformers import AutoModelForSequenceClassification, AutoProcessor

import chorus_moe  # noqa: F401  registers the classes with transformers

settings = json.loads(sys.argv[1])
model = AutoModelForSequenceClassification.from_pretrained(settings["model"])
processor = AutoProcessor.from_pretrained(settings["model"])
pictures, texts = settings["pictures"], ["<image> which colour?"] * len(settings["pictures"])
batch = processor(text=texts, images=[[path] for path in pictures], return_tensors="pt", padding=True)
with torch.no_grad():
    logits = model(**batch).logits
print(json.dumps([model.config.id2label[number] for number in logits.argmax(-1).tolist()]))
