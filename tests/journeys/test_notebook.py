"""Every cell of the notebook runs, in order and in one namespace, and shows what it ends with."""

import ast
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.parents import save_audio_parent, save_vision_parent
from tests.test_docs import PUBLIC, ROOT, save_deep_text_parent

NOTEBOOK = ROOT / "examples" / "first_hour.ipynb"


def cells() -> list[str]:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def run_cell(code: str, number: int, names: dict[str, Any]) -> Any:
    """The value that a notebook would show."""
    tree = ast.parse(code, filename=f"cell {number}")
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, f"cell {number}", "exec"), names)
    if last is not None:
        return eval(compile(ast.Expression(last.value), f"cell {number}", "eval"), names)
    return None


@pytest.mark.slow
def test_the_first_hour_runs_from_the_first_cell_to_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_deep_text_parent(tmp_path / "text")
    save_vision_parent("siglip", tmp_path / "vision")
    save_audio_parent("whisper", tmp_path / "audio")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    shown = []
    for number, code in enumerate(cells()):
        for public, part in PUBLIC.items():
            code = code.replace(public, str(tmp_path / part))
        shown.append(run_cell(code, number, names))
    tables = [value for value in shown if hasattr(value, "_repr_html_")]
    # The report of composing, the parameters, the routing of the rows, and one answer.
    assert len(tables) == 4 and all("<table" in value._repr_html_() for value in tables)
    assert [value for value in shown if isinstance(value, Image.Image)]
    (config,) = (value for value in shown if value is names["model"].config)
    assert len(repr(config).splitlines()) <= 30
    assert (tmp_path / "first-hour" / "adapter_config.json").is_file()


def test_no_cell_keeps_an_output() -> None:
    """What is saved in it would be of somebody's machine, and would not follow the code."""
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not [cell for cell in code if cell["outputs"] or cell["execution_count"] is not None]
