"""Runs the steps of a journey: each a process of its own, on the folder that the step before saved.

Unusual here:
- a step is the program `chorus-moe` or a file of `scripts/`, which is written as a user writes it and reads its
  settings as JSON from its first argument;
- nothing is set for a step but the search path, so that it meets this checkout, and no variable of the tests is kept.
"""

import contextlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.fresh_process import PROGRAM, ROOT, kill, run_fresh, started
from tests.training.export_checks import HIDE_THE_PACKAGE

SCRIPTS = Path(__file__).with_name("scripts")
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
        return self._finished(PROGRAM, list(map(str, words)), with_package=True)

    def script(self, name: str, **settings: Any) -> Any:
        """Run a file of `scripts/`; the value that it printed as its last line."""
        output = self._finished(SCRIPTS / name, [json.dumps(settings)], with_package=True)
        return json.loads(output.splitlines()[-1])

    def script_without_the_package(self, name: str, **settings: Any) -> Any:
        """As `script`, in a process to which `chorus_moe` does not exist."""
        start = f"{HIDE_THE_PACKAGE}\nimport runpy\nrunpy.run_path({str(SCRIPTS / name)!r}, run_name='__main__')"
        output = self._finished(start, [json.dumps(settings)], with_package=False)
        return json.loads(output.splitlines()[-1])

    def ask(self, model: str, questions: list[Content], without_package: bool = False, **more: Any) -> list[str]:
        """The greedy answers of a saved model in a fresh process: one by one, and the same in one batch."""
        run = self.script_without_the_package if without_package else self.script
        answers = run("ask.py", model=model, questions=questions, without_package=without_package, **more)
        assert answers["batch"] == answers["alone"]
        return answers["alone"]

    def killed(self, *words: str | Path | int, when: Callable[[], bool]) -> None:
        """Run `chorus-moe` and kill it, as a crash does, as soon as `when` says so."""
        kill(list(map(str, words)), cwd=self.folder, when=when, environment=self._environment())

    @contextlib.contextmanager
    def served(self, model: str) -> Iterator[str]:
        """`chorus-moe serve` on a free port; its address for OpenAI's clients."""
        log = self.folder / "logs"
        log.mkdir(exist_ok=True)
        words = ["serve", model, "--port", "0"]
        with started(PROGRAM, words, cwd=self.folder, environment=self._environment(), log=log) as process:
            address = None
            while process.is_alive() and not address:
                said = (log / "stderr").read_text(encoding="utf-8") if (log / "stderr").exists() else ""
                address = re.search(r"http://\S+/v1", said)
                time.sleep(0.05)
            assert address, said
            yield address[0]

    def write(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    def write_rows(self, name: str, rows: list[dict[str, Any]]) -> Path:
        """A file of one JSON object a line."""
        return self.write(name, "".join(json.dumps(row) + "\n" for row in rows))

    def _finished(self, program: str | Path, arguments: list[str], with_package: bool) -> str:
        path = [ROOT] if with_package else []
        done = run_fresh(program, arguments, cwd=self.folder, environment=self._environment(), path=path)
        assert done.returncode == 0, f"{done.args}\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
        return done.stdout

    def _environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if name not in OF_THE_TESTS | {"PYTHONPATH"}}
        # Remote code is copied below HF_HOME; a user's own cache is none of ours.
        return kept | {"HF_HOME": str(self.folder / "hf_home")}
