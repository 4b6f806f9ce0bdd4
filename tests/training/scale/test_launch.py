"""Launch files, read by the programs that they start where those are here."""

import os
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser

from chorus_moe.serving.commands import app
from chorus_moe.training.scale.launch import WRITERS, Launch, launch_file, start

RECIPE = "multimodal"
TRAIN = ["chorus-moe", "train", RECIPE, "--resume_from_checkpoint", "auto"]


def words_of(text: str, program: str) -> list[str]:
    """The words of the last command of a shell script, from a program on."""
    words = shlex.split(text.replace("\\\n", " ").strip().splitlines()[-1])
    return words[words.index(program) + 1 :]


@pytest.mark.parametrize("nodes", [1, 2])
def test_torchrun_reads_its_words(nodes: int) -> None:
    read = get_args_parser().parse_args(words_of(launch_file(Launch(RECIPE, nodes, 4), "torchrun")[1], "torchrun"))
    assert (read.nnodes, read.nproc_per_node, read.standalone) == (str(nodes) if nodes > 1 else "1:1", "4", nodes == 1)
    assert [read.training_script, *read.training_script_args] == TRAIN and read.no_python and read.max_restarts == 3


@pytest.mark.parametrize("nodes", [1, 2])
def test_accelerate_reads_its_words(nodes: int) -> None:
    _, text = launch_file(Launch(RECIPE, nodes, 4), "accelerate")
    words = [word.replace("$RANK", "0") for word in words_of(text, "launch")]
    read = launch_command_parser().parse_args(words)
    assert (read.num_machines, read.num_processes, read.machine_rank) == (nodes, 4 * nodes, 0)
    assert [read.training_script, *read.training_script_args] == TRAIN and read.no_python


def test_slurm_asks_for_the_nodes_and_comes_back() -> None:
    name, text = launch_file(Launch(RECIPE, 3, 4), "slurm")
    said = [line for line in text.splitlines() if line.startswith("#SBATCH")]
    assert name == "job.sbatch" and text.splitlines()[1] == said[0]
    assert {"#SBATCH --nodes=3", "#SBATCH --gpus-per-node=4", "#SBATCH --requeue"} <= set(said)
    assert get_args_parser().parse_args(words_of(text, "torchrun")).nnodes == "3"


def test_skypilot_is_given_a_task_of_its_keys() -> None:
    asked = Launch(RECIPE, 2, 4, ["--output_dir", "/outputs/run"], accelerator="A100", bucket="my-runs")
    task: dict[str, Any] = yaml.safe_load(launch_file(asked, "skypilot")[1])
    # https://docs.skypilot.co/en/stable/reference/yaml-spec.html
    assert set(task) <= {"name", "workdir", "num_nodes", "resources", "file_mounts", "setup", "run"}
    assert task["num_nodes"] == 2 and task["resources"] == {"accelerators": "A100:4", "use_spot": True}
    # What a preemption must not take away is the folder that the recipe writes to.
    assert task["file_mounts"] == {"/outputs/run": {"name": "my-runs", "mode": "MOUNT_CACHED"}}
    assert get_args_parser().parse_args(words_of(task["run"], "torchrun")).nnodes == "2"
    with pytest.raises(ValueError, match="must be an absolute path"):
        launch_file(Launch(RECIPE, bucket="my-runs"), "skypilot")


@pytest.mark.parametrize("starter", WRITERS)
@pytest.mark.parametrize("nodes", [1, 2])
def test_every_file_starts_the_same_command(starter: str, nodes: int) -> None:
    _, text = launch_file(Launch(RECIPE, nodes, 2, ["--run_name", "it's mine"]), starter)
    assert """chorus-moe train multimodal --run_name 'it'"'"'s mine' --resume_from_checkpoint auto""" in text


def test_a_recipe_whose_layout_has_other_sizes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("parallel: {fsdp: 3}\ntraining: {output_dir: out}\n", encoding="utf-8")
    with pytest.raises(ValueError, match="does not divide the 16 processes"):
        Launch(str(path), 2, 8)
    with pytest.raises(FileNotFoundError, match="no recipe 'multimodel'; did you mean 'multimodal'"):
        Launch("multimodel")
    with pytest.raises(ValueError, match="unknown --with 'slurn'; did you mean 'slurm'"):
        launch_file(Launch(RECIPE), "slurn")


def test_without_dry_run_torchrun_starts_here(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(os, "execvp", lambda program, words: started.append([program, *words]))
    app(["launch", RECIPE, "--gpus-per-node", "2", "--learning_rate", "1e-4"], standalone_mode=False)
    assert started[0][:2] == ["torchrun", "torchrun"] and "--nproc-per-node=2" in started[0]
    assert started[0][-6:] == [*TRAIN[1:3], "--learning_rate", "1e-4", *TRAIN[3:]][-6:]
    with pytest.raises(ValueError, match="found --with slurm --nodes 2"):
        start(Launch(RECIPE, nodes=2), "slurm")


def test_dry_run_prints_or_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["launch", RECIPE, "--with", "slurm", "--nodes", "2", "--dry-run"]
    app(words, standalone_mode=False)
    printed = capsys.readouterr().out
    app([*words, "--out", str(tmp_path / "files")], standalone_mode=False)
    assert (tmp_path / "files" / "job.sbatch").read_text(encoding="utf-8") == printed


@pytest.mark.parametrize("starter", ["torchrun", "accelerate", "slurm"])
@pytest.mark.parametrize("nodes", [1, 2])
def test_shellcheck_finds_nothing(starter: str, nodes: int, tmp_path: Path) -> None:
    # `pip --target`, which makes the environment of `.ci/matrix launch`, puts programs beside the packages.
    places = os.pathsep.join((f"{sysconfig.get_paths()['purelib']}/bin", os.environ.get("PATH", "")))
    program = shutil.which("shellcheck", path=places)
    if program is None:
        pytest.skip("shellcheck is not installed; `.ci/matrix launch` runs this")
    name, text = launch_file(Launch(RECIPE, nodes, 2, ["--run_name", "it's mine"]), starter)
    (tmp_path / name).write_text(text, encoding="utf-8")
    done = subprocess.run([program, "--shell=bash", tmp_path / name], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
