"""This checkout against another one: the same benchmarks, process after process in turns, cases side by side.

Run as `python -m benchmarks.against ../before --benchmarks decode sparse_layer --turns 3`. Options that it does not
know go to the benchmarks. Both codes are measured by the programs of this checkout: rounds and samples of an older
version differ, which was worth up to 30%. A module that the other one has under another name must be found there under
ours: `PYTHONPATH` may lead to a `sitecustomize` that renames it.

A line a case gives the median over the turns of this checkout's time over the other's, for ours and for each peer that
both measured: a peer's code is the same in both, so how far its figure is from 1 says how far the machine drifted.
Above 1, this checkout takes longer.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from benchmarks.timing import OURS, parser

HERE = Path(__file__).resolve().parents[1]
Cases = dict[str, dict[str, float]]


def run(checkout: Path, benchmark: str, options: list[str]) -> Cases:
    """Run one benchmark of ours in a process of its own, on the code of that checkout, and read its figures."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "figures.json"
        # Alone in its folder, so that the package is found in the checkout and the program here.
        (Path(folder) / "benchmarks").symlink_to(HERE / "benchmarks")
        command = [sys.executable, "-m", f"benchmarks.{benchmark}", "--json", str(path), *options]
        search = [folder, str(checkout), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(search)}
        found = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        if found.returncode:
            sys.stderr.write(found.stderr)  # what was missing there stands in it
            found.check_returncode()
        return json.loads(path.read_text(encoding="utf-8"))["cases"]


def seconds(figures: dict[str, float]) -> dict[str, float]:
    """What each variant of a case takes, in any unit of time."""
    times = {name.removesuffix("_ms"): value for name, value in figures.items() if name.endswith("_ms")}
    ending = "_tokens_per_second"
    rates = {name.removesuffix(ending): value for name, value in figures.items() if name.endswith(ending)}
    return times | {name: 1 / rate for name, rate in rates.items() if name != "bound"}


def main(arguments: list[str] | None = None) -> None:
    commands = parser("This checkout against another one.")
    commands.add_argument("other", type=Path, help="the other checkout")
    measured = ["decode", "sparse_layer", "routing_options", "train_step"]
    commands.add_argument("--benchmarks", nargs="+", default=measured, help="programs of this folder")
    commands.add_argument("--turns", type=int, default=3, help="processes of each checkout (default 3)")
    parsed, others = commands.parse_known_args(arguments)
    common = [f"--threads={parsed.threads}", f"--rounds={parsed.rounds}", f"--dtype={parsed.dtype}"]
    common += ["--quick"] * parsed.quick + others
    written: Cases = {}
    for benchmark in parsed.benchmarks:
        ratios: dict[str, dict[str, list[float]]] = {}
        for _ in range(parsed.turns):
            before, after = (run(folder.resolve(), benchmark, common) for folder in (parsed.other, HERE))
            for case in before.keys() & after.keys():
                old, new = seconds(before[case]), seconds(after[case])
                for name in old.keys() & new.keys():
                    ratios.setdefault(case, {}).setdefault(name, []).append(new[name] / old[name])
        for case, variants in sorted(ratios.items()):
            figures = {name: median(values) for name, values in sorted(variants.items(), key=lambda v: v[0] != OURS)}
            written[f"{benchmark}: {case}"] = figures
            cells = " | ".join(f"{name} {value:.3f}" for name, value in figures.items())
            print(f"{benchmark + ': ' + case:<60} | {cells}", flush=True)
    if parsed.json is not None:
        parsed.json.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
