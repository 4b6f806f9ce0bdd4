"""Each kernel of the experts against torch, interpreted on the CPU in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fresh_process import ROOT

# Wider than one block, no power of two, one number, and nothing at all.
PROGRAM = """
import json
import torch
from chorus_moe.fastpaths import triton_kernels as kernels

found = {}
# Blocks small enough for two of them: interpreting 1,024 columns a time takes seconds.
kernels.BLOCK = 16
for dtype in (torch.float32, torch.bfloat16):
    for slots, width in ((3, 1), (4, 16), (3, 17), (2, 40), (0, 8)):
        torch.manual_seed(slots + width)
        hidden = torch.randn(slots, 2 * width).to(dtype)
        weight, grad = torch.randn(slots), torch.randn(slots, width).to(dtype)
        wide, scale = hidden.double().requires_grad_(), weight.double().requires_grad_()
        gate, up = wide.chunk(2, dim=1)
        expected = torch.nn.functional.silu(gate) * up * scale[:, None]
        expected.backward(grad.double())
        active = kernels.swiglu(hidden, weight)
        grads = kernels.swiglu_backward(hidden, weight, grad)
        pairs = [("swiglu", active, expected), ("gradient", grads[0], wide.grad), ("weight", grads[1], scale.grad)]
        pairs.append(("again", grads[2], expected))
        for name, ours, theirs in pairs:
            assert ours.shape == theirs.shape and ours.dtype == (torch.float32 if name == "weight" else dtype)
            error = (ours.double() - theirs).abs().max().item() if slots else 0.0
            found[f"{name} {str(dtype)[6:]} {slots}x{width}"] = error / (theirs.abs().max().item() if slots else 1.0)
for tokens, width in ((1, 1), (3, 16), (4, 40), (0, 8)):
    states = torch.randn(5, width)
    slots = torch.tensor([[0, 4, 2], [-1, 1, 1], [-1, -1, -1], [3, -1, 0]])[:tokens]
    # What no product wrote must not be read.
    out = kernels.combine(torch.cat([states, torch.full((1, width), float("nan"))]), slots)
    expected = torch.stack([sum((states[s] for s in row if s >= 0), torch.zeros(width)) for row in slots.tolist()]
                           or [torch.zeros(0)]).view(tokens, width)
    found[f"combine {tokens}x{width}"] = (out - expected).abs().max().item() if tokens else 0.0
print(json.dumps(found))
"""


def test_kernels_compute_what_torch_does(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="comes with the CUDA builds of torch")
    # Not forked: Triton reads the variable when it is imported, which torchvision does.
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 44
    for name, error in found.items():
        # The interpreter cuts the bits off that bfloat16 lacks, where a GPU rounds: once, by up to one unit.
        assert error <= (2**-7 if "bfloat16" in name and "weight" not in name else 2e-6), (name, error)


def test_blocks_are_powers_of_two_up_to_a_bound() -> None:
    pytest.importorskip("triton", reason="comes with the CUDA builds of torch")
    from chorus_moe.fastpaths import triton_kernels

    widths = (1, 2, 3, 64, 65, 1023, 1024, 1025, 5000)
    assert [triton_kernels._block(width) for width in widths] == [1, 2, 4, 64, 128, 1024, 1024, 1024, 1024]
