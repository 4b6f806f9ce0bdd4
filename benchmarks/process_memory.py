"""What one process of a group takes: while it reads its share of a model, and in a step with shared sequences.

    python -m benchmarks.process_memory --json out/process_memory.json

Each case runs in processes of its own on the CPU. `reading`: `read_over_own` is the most memory of a process while
`from_pretrained` runs, beyond what it had before, over the bytes of the weights that it keeps; mapped files are not
counted, since the system may drop them. `step`: `step_mib` is what the allocator's trace shows beyond weights and
moments, on the fullest process, in forward and backward of one long sequence.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.same_bits import AUDIO, AUDIO_TOKEN, IMAGE_TOKEN, TEXT, VISION
from benchmarks.timing import Report, parse, peak_mib
from chorus_moe import ChorusConfig, ChorusForConditionalGeneration
from chorus_moe.training.scale.layout import Layout
from chorus_moe.training.scale.ranks import hold_same_rows
from chorus_moe.training.scale.spread import loading_in_shares, shares, spread

READING: dict[str, Any] = {
    **{"hidden_size": 512, "num_hidden_layers": 6, "intermediate_size": 1024, "moe_intermediate_size": 512},
    **{"vocab_size": 16_384, "num_key_value_heads": 4, "head_dim": 128, "shared_expert_intermediate_size": 512},
}
STEP: dict[str, Any] = {
    **{"hidden_size": 128, "num_hidden_layers": 6, "intermediate_size": 256, "moe_intermediate_size": 128},
    **{"num_key_value_heads": 4, "max_position_embeddings": 4096},
}
LENGTH = 2048
READERS = [Layout(), Layout(fsdp=2), Layout(fsdp=2, expert=2), Layout(tensor=2)]
STEPS = [Layout(), Layout(context=2), Layout(context=4)]


def make_config(text: dict[str, Any]) -> ChorusConfig:
    return ChorusConfig(
        text_config=TEXT | text,
        vision_config=VISION,
        audio_config=AUDIO,
        image_token_id=IMAGE_TOKEN,
        audio_token_id=AUDIO_TOKEN,
    )


def own_bytes() -> int:
    """Memory of this process that is no file's."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024


class Peak(threading.Thread):
    """The most of `own_bytes`, looked at every few milliseconds until `stop`."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most, self.ends = 0, threading.Event()

    def run(self) -> None:
        while not self.ends.is_set():
            self.most = max(self.most, own_bytes())
            time.sleep(0.002)

    def stop(self) -> int:
        self.ends.set()
        self.join()
        return self.most


def read(layout: Layout, folder: Path) -> dict[str, float]:
    options = {}
    if layout.is_sharded:
        # The small model brings in all code, which would count as the model's.
        options = loading_in_shares(layout, ChorusForConditionalGeneration, str(folder / "small"))
    ChorusForConditionalGeneration.from_pretrained(folder / "small", **options)
    if layout.is_sharded:
        options = loading_in_shares(layout, ChorusForConditionalGeneration, str(folder / "model"))
    before, peak = own_bytes(), Peak()
    peak.start()
    model = ChorusForConditionalGeneration.from_pretrained(folder / "model", **options)
    most, held = peak.stop() - before, shares(model)
    own = held["own"] * 4
    return {
        "own_mib": own / 2**20,
        "read_mib": most / 2**20,
        "read_over_own": most / own,
        "share": own / held["whole"] / 4,
    }


def step(layout: Layout) -> dict[str, float]:
    torch.manual_seed(0)
    hold_same_rows(layout.copies, layout.context)
    model: Any = ChorusForConditionalGeneration(make_config(STEP)).train()
    spread(model, layout)
    ids = torch.randint(5, TEXT["vocab_size"], (1, LENGTH))
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}

    def run() -> None:
        model(**batch).loss.backward()
        model.zero_grad(set_to_none=True)

    run()
    return {"step_mib": peak_mib(run)}


def run_rank(folder: Path, number: int, kind: str) -> None:
    torch.set_num_threads(1)
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
    layout = {"read": READERS, "step": STEPS}[kind][number]
    found = read(layout, folder) if kind == "read" else step(layout)
    (folder / f"{os.environ.get('RANK', '0')}.json").write_text(json.dumps(found))
    # Threads of the backend may hang an orderly exit; everything is written.
    os._exit(0)


def run_processes(folder: Path, kind: str, number: int, layout: Layout) -> dict[str, float]:
    """The most of what the processes found.

    Raises:
        RuntimeError: a process failed, with what it said.
    """
    count = layout.data * layout.fsdp * layout.copies
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)] if count > 1 else []
    words = [sys.executable, *launch, "-m", "benchmarks.process_memory", "--rank", str(folder), str(number), kind]
    done = subprocess.run(words, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600)
    if done.returncode != 0:
        raise RuntimeError(f"{kind} {layout.name} failed: {done.stderr[-3000:]}")
    found = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(count)]
    return {name: max(rank[name] for rank in found) for name in found[0]}


def main(arguments: list[str] | None = None) -> None:
    option = ("--rank", {"nargs": 3, "help": "folder, number of the layout and kind of a process; set by this program"})
    parsed = parse(__doc__.split("\n")[0], arguments, option)
    if parsed.rank is not None:
        run_rank(Path(parsed.rank[0]), int(parsed.rank[1]), parsed.rank[2])
    report = Report("memory of a process", parsed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        small = {"num_key_value_heads": 4}
        ChorusForConditionalGeneration(make_config(small)).save_pretrained(folder / "small")
        ChorusForConditionalGeneration(make_config(small if parsed.quick else READING)).save_pretrained(
            folder / "model"
        )
        for kind, layouts in (("read", READERS), ("step", STEPS)):
            for number, layout in enumerate(layouts[: 1 if parsed.quick else None]):
                values = run_processes(folder, kind, number, layout)
                report.cases[f"{kind}: {layout.name}"] = values
                told = " | ".join(f"{key} {value:.3g}" for key, value in values.items())
                print(f"{kind}: {layout.name:<20} | {told}", flush=True)
    report.save()


if __name__ == "__main__":
    main()
