"""Answers of pipelines on the model of a folder, in batches."""

import json
import sys

from transformers import pipeline

settings = json.loads(sys.argv[1])
if settings["without_package"]:
    options = {"trust_remote_code": True}
else:
    import chorus_moe  # noqa: F401  registers the classes with transformers

    options = {}


def answers(task, batch_size, questions):
    pipe = pipeline(task, model=settings["model"], **options)
    chats = [[{"role": "user", "content": content}] for content in questions]
    # The text pipeline samples by default.
    greedy = {"max_new_tokens": 8, "do_sample": False}
    given = greedy if task == "text-generation" else {"generate_kwargs": greedy}
    found = pipe(chats, batch_size=batch_size, return_full_text=False, **given)
    return [(answer[0] if isinstance(answer, list) else answer)["generated_text"] for answer in found]


print(json.dumps([answers(*task) for task in settings["tasks"]]))
