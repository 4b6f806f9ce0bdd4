"""How many random one-point changes of the code the tests notice. Run as `make mutants`, outside CI.

Cosmic Ray (the extra `mutants`) says which points of a file can change and writes the change; this program draws points
with a seed and says which tests must notice. Unusual here:
- a point is drawn first, then one of its changes: a `+` has eleven, a `True` has one, and both are one point;
- annotations are left out: what `int | None` becomes is seen when the file is imported, whatever the tests are;
- a change first meets the test files that mirror the changed file, then the others of that folder;
- nothing is changed in the checkout, but in a copy of its tracked files, which keeps the links;
- processes fork from a server that has imported the libraries (never our code), so that a change costs no start;
- a test that meets its time limit says as much of the machine as of the change: those tests run again with four times
  the limit. The report names the test that noticed, and whether it failed or met this limit too;
- where every mirroring test is skipped, as for an extra that is not installed, the change is counted apart, not judged.

A change that survives is either a fault of the tests or another way to write the same function: its diff is printed,
and `--again REPORT` runs those of a report once more, after the tests were mended.
"""

import argparse
import ast
import contextlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from difflib import unified_diff
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("modeling", "processors", "training", "surgery", "fastpaths", "serving")
# What our files and tests import, so that a forked process starts with it.
LIBRARIES = ["torch", "torchaudio", "torchvision", "timm", "peft", "datasets", "accelerate", "scipy.optimize", "av",
             "PIL.Image", "soundfile", "hypothesis", "pytest", "transformers.trainer", "transformers.modeling_utils",
             "transformers.processing_utils", "transformers.models.auto", "transformers.testing_utils"]  # fmt: skip
OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
OFFLINE["PYTHONDONTWRITEBYTECODE"] = "1"  # of a change that came within a second of another, Python would not know
# A change may loop for ever or ask for any amount of memory.
TEST_SECONDS, RUN_SECONDS, MEMORY_BYTES = 120, 1800, 10 * 2**30
PATIENCE = 4  # times these limits, for tests that met them
SKIPPED = "skipped"
Mutant = dict[str, Any]


def tracked(*folders: str) -> list[Path]:
    """Tracked files of the checkout, or of some of its folders, relative to it."""
    listing = subprocess.run(["git", "ls-files", "-z", *folders], cwd=ROOT, capture_output=True, text=True, check=True)
    return [Path(name) for name in listing.stdout.split("\0") if name and (ROOT / name).exists()]


def annotations(source: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """(start, end) of every annotation, each as (line, column)."""
    found: list[ast.expr | None] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.arg | ast.AnnAssign):
            found.append(node.annotation)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found.append(node.returns)
    ends = ((node, node.end_lineno or 0, node.end_col_offset or 0) for node in found if node)
    return [((node.lineno, node.col_offset), (line, column)) for node, line, column in ends]


def points(path: Path) -> list[list[Mutant]]:
    """The changes of each point of a file."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.plugins import get_operator, operator_names

    source = (ROOT / path).read_text(encoding="utf-8")
    nodes, skipped = list(ast_nodes(get_ast(source))), annotations(source)
    found: dict[tuple[int, int], list[Mutant]] = {}
    for name in operator_names():
        if get_operator(name).arguments():
            continue  # works on variables that somebody names
        operator = get_operator(name)()
        places = (place for node in nodes for place in operator.mutation_positions(node))
        for occurrence, (start, _) in enumerate(places):
            if not any(first <= start < last for first, last in skipped):
                mutant = {"path": path.as_posix(), "line": start[0], "operator": name, "occurrence": occurrence}
                found.setdefault(tuple(start), []).append(mutant)
    return [found[start] for start in sorted(found)]


def draw(folder: str, sample: int, seed: int) -> list[Mutant]:
    """`sample` changes of a folder, each of another point."""
    files = [path for path in tracked(folder) if path.suffix == ".py" and path.name != "__init__.py"]
    generator = random.Random(f"{seed} {folder}")
    every = [changes for path in files for changes in points(path)]
    generator.shuffle(every)
    drawn: list[Mutant] = []
    for changes in every:
        mutant = generator.choice(changes)
        # Cosmic Ray fails on `except` with a dotted name.
        with contextlib.suppress(AttributeError):
            changed(mutant)
            drawn.append(mutant)
        if len(drawn) == sample:
            break
    return drawn


def changed(mutant: Mutant) -> tuple[str, str]:
    """The file's text before and after the change."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    before = (ROOT / mutant["path"]).read_text(encoding="utf-8")
    after = mutate_code(before, get_operator(mutant["operator"])(), mutant["occurrence"])
    if after is None:
        change = f"{mutant['operator']} {mutant['occurrence']}"
        raise ValueError(f"{mutant['path']} has no change {change}: it was edited since")
    return before, after


def tests_of(path: Path, checkout: Path) -> tuple[list[str], list[str]]:
    """Test files of a checkout that mirror a file, and the others of their folder: those of the same room of the house
    come first.
    """
    folder = Path("tests") / path.parent
    stems = {test: test.stem.removeprefix("test_") for test in sorted((checkout / folder).glob("test_*.py"))}
    # `test_moe_selection_capacity.py` has a second part of the tests of `moe_selection.py`.
    names = {other.stem for other in (checkout / path).parent.glob("*.py")} - {path.stem}
    mirror = [
        test
        for test, stem in stems.items()
        if stem == path.stem or (stem.startswith(f"{path.stem}_") and stem not in names)
    ]
    room = path.stem.split("_")[0]
    others = sorted(set(stems) - set(mirror), key=lambda test: (stems[test].split("_")[0] != room, test))
    return [str(test.relative_to(checkout)) for test in mirror], [str(test.relative_to(checkout)) for test in others]


class FirstFailure:
    """A pytest plugin that writes the first test that fails, and whether it met its time limit, to a file; or that
    all were skipped.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.outcomes = path, Counter[str]()

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.outcomes[report.outcome] += report.when == "call" or not report.passed
        if report.failed and not self.path.exists():
            late = "Failed: Timeout (>" in report.longreprtext
            self.path.write_text(f"{report.nodeid}{' (time limit)' * late}", encoding="utf-8")

    def pytest_collectreport(self, report: Any) -> None:
        self.outcomes["skipped"] += report.skipped
        if report.failed:
            self.pytest_runtest_logreport(report)

    def pytest_sessionfinish(self) -> None:
        if self.outcomes["skipped"] and set(+self.outcomes) == {"skipped"}:
            self.path.write_text(SKIPPED, encoding="utf-8")


def run_tests(copy: str, tests: list[str], log: str, seconds: int) -> None:
    """In a forked process: pytest on the copy, up to the first failure; the process ends with pytest's status."""
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    os.chdir(copy)
    sys.path[:] = [copy, *(entry for entry in sys.path if entry and Path(entry).resolve() != ROOT)]
    import pytest

    options = ["-x", "-q", "--numprocesses=0", "-m", "not slow", "-p", "no:cacheprovider", f"--timeout={seconds}"]
    status = pytest.main([*options, *tests], plugins=[FirstFailure(Path(f"{copy}.failure"))])
    sys.stdout.flush()
    os._exit(status)


def failure(copy: Path, tests: list[str], patience: int = 1) -> str:
    """The first test that fails on the copy, "" where all pass, or `SKIPPED`."""
    first = Path(f"{copy}.failure")
    first.unlink(missing_ok=True)
    process = multiprocessing.get_context("forkserver").Process(
        target=run_tests, args=(str(copy), tests, f"{copy}.log", TEST_SECONDS * patience), daemon=False
    )
    process.start()
    process.join(RUN_SECONDS * patience)
    late = process.is_alive()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid or 0, signal.SIGKILL)  # also what the tests started
    process.join()
    found = first.read_text(encoding="utf-8") if first.exists() else ""
    if process.exitcode in (0, 5):  # 5: every test of these files is slow, or its file is skipped
        return found
    found = found or f"pytest ended with status {process.exitcode}"
    if late:
        found = "all tests (time limit)"
    return failure(copy, tests, PATIENCE) if patience == 1 and found.endswith("(time limit)") else found


@contextlib.contextmanager
def copied() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="mutants-") as scratch:
        copy = Path(scratch) / "checkout"
        for path in tracked():
            (copy / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / path, copy / path, follow_symlinks=False)
        yield copy


def outcome(copy: Path, mutant: Mutant) -> dict[str, str]:
    """Whose tests notice the change (`mirror`, `neighbours`, or `survived` them all), and which test first did;
    `skipped` where no mirroring test can run here.
    """
    before, after = changed(mutant)
    target = copy / mutant["path"]
    target.write_text(after, encoding="utf-8")
    try:
        for whose, tests in zip(("mirror", "neighbours"), tests_of(Path(mutant["path"]), copy), strict=True):
            noticed_by = failure(copy, tests) if tests else ""
            if noticed_by == SKIPPED and whose == "mirror":
                return {"outcome": SKIPPED, "noticed_by": ""}
            if noticed_by and noticed_by != SKIPPED:
                return {"outcome": whose, "noticed_by": noticed_by}
        return {"outcome": "survived", "noticed_by": ""}
    finally:
        target.write_text(before, encoding="utf-8")


def table(mutants: list[Mutant]) -> str:
    lines = ["| folder | changes | noticed by the mirroring tests | with their neighbours | survived | skipped |"]
    lines.append("| --- " * 6 + "|")
    for folder in FOLDERS:
        counts = Counter(mutant["outcome"] for mutant in mutants if mutant["path"].startswith(f"{folder}/"))
        skipped = counts.pop(SKIPPED, 0)
        if total := counts.total():
            shares = [f"{n} ({n / total:.0%})" for n in (counts["mirror"], total - counts["survived"])]
            lines.append(f"| `{folder}/` | {total} | {shares[0]} | {shares[1]} | {counts['survived']} | {skipped} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    commands = argparse.ArgumentParser(description="How many random one-point changes of the code the tests notice.")
    commands.add_argument("--folders", nargs="+", choices=FOLDERS, default=list(FOLDERS))
    commands.add_argument("--sample", type=int, default=20, help="changes of each folder (default 20)")
    commands.add_argument("--seed", type=int, default=0)
    commands.add_argument("--again", type=Path, help="a report of before: run what survived in it")
    commands.add_argument("--json", type=Path, default=Path("out/mutants.json"), help="the report, written as it grows")
    parsed = commands.parse_args(arguments)
    if parsed.again:
        report = json.loads(parsed.again.read_text(encoding="utf-8"))
        mutants = [mutant for mutant in report if mutant["outcome"] == "survived"]
    else:
        mutants = [mutant for folder in parsed.folders for mutant in draw(folder, parsed.sample, parsed.seed)]
    os.environ.update(OFFLINE)
    multiprocessing.set_forkserver_preload(LIBRARIES)
    parsed.json.parent.mkdir(parents=True, exist_ok=True)
    with copied() as copy:
        for done, mutant in enumerate(mutants, start=1):
            start = time.monotonic()
            mutant |= outcome(copy, mutant) | {"diff": "".join(difference(mutant))}
            mutant["seconds"] = round(time.monotonic() - start, 1)
            place = f"{mutant['path']}:{mutant['line']}"
            verdict = f"{mutant['outcome']:10} {mutant['seconds']:6.1f} s  {place}  {mutant['noticed_by']}"
            print(f"{done}/{len(mutants)} {verdict}", flush=True)
            if mutant["outcome"] == "survived":
                print(mutant["diff"], flush=True)
            parsed.json.write_text(json.dumps(mutants[:done], indent=1) + "\n", encoding="utf-8")
    print(table(mutants))


def difference(mutant: Mutant) -> list[str]:
    before, after = (text.splitlines(keepends=True) for text in changed(mutant))
    return list(unified_diff(before, after, mutant["path"], mutant["path"], n=2))


if __name__ == "__main__":
    main()
