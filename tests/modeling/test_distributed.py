"""Two processes that hold different modalities neither hang nor fail, and compute the gradients of one process.

All checks run in one group of two processes (`distributed_checks.py`); each test reads the result of one.
"""

import json

import pytest
import torch

from chorus_moe import ChorusForConditionalGeneration
from tests.conftest import tiny_config
from tests.fresh_process import ROOT, run_ranks
from tests.modeling.distributed_checks import make
from tests.modeling.test_modeling_heads import contrastive

SECONDS = 120
# Two addends and an exact factor of two, so the difference seen is 0; relative to the largest gradient of a tensor.
GRADIENTS = 1e-6
# Partial sums added in another order: worst seen is 5e-5 of a tensor's largest gradient.
GRADIENTS_APART = 1e-3
# Logits of size 1, partial sums added by an all-reduce: worst difference seen is 3e-7.
LOGITS = 5e-6

CHECKS = [f"{way}, {kind}" for way in ("ddp", "fsdp2") for kind in ("text", "audio", "no labels", "routing")]
CHECKS += ["ddp with checkpointing, text", "ddp with checkpointing, routing", "tensor parallel", "expert parallel"]
CHECKS += ["tensor parallel, routing", "expert parallel, routing", "tensor parallel, windows"]
CHECKS += [f"contrast, {kind}" for kind in ("infonce, rows apart", "sigmoid, rows apart", "tensor parallel")]
CHECKS += ["training with unused slots, experts apart"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict]]:
    folder, output = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("results")
    torch.manual_seed(0)
    ChorusForConditionalGeneration(tiny_config()).save_pretrained(folder)
    for kind in ("routing", "windows"):
        make(kind).save_pretrained(folder / kind)
    contrastive(router_aux_loss_coef=0.0).save_pretrained(folder / "contrast")
    program, arguments = ROOT / "tests/modeling/distributed_checks.py", [str(folder), str(output)]
    done = run_ranks(program, arguments, cwd=output, seconds=SECONDS)
    stderr = "".join(f"ended with {rank.returncode}: {rank.stderr[-3000:]}" for rank in done)
    found: dict[str, list[dict]] = {"stderr": [{"error": stderr}]}
    for file in output.glob("*.jsonl"):
        for line in file.read_text().splitlines():
            result = json.loads(line)
            found.setdefault(result["name"], []).append(result)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKS)
def test_two_processes_compute_what_one_computes(results: dict[str, list[dict]], name: str) -> None:
    ranks = results.get(name, [])
    assert len(ranks) == 2, results["stderr"][0]["error"]
    tolerance = LOGITS if "parallel" in name else GRADIENTS_APART if "apart" in name else GRADIENTS
    for rank in ranks:
        assert "error" not in rank, rank["error"]
        assert rank["worst"] < tolerance
