"""Launch files: one recipe on many devices, started by torchrun, accelerate, Slurm or SkyPilot.

Unusual here:
- every file starts the same command on each node, `chorus-moe train RECIPE`, so a recipe does not know who started it;
- every file asks to resume: after a preemption the same file goes on from the newest whole checkpoint.
"""

import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import yaml

from chorus_moe.modeling.configuration_banks import check_name
from chorus_moe.training.scale.layout import layout_of
from chorus_moe.training.stages import find_recipe, read_stages

RESUME = ("--resume_from_checkpoint", "auto")
# A rank that dies ends its group, which torchrun starts again so often; a whole node that is lost, the scheduler does.
RESTARTS, PORT = 3, 29500
# torch's default of one thread a process would leave data loading to it alone.
HEADER = '#!/usr/bin/env bash\n{lines}set -euo pipefail\nexport OMP_NUM_THREADS="${{OMP_NUM_THREADS:-8}}"\n'


@dataclass(frozen=True)
class Launch:
    """A run of a recipe on some nodes.

    Args:
        recipe: a file, or the name of one that comes with the package.
        options: more words of `chorus-moe train`.
        accelerator: SkyPilot's name of the device.
        bucket: where SkyPilot keeps the output folder; None keeps it on the node, which a preemption takes away.

    Raises:
        FileNotFoundError, ValueError: as `find_recipe` and `read_stages`; sizes of `parallel` that do not make up the
            devices.
    """

    recipe: str
    nodes: int = 1
    gpus_per_node: int = 8
    options: Sequence[str] = ()
    accelerator: str = "H100"
    bucket: str | None = None

    def __post_init__(self) -> None:
        # A mistake of the recipe is found here and not on many rented devices.
        for stage in read_stages(find_recipe(self.recipe), self.options):
            layout_of(stage.recipe.parallel, self.nodes * self.gpus_per_node)

    @property
    def name(self) -> str:
        return Path(self.recipe).stem

    @property
    def train(self) -> str:
        """The command of each process, for a shell."""
        return shlex.join(["chorus-moe", "train", self.recipe, *self.options, *RESUME])


def torchrun_words(launch: Launch) -> list[str]:
    """What starts a run on one machine."""
    words = ["torchrun", "--standalone", f"--nproc-per-node={launch.gpus_per_node}", f"--max-restarts={RESTARTS}"]
    return [*words, "--no-python", *shlex.split(launch.train)]


def torchrun_file(launch: Launch) -> str:
    header = HEADER.format(lines="")
    if launch.nodes == 1:
        return f"{header}exec {shlex.join(torchrun_words(launch))}\n"
    lines = f"# On each of the {launch.nodes} nodes: HEAD=name of the first node bash torchrun.sh\n"
    return (
        f'{HEADER.format(lines=lines)}: "${{HEAD:?name or address of the first node}}"\n{_torchrun(launch, "$HEAD")}\n'
    )


def _torchrun(launch: Launch, head: str) -> str:
    """torchrun on each of several nodes, which meet at the first one."""
    words = [
        "torchrun",
        f"--nnodes={launch.nodes}",
        f"--nproc-per-node={launch.gpus_per_node}",
        "--rdzv-backend=c10d",
        f'--rdzv-endpoint="{head}:{PORT}"',
        f"--rdzv-id={shlex.quote(launch.name)}",
        f"--max-restarts={RESTARTS}",
        f"--no-python {launch.train}",
    ]
    return " \\\n  ".join(words)


def accelerate_file(launch: Launch) -> str:
    lines, meeting = "", ["--machine_rank=0"]
    if launch.nodes > 1:
        lines = (
            f"# On each of the {launch.nodes} nodes: HEAD=address of the first node RANK=0, 1, ... bash accelerate.sh\n"
        )
        meeting = ['--machine_rank="$RANK"', '--main_process_ip="$HEAD"', f"--main_process_port={PORT}"]
    words = [
        "accelerate launch",
        "--multi_gpu" if launch.nodes * launch.gpus_per_node > 1 else "--num_cpu_threads_per_process=8",
        f"--num_machines={launch.nodes}",
        f"--num_processes={launch.nodes * launch.gpus_per_node}",
        *meeting,
        # Said, so that no question is asked and no file in a home folder is read.
        "--mixed_precision=no",
        "--dynamo_backend=no",
        f"--max_restarts={RESTARTS}",
        f"--no_python {launch.train}",
    ]
    checks = ""
    if launch.nodes > 1:
        checks = ': "${HEAD:?address of the first node}" "${RANK:?number of this node, from 0}"\n'
    return HEADER.format(lines=lines) + checks + " \\\n  ".join(words) + "\n"


def slurm_file(launch: Launch) -> str:
    directives = {
        "job-name": launch.name,
        "nodes": launch.nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": launch.gpus_per_node,
        # A job that is preempted, or whose node is lost, is queued again and resumes.
        "requeue": None,
        "open-mode": "append",
        "output": "%x-%j.log",
    }
    words = (f"--{name}" if value is None else f"--{name}={value}" for name, value in directives.items())
    lines = "".join(f"#SBATCH {word}\n" for word in words)
    head = 'head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)\n'
    return f"{HEADER.format(lines=lines)}{head}srun --kill-on-bad-exit=1 {_torchrun(launch, '$head')}\n"


class _Text(str):
    """A text of several lines, which YAML shows as it is."""


class _Dumper(yaml.SafeDumper):
    pass


_Dumper.add_representer(_Text, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|"))


def skypilot_file(launch: Launch) -> str:
    """A task of SkyPilot; `sky jobs launch` brings it back after a preemption."""
    run = 'set -euo pipefail\nhead=$(echo "$SKYPILOT_NODE_IPS" | head -n 1)\n' + _torchrun(launch, "$head") + "\n"
    task: dict[str, object] = {
        "name": launch.name,
        "num_nodes": launch.nodes,
        "resources": {"accelerators": f"{launch.accelerator}:{launch.gpus_per_node}", "use_spot": True},
        "workdir": ".",
        "setup": "pip install chorus-moe",
        "run": _Text(run),
    }
    if launch.bucket is not None:
        task["file_mounts"] = {output_folder(launch): {"name": launch.bucket, "mode": "MOUNT_CACHED"}}
    return yaml.dump(task, Dumper=_Dumper, sort_keys=False, width=120)


def output_folder(launch: Launch) -> str:
    """Where the recipe writes, which must be the same on a node that takes the place of another."""
    stages = read_stages(find_recipe(launch.recipe), launch.options)
    folder = str(stages[0].recipe.training.output_dir)
    if not Path(folder).is_absolute():
        raise ValueError(
            f"--bucket {launch.bucket}: it is mounted in the place of training.output_dir={folder!r}, which must be an "
            "absolute path; add --output_dir /outputs"
        )
    return folder


# By what starts it -> name of the file, and its text.
WRITERS: dict[str, tuple[str, Callable[[Launch], str]]] = {
    "torchrun": ("torchrun.sh", torchrun_file),
    "accelerate": ("accelerate.sh", accelerate_file),
    "slurm": ("job.sbatch", slurm_file),
    "skypilot": ("sky.yaml", skypilot_file),
}


def launch_file(launch: Launch, starter: str) -> tuple[str, str]:
    """Name and text of the file that starts a run.

    Raises:
        ValueError: an unknown starter; SkyPilot's bucket with a relative output folder.
    """
    check_name("launch", "--with", starter, WRITERS)
    name, write = WRITERS[starter]
    return name, write(launch)


def start(launch: Launch, starter: str) -> NoReturn:
    """Become torchrun, on this machine.

    Raises:
        ValueError: a run that another program, or more than one machine, starts.
    """
    if starter != "torchrun" or launch.nodes > 1:
        raise ValueError(
            f"launch: without --dry-run torchrun starts on this machine; found --with {starter} --nodes {launch.nodes}"
        )
    words = torchrun_words(launch)
    os.execvp(words[0], words)
