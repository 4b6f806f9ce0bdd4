"""One question to a model with several adapters: with each of them, and with none."""

import json
import sys

from peft import PeftModel
from transformers import AutoModelForMultimodalLM, AutoProcessor

import chorus_moe  # noqa: F401  registers the classes with transformers

settings = json.loads(sys.argv[1])
model = AutoModelForMultimodalLM.from_pretrained(settings["model"])
processor = AutoProcessor.from_pretrained(settings["model"])
first, *others = settings["adapters"]
model = PeftModel.from_pretrained(model, first, adapter_name=first)
for name in others:
    model.load_adapter(name, adapter_name=name)


def answers():
    chats = [[{"role": "user", "content": content}] for content in settings["questions"]]
    inputs = processor.apply_chat_template(
        chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", padding=True
    )
    new = model.generate(**inputs, max_new_tokens=8)[:, inputs["input_ids"].shape[1] :]
    return processor.batch_decode(new, skip_special_tokens=True)


found = {}
for name in settings["adapters"]:
    model.set_adapter(name)
    found[name] = answers()
with model.disable_adapter():
    found["none"] = answers()
model.set_adapter(first)
found["first again"] = answers()
print(json.dumps(found))
