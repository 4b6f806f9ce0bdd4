"""Add a bank to a saved model, or remove the experts that matter least."""

import json
import sys

from transformers import AutoModelForMultimodalLM, AutoProcessor

import chorus_moe  # noqa: F401  registers the classes with transformers
from chorus_moe.surgery import add_bank, prune_experts
from chorus_moe.training.data import load_rows
from chorus_moe.training.routing.saliency import expert_saliency

settings = json.loads(sys.argv[1])
model = AutoModelForMultimodalLM.from_pretrained(settings["model"])
processor = AutoProcessor.from_pretrained(settings["model"])
if settings["operation"] == "add_bank":
    report = add_bank(model, "legal", modalities=["text", "image"], num_experts=4)
else:
    found = expert_saliency(model, processor, load_rows(settings["rows"]))
    report = prune_experts(model, settings["shares"], found.saliency)
model.save_pretrained(settings["out"])
processor.save_pretrained(settings["out"])
print(json.dumps([report.parameters_before, report.parameters_after]))
