"""Processors in the processes that others start."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
# Several threads of torch have worked in the parent; the children of `map` are forks of it.
PROGRAM = """
import numpy as np
import torch
from datasets import Dataset

from chorus_moe import ChorusImageProcessor

torch.set_num_threads(2)
torch.nn.functional.interpolate(torch.rand(4, 3, 512, 512), size=(700, 700), mode="bicubic", antialias=True)
processor = ChorusImageProcessor(size={"height": 64, "width": 64})
picture = np.random.default_rng(0).integers(0, 255, (512, 512, 3), dtype=np.uint8)
alone = float(processor(picture, return_tensors="np")["pixel_values"].sum())
rows = Dataset.from_dict({"index": [0, 1, 2, 3]})
mapped = rows.map(lambda row: {"sum": float(processor(picture, return_tensors="np")["pixel_values"].sum())}, num_proc=2)
print(all(abs(found - alone) < 1e-3 * abs(alone) for found in mapped["sum"]), torch.get_num_threads())
"""


def test_map_with_two_processes_ends_after_torch_has_worked() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout.split() == ["True", "2"], done.stderr[-2_000:]
