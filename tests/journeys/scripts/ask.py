"""Ask a saved model, question by question and all in one batch."""

import json
import sys

from transformers import AutoModelForMultimodalLM, AutoProcessor

settings = json.loads(sys.argv[1])
if settings["without_package"]:
    options = {"trust_remote_code": True}
else:
    import chorus_moe  # noqa: F401  registers the classes with transformers

    options = {}

model = AutoModelForMultimodalLM.from_pretrained(settings["model"], **options)
processor = AutoProcessor.from_pretrained(settings["model"], **options)
if settings.get("adapter"):
    from peft import PeftModel

    model = PeftModel.from_pretrained(model, settings["adapter"])
if settings.get("save_again"):
    model.save_pretrained(settings["save_again"])
    processor.save_pretrained(settings["save_again"])


def answers(chats):
    inputs = processor.apply_chat_template(
        chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", padding=True
    )
    new = model.generate(**inputs, max_new_tokens=8)[:, inputs["input_ids"].shape[1] :]
    return processor.batch_decode(new, skip_special_tokens=True)


chats = [[{"role": "user", "content": content}] for content in settings["questions"]]
print(json.dumps({"alone": [answers([chat])[0] for chat in chats], "batch": answers(chats)}))
