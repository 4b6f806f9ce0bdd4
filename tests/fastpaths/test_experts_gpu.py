"""The experts' kernels compute what the plain loop does (interpreted here; `test_on_gpu` runs them compiled), and where
they cannot run transformers' functions do."""

import os
import subprocess
import sys

import pytest
import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from chorus_moe.fastpaths import experts_gpu
from tests.fastpaths.test_experts_cpu import make, run

# float32 sums in another order: 4e-7 was the worst. bfloat16 rounds four times in a row: 7e-3.
RELATIVE = {"float32": 1e-5, "bfloat16": 2e-2}


def test_the_kernels_equal_the_plain_loop_forward_and_backward():
    pytest.importorskip("triton", reason="comes with the CUDA builds of torch")
    command = [sys.executable, "-W", "ignore", "-m", "tests.modeling.kernel_checks"]
    done = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    cases = [line.split() for line in done.stdout.splitlines()]
    assert len(cases) == 6
    for dtype, tokens, error in cases:
        assert float(error) <= RELATIVE[dtype], (dtype, tokens)


@pytest.mark.parametrize("with_gradients", [True, False])
def test_without_a_gpu_transformers_function_runs(with_gradients: bool, monkeypatch: pytest.MonkeyPatch):
    calls: list[int] = []
    real = ALL_EXPERTS_FUNCTIONS._global_mapping["grouped_mm"]
    monkeypatch.setitem(
        ALL_EXPERTS_FUNCTIONS._global_mapping, "grouped_mm", lambda *inputs: calls.append(1) or real(*inputs)
    )
    experts, hidden, index, weights = make(9)
    with torch.set_grad_enabled(with_gradients):
        experts_gpu.gpu_mm_experts_forward(experts, hidden, index, weights)
    assert len(calls) == 1


def test_slots_are_sorted_by_expert_in_order_of_tokens_with_sentinels_last():
    index = torch.tensor([[2, 0], [5, 2], [0, 9]])
    slots = experts_gpu._Slots.build(index, num_experts=5)
    assert slots.token_P.tolist() == [0, 2, 0, 1, 1, 2]
    assert slots.slot_TK.tolist() == [[2, 0], [-1, 3], [1, -1]]
    assert slots.ends_E.tolist() == [2, 2, 4, 4, 4]


def test_the_name_in_a_config_runs_on_the_cpu():
    experts, hidden, index, weights = make(9)
    found, expected = (run(experts, name, hidden, index, weights) for name in (experts_gpu.GPU_EXPERTS, "eager"))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
