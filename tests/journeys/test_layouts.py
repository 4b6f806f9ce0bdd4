"""Four processes learn in twenty steps what one learns; a run whose rank is killed is restarted by torchrun."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from chorus_moe.training.checkpoints import fault_of
from tests.fresh_process import ROOT, run_ranks
from tests.journeys.journey import SCRIPTS
from tests.training.scale.layout_runs import run, write_model_and_rows
from tests.training.scale.test_spread import LOSSES, PROGRAM, SAVED, SHORT, assert_same, losses_alone, weights

MIDDLE = "{folder}/whole/checkpoint-2"
TWO: list[list[Any]] = [
    ["copies", "plain", {"data": 2}, None, SHORT],
    ["whole", "routing", {"fsdp": 2, "expert": 2}, None, SAVED],
    ["again", "routing", {"fsdp": 2, "expert": 2}, MIDDLE, SAVED],
    ["background", "routing", {"fsdp": 2, "expert": 2}, None, SAVED | {"is_background": True}],
    ["as tensor", "routing", {"tensor": 2}, MIDDLE, SAVED | {"save_strategy": "no"}],
    ["exits", "exits", {"tensor": 2}, None, SHORT],
    ["frozen", "frozen", {"fsdp": 2}, None, SHORT],
]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_in_every_layout(tmp_path: Path) -> None:
    runs = json.dumps(TWO).replace("{folder}", str(tmp_path))
    done = run_ranks(PROGRAM, [str(tmp_path), runs], cwd=tmp_path, seconds=400)
    assert [rank.returncode for rank in done] == [0, 0], [rank.stderr[-2000:] for rank in done]
    found = [json.loads((tmp_path / f"2-{rank}.json").read_text()) for rank in range(2)]
    alone = {kind: losses_alone(tmp_path, kind, SAVED) for kind in ("plain", "routing", "exits", "frozen")}
    for name, kind, *_ in TWO:
        for rank in found:
            assert "error" not in rank[name], rank[name]["error"]
            assert rank[name]["losses"] == pytest.approx(alone[kind][: len(rank[name]["losses"])], abs=LOSSES)
    # Norms, routers and towers are whole on each rank of a tensor group, and its rows count once.
    assert found[0]["exits"]["own"] < 0.7 * found[0]["exits"]["whole"]
    assert found[0]["whole"]["strongest"] == found[1]["whole"]["strongest"]
    assert found[0]["as tensor"]["strongest"][-2:] == pytest.approx(found[0]["whole"]["strongest"][-2:], abs=1e-6)

    assert_same(tmp_path / "whole", tmp_path / "again")
    for step in ("checkpoint-2", "checkpoint-4"):
        assert fault_of(tmp_path / "background" / step) is None
        assert_same(tmp_path / "background" / step, tmp_path / "whole" / step)


FOUR: list[list[Any]] = [
    ["hybrid", "routing", {"data": 2, "fsdp": 2, "expert": 2}, None, {}],
    ["tensor", "routing", {"fsdp": 2, "tensor": 2, "expert": 4}, None, {"max_steps": 4, "save_steps": 4}],
    ["context", "context", {"context": 4}, None, {"max_steps": 4}],
    ["context and fsdp", "context", {"fsdp": 2, "context": 2}, None, {}],
    ["context and experts", "context", {"fsdp": 2, "expert": 4, "context": 2}, None, {"max_steps": 4}],
]


def at_end(folder: Path, name: str) -> str:
    return str(folder / name / "checkpoint-4")


@pytest.mark.slow
@pytest.mark.timeout(800)
def test_four_processes_learn_what_one_learns_and_any_number_reads_it(tmp_path: Path) -> None:
    FOUR[1][4]["save_strategy"] = "steps"
    done = run_ranks(PROGRAM, [str(tmp_path), json.dumps(FOUR)], cwd=tmp_path, ranks=4, seconds=400)
    assert [rank.returncode for rank in done] == [0] * 4, [rank.stderr[-2000:] for rank in done]
    # The rate falls over the steps that a run has, so four are not the first four of twenty.
    alone = {"hybrid": losses_alone(tmp_path, "routing", {}), "tensor": losses_alone(tmp_path, "routing", SAVED)}
    alone["context and fsdp"] = losses_alone(tmp_path, "context", {})
    alone["context"] = alone["context and experts"] = losses_alone(tmp_path, "context", {"max_steps": 4})
    for rank in range(4):
        found = json.loads((tmp_path / f"4-{rank}.json").read_text())
        for name, losses in alone.items():
            assert "error" not in found[name], found[name]["error"]
            assert found[name]["losses"] == pytest.approx(losses, abs=LOSSES)
        # Those of a context group share the model as well.
        assert found["context and fsdp"]["own"] < 0.27 * found["context and fsdp"]["whole"]

    # Nothing is left to learn: what is saved is what was loaded. transformers may take a step more, at a rate of 0:
    # it moves the balance bias alone.
    settings, expected = {"max_steps": 4, "ignore_data_skip": True}, weights(tmp_path / "tensor")
    for ranks in (2, 3):
        loads = [[f"on {ranks}", "routing", {"fsdp": ranks}, at_end(tmp_path, "tensor"), settings]]
        run_ranks(PROGRAM, [str(tmp_path), json.dumps(loads)], cwd=tmp_path, ranks=ranks, seconds=200)
    run(tmp_path / "on 1", "routing", {}, at_end(tmp_path, "tensor"), settings)
    for ranks in (1, 2, 3):
        found = weights(tmp_path / f"on {ranks}")
        assert found.keys() == expected.keys()
        moved = [name for name, tensor in found.items() if not tensor.equal(expected[name])]
        assert all(name.endswith("e_score_correction_bias") for name in moved), (ranks, moved)


def write_recipe(folder: Path) -> Path:
    write_model_and_rows(folder)
    training = {"output_dir": "out", "max_steps": 6, "save_steps": 2, "per_device_train_batch_size": 2}
    training |= {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "resume_from_checkpoint": "auto"}
    data = {"train_data": "rows.jsonl", "streaming": True, "documents": True}
    sections = {"model": {"model_name_or_path": "model"}, "data": data, "training": training}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(sections | {"parallel": {"fsdp": 2, "rows": 4}}))
    return folder / "recipe.yaml"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_torchrun_restarts_a_run_whose_rank_is_killed(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    words = ["--nproc-per-node", "2", "--max-restarts", "1", "--standalone"]
    program = [str(SCRIPTS / "killed_rank.py"), "train", "recipe.yaml"]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *words, *program],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "the run continues from checkpoint-2" in done.stderr
    # Of the killed rank (-9), or of the other, which ends (1) because the first is gone: whichever torchrun sees first.
    assert "exitcode: -9" in done.stderr or "exitcode: 1" in done.stderr

    whole = [*program[1:], "--output_dir", "whole"]
    for rank in run_ranks(SCRIPTS / "killed_rank.py", whole, cwd=tmp_path, seconds=200):
        assert rank.returncode == 0, rank.stderr[-2000:]
    assert_same(tmp_path / "out", tmp_path / "whole")
