"""Programs in processes of their own, forked from one that has imported torch and torchvision and nothing of ours.

These two take over half the seconds of `import chorus_moe`, and the suite starts some sixty programs. transformers and
huggingface_hub read variables when they are imported, so each process imports them itself.
"""

import contextlib
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[1]
PROGRAM = Path(sys.executable).with_name("chorus-moe")
SERVER = multiprocessing.get_context("forkserver")
# A process of tests has one such server, whoever starts it first: all of them must ask for this.
PRELOADED = ["torch", "torchvision"]
SERVER.set_forkserver_preload(PRELOADED)


@contextlib.contextmanager
def started(
    program: str | Path,
    arguments: Sequence[str] = (),
    *,
    cwd: Path,
    environment: Mapping[str, str],
    path: Sequence[str | Path] = (ROOT,),
    log: Path | None = None,
) -> Iterator[BaseProcess]:
    """A running program, killed at the end if it still runs.

    Args:
        program: a file, or the text of one.
        environment: all its variables.
        path: where it looks for modules before the installed ones.
        log: a folder for its `stdout` and `stderr`; None leaves them where ours go.
    """
    # The tests' own entries of the path are no user's; what is left are the library and the installed packages.
    installed = [entry for entry in sys.path if entry and ROOT / "tests" not in (Path(entry), *Path(entry).parents)]
    search = [str(entry) for entry in (*path, *(entry for entry in installed if Path(entry) != ROOT))]
    process = SERVER.Process(target=_run, args=(program, list(arguments), cwd, dict(environment), search, log))
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def run_fresh(
    program: str | Path,
    arguments: Sequence[str] = (),
    *,
    cwd: Path,
    environment: Mapping[str, str],
    path: Sequence[str | Path] = (ROOT,),
) -> subprocess.CompletedProcess:
    """As `subprocess.run` with captured text."""
    with TemporaryDirectory() as folder:
        log = Path(folder)
        with started(program, arguments, cwd=cwd, environment=environment, path=path, log=log) as process:
            process.join()
        said = [(log / name).read_text(encoding="utf-8") for name in ("stdout", "stderr")]
    return subprocess.CompletedProcess([str(program), *arguments], process.exitcode, *said)


def run_ranks(
    program: Path, arguments: Sequence[str], *, cwd: Path, ranks: int = 2, seconds: float = 240
) -> list[subprocess.CompletedProcess]:
    """Run a program in processes that are ranks of one group, with the variables that `torchrun` sets.

    When one fails, or the time is over, the others are killed: they would wait for it.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    group |= {"LOCAL_WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
    with TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        processes, logs = [], [Path(folder) / str(rank) for rank in range(ranks)]
        for rank, log in enumerate(logs):
            log.mkdir()
            environment = os.environ | group | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            run = started(program, arguments, cwd=cwd, environment=environment, log=log)
            processes.append(stack.enter_context(run))
        end = time.monotonic() + seconds
        while any(process.is_alive() for process in processes) and time.monotonic() < end:
            if any(process.exitcode for process in processes):
                break
            time.sleep(0.05)
        for process in processes:
            process.kill()
            process.join()
        said = [[(log / name).read_text(encoding="utf-8") for name in ("stdout", "stderr")] for log in logs]
    return [
        subprocess.CompletedProcess([str(program), *arguments], process.exitcode, *texts)
        for process, texts in zip(processes, said, strict=True)
    ]


def kill(
    words: Sequence[str], *, cwd: Path, when: Callable[[], bool], environment: Mapping[str, str] | None = None
) -> None:
    """Run `chorus-moe` and kill it, as a crash does, as soon as `when` says so."""
    environment = environment or os.environ | {"OMP_NUM_THREADS": "1"}
    with TemporaryDirectory() as folder:
        with started(PROGRAM, words, cwd=cwd, environment=environment, log=Path(folder)) as process:
            while process.is_alive() and not when():
                time.sleep(0.01)
            process.kill()
            process.join()
        error = (Path(folder) / "stderr").read_text(encoding="utf-8")
    assert process.exitcode == -signal.SIGKILL, f"ended before it was killed: {error[-4000:]}"


def _run(
    program: str | Path,
    arguments: list[str],
    cwd: Path,
    environment: dict[str, str],
    search: list[str],
    log: Path | None,
) -> None:
    """In the new process: become what the command would have started."""
    import torch

    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    if log is not None:
        for number, name in ((1, "stdout"), (2, "stderr")):
            with (log / name).open("wb") as file:
                os.dup2(file.fileno(), number)
    if "OMP_NUM_THREADS" in environment:
        # Read when torch was imported, which was before.
        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    for name in [name for name in sys.modules if name.split(".")[0] == "tests"]:
        del sys.modules[name]
    is_file = isinstance(program, Path)
    sys.argv, sys.path = [str(program) if is_file else "-c", *arguments], search
    if is_file:
        sys.path.insert(0, str(program.parent))
        runpy.run_path(str(program), run_name="__main__")
    else:
        exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})
