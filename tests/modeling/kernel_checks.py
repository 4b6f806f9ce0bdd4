"""Run as a program under `TRITON_INTERPRET=1`: the kernels of the experts on the CPU against the plain loop.

Prints one line a case: its name and the largest relative difference of outputs and gradients.
"""

from typing import Any

import torch
from transformers.integrations.moe import ExpertsInterface

from chorus_moe.fastpaths.experts_gpu import grouped_experts
from tests.fastpaths.test_experts_cpu import make, run


def on_this_device(experts: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return grouped_experts(hidden, index, weights, experts.gate_up_proj, experts.down_proj)


def main() -> None:
    ExpertsInterface.register("interpreted", on_this_device)
    for dtype in (torch.float32, torch.bfloat16):
        for tokens, sentinels in ((0, False), (5, False), (40, True)):
            experts, hidden, index, weights = make(tokens, dtype, top_k=3, num_experts=7, width=64, inner=48)
            if sentinels:
                index[::2, 1:] = 7
            expected = run(experts.float(), "eager", hidden.float(), index, weights.float())
            found = run(experts.to(dtype), "interpreted", hidden, index, weights)
            with torch.no_grad():
                found["output without gradients"] = on_this_device(experts, hidden, index, weights)
            expected["output without gradients"] = expected["output"]
            errors = [
                (found[name].float() - value).norm() / max(value.norm(), 1e-6) for name, value in expected.items()
            ]
            print(f"{str(dtype).removeprefix('torch.')} {tokens} {max(errors).item():.2e}", flush=True)


if __name__ == "__main__":
    main()
