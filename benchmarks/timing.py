"""How every benchmark measures: variants take turns, ratios are formed within a round, medians are reported.

- The machine's speed drifts. `A B C A B C` with one ratio a round cancels the drift; all of A, then all of B, does not.
- With one thread the clock is the thread's own processor time, so other programs' turns are not counted. With more it
  is the wall clock.
- Peak memory is read from the allocator's trace of one extra call: what torch allocated beyond what was there before.
  Buffers inside matrix libraries are not seen.
- On a GPU the clock is the wall clock around a synchronised sample, and the allocator itself knows its peak.
"""

import argparse
import ctypes
import json
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from torch.profiler import ProfilerActivity, profile

OURS = "chorus"
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
Call = Callable[[], Any]


@dataclass(frozen=True)
class Timing:
    """One variant in one case: seconds of a call (median over rounds), all rounds, peak MiB of a call."""

    seconds: float
    rounds: list[float]
    peak_mib: float | None


def _clock(device: str) -> float:
    if device != "cpu":
        torch.accelerator.synchronize()
    return time.thread_time() if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter()


def _time(call: Call, repeats: int, device: str) -> float:
    start = _clock(device)
    for _ in range(repeats):
        call()
    return (_clock(device) - start) / repeats


def measure(
    calls: Mapping[str, Call],
    rounds: int,
    sample_seconds: float = 0.005,
    memory: bool = True,
    device: str = "cpu",
) -> dict[str, Timing]:
    """Time the variants in turns.

    Args:
        calls: name -> what to run, without arguments.
        rounds: rounds to record, after one to warm up.
        sample_seconds: short calls are repeated until one sample takes so long.
        memory: also trace the memory of one call each.
        device: where the calls run.
    """
    repeats = {}
    for name, call in calls.items():
        call()
        repeats[name] = max(1, math.ceil(sample_seconds / max(_time(call, 1, device), 1e-7)))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            samples[name].append(_time(call, repeats[name], device))
    return {
        name: Timing(median(samples[name]), samples[name], peak_mib(call, device) if memory else None)
        for name, call in calls.items()
    }


def ratio(other: Timing, ours: Timing) -> float:
    """How many times longer the other takes: the median of the rounds' ratios. Above 1, ours is faster."""
    return median(b / a for a, b in zip(ours.rounds, other.rounds, strict=True))


def peak_mib(call: Call, device: str = "cpu") -> float:
    """Most memory that one call had allocated at any moment, MiB."""
    if device != "cpu":
        torch.accelerator.reset_peak_memory_stats()
        before = torch.accelerator.memory_allocated()
        call()
        return (torch.accelerator.max_memory_allocated() - before) / 2**20
    with _quiet_stderr(), tempfile.TemporaryDirectory() as folder:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            call()
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        trace = json.loads(path.read_text(encoding="utf-8"))
    held = peak = 0
    for event in sorted(
        (e for e in trace["traceEvents"] if e["name"] == "[memory]"), key=lambda e: e["args"]["Ev Idx"]
    ):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak / 2**20


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """The profiler writes start and stop lines straight to the file descriptor."""
    sys.stderr.flush()
    saved, sink = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(sink)


def figures(timings: Mapping[str, Timing], ours: str = OURS) -> dict[str, float]:
    """A case as it goes to JSON: `{name}_ms`, `{name}_mib` and, against ours, `{name}_ratio`."""
    result: dict[str, float] = {}
    for name, timing in timings.items():
        result[f"{name}_ms"] = timing.seconds * 1e3
        if timing.peak_mib is not None:
            result[f"{name}_mib"] = timing.peak_mib
    for name, timing in timings.items():
        if name != ours:
            result[f"{name}_ratio"] = ratio(timing, timings[ours])
    return result


def keep_pages() -> None:
    """Let the C library serve every request from memory that it has had before, and give none back.

    By default glibc maps large tensors anew: the kernel clears their pages at the first write, which takes as long as
    writing them, and which of several variants finds free memory instead is luck. Other C libraries are left as they
    are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


class Report:
    """Prints one line a case and writes all cases as JSON: `{"machine": {...}, "cases": {case: figures}}`."""

    def __init__(self, title: str, arguments: argparse.Namespace):
        self.path: Path | None = arguments.json
        self.cases: dict[str, dict[str, float]] = {}
        self.machine = {
            "processor": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        print(
            f"{title}; {self.machine['threads']} thread(s), torch {torch.__version__}. xN: N times as long as {OURS}."
        )

    def add(self, case: str, values: dict[str, float], unit: str = "ms") -> None:
        self.cases[case] = values
        names = [key.removesuffix(f"_{unit}") for key in values if key.endswith(f"_{unit}")]
        cells = []
        for name in names:
            cell = f"{name} {values[f'{name}_{unit}']:.4g} {unit}"
            if f"{name}_mib" in values:
                cell += f" {values[f'{name}_mib']:.3g} MiB"
            if f"{name}_ratio" in values:
                cell += f" x{values[f'{name}_ratio']:.2f}"
            cells.append(cell)
        print(f"{case:<34} | " + " | ".join(cells), flush=True)

    def add_named(self, case: str, values: dict[str, float]) -> None:
        """A case whose figures have no unit in common, printed by their full names."""
        self.cases[case] = values
        print(f"{case:<34} | " + " | ".join(f"{name} {value:.4g}" for name, value in values.items()), flush=True)

    def save(self) -> None:
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps({"machine": self.machine, "cases": self.cases}, indent=2)
            self.path.write_text(text + "\n", encoding="utf-8")


def parser(description: str) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    result = argparse.ArgumentParser(description=description)
    result.add_argument("--json", type=Path, metavar="PATH", help="also write the figures here")
    result.add_argument("--quick", action="store_true", help="tiny sizes: does it run, not how fast is it")
    result.add_argument("--rounds", type=int, default=7, help="rounds to record (default 7)")
    result.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    result.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    return result


def parse(description: str, arguments: list[str] | None, *options: tuple[str, dict[str, Any]]) -> argparse.Namespace:
    """Read the command line and set the number of threads."""
    commands = parser(description)
    for name, settings in options:
        commands.add_argument(name, **settings)
    parsed = commands.parse_args(arguments)
    if parsed.quick:
        parsed.rounds = 1
    torch.set_num_threads(parsed.threads)
    torch.manual_seed(0)
    return parsed
