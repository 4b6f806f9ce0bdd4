"""Ask the text parent by transformers alone."""

import json
import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

settings = json.loads(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(settings["model"])
tokenizer = AutoTokenizer.from_pretrained(settings["model"])
found = []
for question in settings["questions"]:
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    new = model.generate(**inputs, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :]
    found.append(tokenizer.decode(new, skip_special_tokens=True))
print(json.dumps(found))
