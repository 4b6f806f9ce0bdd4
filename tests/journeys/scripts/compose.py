"""Compose a model in Python and save it with its processor."""

import json
import sys

from chorus_moe.surgery import compose

settings = json.loads(sys.argv[1])
out = settings.pop("out")
model, processor, report = compose(**settings)
model.save_pretrained(out)
processor.save_pretrained(out)
print(json.dumps({"parameters": sum(p.numel() for p in model.parameters()), "reported": report.parameters_after}))
