"""Ask a server by OpenAI's client, with pictures as data addresses."""

import base64
import json
import sys

import openai

settings = json.loads(sys.argv[1])
client = openai.OpenAI(base_url=settings["address"], api_key="none")


def part(given):
    if given["type"] != "image":
        return given
    with open(given["image"], "rb") as file:
        data = base64.b64encode(file.read()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/webp;base64,{data}"}}


answers = []
for question in settings["questions"]:
    content = question if isinstance(question, str) else list(map(part, question))
    said = client.chat.completions.create(
        model=settings["model"], messages=[{"role": "user", "content": content}], max_tokens=8, temperature=0
    )
    answers.append(said.choices[0].message.content)
print(json.dumps(answers))
