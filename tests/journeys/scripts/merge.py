"""Merge a saved adapter into its model and save the whole."""

import json
import sys

from peft import PeftModel
from transformers import AutoModelForMultimodalLM, AutoProcessor

import chorus_moe  # noqa: F401  registers the classes with transformers

settings = json.loads(sys.argv[1])
model = AutoModelForMultimodalLM.from_pretrained(settings["model"])
PeftModel.from_pretrained(model, settings["adapter"]).merge_and_unload().save_pretrained(settings["out"])
AutoProcessor.from_pretrained(settings["model"]).save_pretrained(settings["out"])
print(json.dumps("merged"))
