"""Runs the steps of a journey: each a process of its own, on the folder that the step before saved.

Unusual here:
- a step is the program `chorus-moe` or a file of `scripts/`, which is written as a user writes it and reads its
  settings as JSON from its first argument;
- nothing is set for a step but the search path, so that it meets this checkout, and no variable of the tests is kept.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.training.export_checks import HIDE_THE_PACKAGE

ROOT = Path(__file__).parents[2]
SCRIPTS = Path(__file__).with_name("scripts")
PROGRAM = Path(sys.executable).with_name("chorus-moe")
# What tests/conftest.py sets for the tests themselves.
OF_THE_TESTS = {"TOKENIZERS_PARALLELISM"}
# A message's content: text, or parts that name their files.
Content = str | list[dict[str, str]]


class Journey:
    """The folder of a journey and the steps that can be taken in it. Names of folders are relative to it."""

    def __init__(self, folder: Path):
        self.folder = folder

    def command(self, *words: str | Path | int) -> str:
        """Run `chorus-moe`; what it printed to standard output."""
        return self._finished([str(PROGRAM), *map(str, words)], with_package=True)

    def script(self, name: str, **settings: Any) -> Any:
        """Run a file of `scripts/`; the value that it printed as its last line."""
        output = self._finished([sys.executable, str(SCRIPTS / name), json.dumps(settings)], with_package=True)
        return json.loads(output.splitlines()[-1])

    def script_without_the_package(self, name: str, **settings: Any) -> Any:
        """As `script`, in a process to which `chorus_moe` does not exist."""
        # Python puts the folder of a script in front of the path; `-P` leaves out that of the journey here.
        start = f"{HIDE_THE_PACKAGE}\nimport runpy\nrunpy.run_path({str(SCRIPTS / name)!r}, run_name='__main__')"
        output = self._finished([sys.executable, "-P", "-c", start, json.dumps(settings)], with_package=False)
        return json.loads(output.splitlines()[-1])

    def ask(self, model: str, questions: list[Content], without_package: bool = False, **more: Any) -> list[str]:
        """The greedy answers of a saved model in a fresh process: one by one, and the same in one batch."""
        run = self.script_without_the_package if without_package else self.script
        answers = run("ask.py", model=model, questions=questions, without_package=without_package, **more)
        assert answers["batch"] == answers["alone"]
        return answers["alone"]

    def killed(self, *words: str | Path | int, when: Callable[[], bool]) -> None:
        """Run `chorus-moe` and kill it, as a crash does, as soon as `when` says so."""
        with subprocess.Popen(
            [str(PROGRAM), *map(str, words)],
            cwd=self.folder,
            env=self._environment(with_package=True),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            while process.poll() is None and not when():
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
            _, error = process.communicate()
        assert process.returncode == -signal.SIGKILL, f"ended before it was killed: {error[-4000:]}"

    def write(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    def write_rows(self, name: str, rows: list[dict[str, Any]]) -> Path:
        """A file of one JSON object a line."""
        return self.write(name, "".join(json.dumps(row) + "\n" for row in rows))

    def _finished(self, command: list[str], with_package: bool) -> str:
        done = subprocess.run(
            command, cwd=self.folder, env=self._environment(with_package), capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
        return done.stdout

    def _environment(self, with_package: bool) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if name not in OF_THE_TESTS | {"PYTHONPATH"}}
        # Remote code is copied below HF_HOME; a user's own cache is none of ours.
        home = {"HF_HOME": str(self.folder / "hf_home")}
        return kept | home | ({"PYTHONPATH": str(ROOT)} if with_package else {})
