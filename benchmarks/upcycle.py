"""Composing and upcycling a text model of a billion parameters: memory and time against copying the files.

Run as `python -m benchmarks.upcycle`. A Llama of random numbers is written to a temporary folder (about 2.5 GB in
bfloat16, `--dtype float32` for twice as much), then composed into a model with expert banks and new towers:

- `chorus` writes the checkpoint straight to disk (`compose_checkpoint`), in a process of its own, imports not counted;
  `copy` copies the files that it wrote, `copy_parent` the parent's. All end with fsync, and take turns. `xN`: the copy
  takes N times as long as ours, so that .5 means that ours takes twice as long;
- `peak_mib` is by how much the largest resident set exceeds the one before; mapped files count. `peak_of_parent_ratio`
  divides it by the size of the parent's files;
- `build` is what `compose` does, which ends with the model in memory: its peak is divided by the size of the child.

Before anything is timed, every expert of a layer is compared with the parent's feed-forward.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.timing import OURS, Report, Timing, figures, parse
from chorus_moe.modeling.configuration_towers import ChorusAudioConfig, ChorusVisionConfig
from chorus_moe.modeling.modeling_generation import ChorusForConditionalGeneration
from chorus_moe.surgery.checkpoint_writer import PlannedTensor, write_checkpoint
from chorus_moe.surgery.compose_plan import compose_checkpoint, plan_composition
from chorus_moe.surgery.parent_checkpoint import ParentCheckpoint

MIB = 2**20
BILLION: dict[str, Any] = {
    "vocab_size": 128_256,
    "hidden_size": 2_048,
    "intermediate_size": 8_192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
}
QUICK: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
QUICK_TOWERS: tuple[dict[str, Any], dict[str, Any]] = (
    {"model_args": {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}, "image_size": 32},
    {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64},
)


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[Tensor]:
    yield torch.randn(shape, dtype=dtype).mul_(0.02)


def write_parent(folder: Path, sizes: dict[str, Any], dtype: torch.dtype) -> None:
    """A checkpoint of random numbers, in shards like those of the Hub."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**sizes, dtype=dtype))
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items() if name != "lm_head.weight"}
    planned = {
        name: PlannedTensor(shape, dtype, partial(random_tensor, shape, dtype)) for name, shape in shapes.items()
    }
    write_checkpoint(folder, planned, max_shard_size=2**30)
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(folder)


def arguments_of(layers: int, quick: bool) -> dict[str, Any]:
    """Two sparse layers, four banks of four experts: the child is somewhat larger than twice the parent."""
    vision, audio = QUICK_TOWERS if quick else ({}, {})
    return {
        "vision": ChorusVisionConfig(**vision),
        "audio": ChorusAudioConfig(**audio),
        "num_experts": 4,
        "sparse_layers": [layers // 4, layers // 2],
    }


def work(kind: str, parent: Path, child: Path, layers: int, quick: bool) -> dict[str, float]:
    """One composition in this process: seconds, and MiB of the peak beyond what was resident before."""
    options = arguments_of(layers, quick)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    start = time.perf_counter()
    if kind == "build":
        plan_composition(ChorusForConditionalGeneration, parent, **options).build()
    else:
        compose_checkpoint(child, parent, **options)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds, "peak_mib": max(peak - before, 0) / MIB}


def run_worker(kind: str, parent: Path, child: Path, layers: int, quick: bool) -> dict[str, float]:
    """`work` in a fresh process."""
    program = (
        "import json, sys; from pathlib import Path; from benchmarks.upcycle import work; "
        f"print(json.dumps(work({kind!r}, Path({str(parent)!r}), Path({str(child)!r}), {layers}, {quick})))"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def copy_files(source: Path, target: Path) -> float:
    """Seconds to copy a checkpoint's tensors, until they are on the disk."""
    target.mkdir()
    start = time.perf_counter()
    for path in sorted(source.glob("*.safetensors")):
        shutil.copyfile(path, target / path.name)
        with open(target / path.name, "rb+") as file:
            os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    return seconds


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def check_copies(parent: Path, child: Path) -> None:
    """Parity before speed."""
    ours, theirs = ComposedExperts(child), ParentCheckpoint(parent)
    for name in ours.expert_names:
        layer = name.split(".layers.")[1].split(".")[0]
        gate = theirs.read(f"model.layers.{layer}.mlp.gate_proj.weight")
        for expert in ours.read(name):
            if not torch.equal(expert[: len(gate)], gate):
                raise AssertionError(f"{name} is not a copy of the parent's feed-forward")


class ComposedExperts:
    """The stacked gate and up projections of a composed checkpoint."""

    def __init__(self, folder: Path):
        self.paths = {}
        for path in folder.glob("*.safetensors"):
            with safe_open(path, framework="pt") as file:
                self.paths |= dict.fromkeys(file.keys(), path)
        self.expert_names = [name for name in self.paths if name.endswith("experts.gate_up_proj")]

    def read(self, name: str) -> Tensor:
        with safe_open(self.paths[name], framework="pt") as file:
            return file.get_tensor(name)


def rounds_of(folder: Path, parsed: argparse.Namespace, layers: int) -> dict[str, list[float]]:
    parent, child, copied = folder / "parent", folder / "child", folder / "copied"
    found: dict[str, list[float]] = {
        name: [] for name in (OURS, "copy", "copy_parent", "peak_mib", "build_mib", "child")
    }
    found["build"] = []
    for index in range(parsed.rounds):
        done = run_worker("compose", parent, child, layers, parsed.quick)
        if index == 0:
            check_copies(parent, child)
        found[OURS].append(done["seconds"])
        found["peak_mib"].append(done["peak_mib"])
        found["copy"].append(copy_files(child, copied))
        found["copy_parent"].append(copy_files(parent, copied))
        found["child"].append(size_of(child))
        shutil.rmtree(child)
    done = run_worker("build", parent, child, layers, parsed.quick)
    found["build"].append(done["seconds"])
    found["build_mib"].append(done["peak_mib"])
    return found


def main(arguments: list[str] | None = None) -> None:
    parsed = parse("Composing a model against copying its files.", arguments)
    parsed.rounds = 1 if parsed.quick else min(parsed.rounds, 3)
    sizes = QUICK if parsed.quick else BILLION
    report = Report(f"upcycle, {parsed.dtype}", parsed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "parent").mkdir()
        write_parent(folder / "parent", sizes, getattr(torch, parsed.dtype))
        found = rounds_of(folder, parsed, sizes["num_hidden_layers"])
        parent_mib, child_mib = size_of(folder / "parent") / MIB, found["child"][0] / MIB
    timings = {key: Timing(median(found[key]), found[key], None) for key in (OURS, "copy", "copy_parent")}
    report.add("write the checkpoint", figures(timings))
    peak = max(found["peak_mib"])
    report.add(
        "memory of writing",
        {
            "parent_mib": parent_mib,
            "child_mib": child_mib,
            "peak_mib": peak,
            "peak_of_parent_ratio": peak / parent_mib,
        },
        "mib",
    )
    build = found["build_mib"][0]
    report.add(
        "build in memory",
        {"build_ms": found["build"][0] * 1e3, "build_mib": build, "build_of_child_ratio": build / child_mib},
    )
    report.save()


if __name__ == "__main__":
    main()
