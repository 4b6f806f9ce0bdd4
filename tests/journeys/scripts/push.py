"""Upload a saved model; settings: model, repository."""

import json
import sys

from transformers import AutoModelForMultimodalLM, AutoProcessor

from chorus_moe.training.hub import push_to_hub

settings = json.loads(sys.argv[1])
model = AutoModelForMultimodalLM.from_pretrained(settings["model"])
address = push_to_hub(model, AutoProcessor.from_pretrained(settings["model"]), settings["repository"])
print(json.dumps(address))
