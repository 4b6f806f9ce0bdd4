"""Loading an export in a process that cannot import the package."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.fresh_process import run_fresh

HIDE_THE_PACKAGE = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "chorus_moe":
            raise ModuleNotFoundError(f"{name} is hidden")

sys.meta_path.insert(0, Refuse())
sys.path = [entry for entry in sys.path if entry]
"""
COMPARE = """
import json

import torch, transformers
from safetensors.torch import load_file

for source, kind, autos in json.loads(sys.argv[1]):
    expected = load_file(source + "/expected.safetensors")
    for auto in autos:
        model = getattr(transformers, auto).from_pretrained(source, trust_remote_code=True).eval()
        assert type(model).__name__ == kind, (auto, type(model))
        with torch.no_grad():
            found = model(input_ids=torch.arange(5, 12)[None])
        for name, tensor in expected.items():
            # The package has a faster way to run experts, which sums in another order.
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5)
    model.save_pretrained(source + "/again")
    vision = [json.load(open(folder + "/config.json"))["vision_config"] for folder in (source, source + "/again")]
    # Loading names the type of the weights; what was measured of the encoder is saved as it was.
    assert vision[0] | {"dtype": "float32"} == vision[1]
"""
CHECK_IT_STAYED_HIDDEN = """
assert not [name for name in sys.modules if name.split(".")[0] == "chorus_moe"]
print("loaded")
"""


def run_without_the_package(program: str, arguments: Sequence[str], folder: Path, **variables: str) -> None:
    """Run a program in `folder`, in a process to which this package does not exist."""
    program = HIDE_THE_PACKAGE + program + CHECK_IT_STAYED_HIDDEN
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    done = run_fresh(program, arguments, cwd=folder, environment=environment, path=())
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "loaded"


def load_without_the_package(exports: Sequence[tuple[Any, Sequence[str], Path]], folder: Path) -> None:
    """Load exports, each with all of its Auto classes; class and outputs (but for rounding) are the model's.

    Args:
        exports: for each the model, the names of its Auto classes and its folder.
    """
    cases = []
    for model, auto_classes, export in exports:
        with torch.no_grad():
            outputs = model(input_ids=torch.arange(5, 12)[None])
        names = [name for name in ("logits", "last_hidden_state", "text_embeds") if outputs.get(name) is not None]
        save_file({name: outputs[name] for name in names}, export / "expected.safetensors")
        assert names
        cases.append((str(export), type(model).__name__, list(auto_classes)))
    variables = {"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"}
    run_without_the_package(COMPARE, [json.dumps(cases)], folder, **variables)
