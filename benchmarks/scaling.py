"""Every layout against one process: the loss of 20 steps, what a process holds, and tokens a second.

    python -m benchmarks.scaling --json out/scaling.json

The layouts of as many processes run in one `torchrun`, on the CPU. All see the same eight rows a step, text with and
without an image; the model has every rule of balance, capacity, a learned number of experts. `loss_difference` is the
largest of all steps and ranks; layouts with `context`, which refuse capacity, train the model without it. Tokens a
second are of this machine's cores, which all processes share: they show what the exchanges cost, and not what more
machines bring. At the end stands what `chorus-moe plan` says of small runs over what they took.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from benchmarks.plan_memory import planned_over_measured_memory
from benchmarks.same_bits import AUDIO, AUDIO_TOKEN, IMAGE_TOKEN, TEXT, VISION
from benchmarks.timing import Report, parse
from chorus_moe import ChorusConfig, ChorusForConditionalGeneration
from chorus_moe.training.recipe import TRAINER_SETTINGS, RunArguments
from chorus_moe.training.routing.callback import RoutingCallback
from chorus_moe.training.scale.layout import Layout
from chorus_moe.training.scale.ranks import hold_same_rows
from chorus_moe.training.scale.spread import shares, spread
from chorus_moe.training.trainer import ChorusTrainer

ROWS, LENGTH, STEPS, WARM = 8, 64, 20, 5
LAYOUTS = {
    1: [Layout()],
    2: [
        *(Layout(data=2), Layout(fsdp=2), Layout(fsdp=2, expert=2), Layout(tensor=2), Layout(tensor=2, expert=2)),
        Layout(context=2),
    ],
    4: [
        *(Layout(data=4), Layout(fsdp=4), Layout(data=2, fsdp=2), Layout(fsdp=4, expert=2), Layout(fsdp=4, expert=4)),
        *(Layout(fsdp=2, tensor=2), Layout(fsdp=2, tensor=2, expert=4), Layout(tensor=4)),
        *(Layout(context=4), Layout(fsdp=2, context=2), Layout(fsdp=2, expert=4, context=2)),
    ],
}
BANKS: dict[str, Any] = {
    "text": {"router": "sigmoid", "balance": "bias"},
    "image": {"balance": "cv2", "expert_capacity": 1.5, "capacity_overflow": "drop"},
    "audio": {"balance": "variance"},
    "common": {"balance": "switch", "expert_capacity": 4, "adaptive_experts": True},
}

# Capacity is counted over whole sequences, which processes of a context do not have.
UNLIMITED = {name: {**bank, "expert_capacity": None} for name, bank in BANKS.items()}
UNLIMITED_ALONE = "one process, no capacity"

Row = dict[str, Tensor]


def make_model(banks: dict[str, Any]) -> ChorusForConditionalGeneration:
    torch.manual_seed(0)
    text = TEXT | {"expert_banks": banks, "router_aux_loss_coef": 0.1, "router_z_loss_coef": 0.01}
    tokens = {"image_token_id": IMAGE_TOKEN, "audio_token_id": AUDIO_TOKEN}
    config = ChorusConfig(
        text_config=text | {"num_key_value_heads": 4}, vision_config=VISION, audio_config=AUDIO, **tokens
    )
    return ChorusForConditionalGeneration(config)


def make_rows(config: ChorusConfig, count: int) -> list[Row]:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for index in range(count):
        ids = torch.randint(5, config.text_config.vocab_size, (LENGTH,), generator=generator)
        row = {"labels": ids.clone(), "input_ids": ids}
        if index % 2:
            ids[2 : 2 + config.vision_config.num_image_tokens] = IMAGE_TOKEN
            row["labels"] = ids.masked_fill(ids == IMAGE_TOKEN, -100)
            row["pixel_values"] = torch.randn(3, 32, 32, generator=generator)
        rows.append(row)
    return rows


def collate(rows: list[Row]) -> Row:
    """A batch; pictures of those rows that have one."""
    names = ("input_ids", "labels", "pixel_values")
    found = {name: [row[name] for row in rows if name in row] for name in names}
    batch = {name: torch.stack(tensors) for name, tensors in found.items() if tensors}
    return batch | {"mm_token_type_ids": (batch["input_ids"] == IMAGE_TOKEN).long()}


class Clock(TrainerCallback):
    """When the steps after the first ones began and ended."""

    begun = ended = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ended = time.perf_counter()
        if state.global_step == WARM:
            self.begun = self.ended


def run_layout(layout: Layout, folder: str, limited: bool) -> dict[str, Any]:
    from accelerate.state import AcceleratorState

    # Of the layout before.
    AcceleratorState._reset_state()
    world = int(os.environ.get("WORLD_SIZE", "1"))
    sizes = {"max_steps": STEPS, "per_device_train_batch_size": ROWS * layout.copies // world, "learning_rate": 1e-3}
    quiet = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "logging_steps": 1, "save_strategy": "no"}
    arguments = RunArguments(folder, **sizes, **quiet, **TRAINER_SETTINGS)
    hold_same_rows(layout.copies, layout.context)
    model, clock = make_model(BANKS if limited else UNLIMITED).train(), Clock()
    spread(model, layout)
    rows = make_rows(model.config, ROWS * 4)
    trainer = ChorusTrainer(model=model, args=arguments, train_dataset=rows, data_collator=collate, callbacks=[clock])
    RoutingCallback.add_to(trainer)
    with open(os.devnull, "w") as nothing:
        said, sys.stdout = sys.stdout, nothing
        try:
            trainer.train()
        finally:
            sys.stdout = said
    held = shares(model)
    return {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "share": held["own"] / held["whole"],
        "tokens_per_second": ROWS * LENGTH * (STEPS - WARM) / (clock.ended - clock.begun),
    }


def run_rank(folder: Path) -> None:
    """One rank of a `torchrun`: all layouts of as many processes."""
    torch.set_num_threads(1)
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), os.environ.get("RANK", "0")
    found = {layout.name: run_layout(layout, str(folder), layout.context == 1) for layout in LAYOUTS[world]}
    if world == 1:
        found[UNLIMITED_ALONE] = run_layout(Layout(), str(folder), limited=False)
    (folder / f"{world}-{rank}.json").write_text(json.dumps(found))
    # Threads of the backend may hang an orderly exit; everything is written.
    os._exit(0)


def run_processes(number: int) -> list[dict[str, Any]]:
    """What each rank found.

    Raises:
        RuntimeError: a rank failed, with what it said.
    """
    with tempfile.TemporaryDirectory() as folder:
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(number)]
        words = [sys.executable, *launch, "-m", "benchmarks.scaling", "--rank-folder", folder]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=1800)
        if done.returncode != 0:
            raise RuntimeError(f"{number} processes failed: {done.stderr[-3000:]}")
        return [json.loads((Path(folder) / f"{number}-{rank}.json").read_text()) for rank in range(number)]


def main(arguments: list[str] | None = None) -> None:
    option = ("--rank-folder", {"type": Path, "help": "where a rank writes what it found; set by this program"})
    parsed = parse(__doc__.split("\n")[0], arguments, option)
    if parsed.rank_folder is not None:
        run_rank(parsed.rank_folder)
    report = Report("layouts", parsed)
    alone: dict[str, list[float]] = {}
    for number in (1,) if parsed.quick else LAYOUTS:
        if parsed.quick:
            # Starting processes takes longer than all else; journeys do.
            with tempfile.TemporaryDirectory() as folder:
                ranks = [{Layout().name: run_layout(Layout(), folder, limited=True)}]
        else:
            ranks = run_processes(number)
        for name, first in ranks[0].items():
            if number == 1:
                alone[name] = first["losses"]
            expected = alone[UNLIMITED_ALONE if "context" in name or name == UNLIMITED_ALONE else Layout().name]
            differences = [abs(a - b) for rank in ranks for a, b in zip(rank[name]["losses"], expected, strict=True)]
            values = {"loss_difference": max(differences), "share_of_model": max(rank[name]["share"] for rank in ranks)}
            speed = min(rank[name]["tokens_per_second"] for rank in ranks)
            report.add(f"{number} x: {name}", {**values, "speed_tokens/s": speed}, unit="tokens/s")
            print(
                f"    loss differs by {max(differences):.1e}, {values['share_of_model']:.0%} held, {speed:.0f} tokens/s"
            )
    planned = {} if parsed.quick else planned_over_measured_memory()
    for name, ratio in planned.items():
        report.cases[f"plan: {name}"] = {"planned_over_measured_memory": ratio}
        print(f"plan: {name:<24} | planned_over_measured_memory {ratio:.2f}", flush=True)
    report.save()


if __name__ == "__main__":
    main()
