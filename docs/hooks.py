"""Pages of the site that are made when it is built: the command line from its own help; links out of docs/."""

import os
import subprocess
import sys
from typing import Any

COMMANDS = (
    *("compose", "train", "precompute-teacher", "recipes", "evaluate", "generate", "routing", "inspect", "doctor"),
    *("compress", "export", "export-graphs", "plan", "launch", "federated"),
)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    if page.file.src_uri != "reference/cli.md":
        return markdown
    return markdown + "".join(f"\n## {name}\n\n```text\n{help_of(name)}```\n" for name in COMMANDS)


def help_of(command: str) -> str:
    # Under its own name the program answers without importing torch.
    start = "import sys; sys.argv[:1] = ['chorus-moe']; from chorus_moe.serving.commands import main; main()"
    program = [sys.executable, "-c", start, command, "--help"]
    plain = {**os.environ, "TERM": "dumb", "NO_COLOR": "1", "COLUMNS": "100"}
    return subprocess.run(program, capture_output=True, text=True, check=True, env=plain).stdout
