"""YAML files are read as `yaml.safe_load` reads them, and what would grow without end is refused."""

from pathlib import Path

import pytest
import yaml

from chorus_moe.training.compose import read_experts
from chorus_moe.training.recipe import read_recipe
from chorus_moe.training.yaml_files import read_yaml

PLAIN = """
base: &base {rate: 1e-3, layers: [1, 2]}
first: *base
second: {<<: *base, rate: 2}
day: 2024-01-31
text: "é"
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "file.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def bomb(lines: int = 9) -> str:
    """Each line holds nine times the line before: 9 ** lines items."""
    rows = ["a0: &a0 [x]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, lines + 1)]
    return "\n".join(rows)


@pytest.mark.parametrize("text", [PLAIN, "", "- 1\n- [2, {a: null}]", "word"])
def test_a_file_is_what_safe_load_makes_of_it(text: str, tmp_path: Path) -> None:
    assert read_yaml(write(tmp_path, text)) == yaml.safe_load(text)


@pytest.mark.parametrize("merged", [False, True])
def test_aliases_of_aliases_are_counted_and_refused(merged: bool, tmp_path: Path) -> None:
    text = bomb() if not merged else bomb().replace("[x]", "{x: 1}").replace(": &", ": &").replace("a9:", "<<:")
    for read in (read_yaml, read_recipe, lambda path: read_experts(str(path))):
        with pytest.raises(ValueError, match=r"file.yaml: [\d,]{11,} items with those of its aliases, at most 100,000"):
            read(write(tmp_path, text))


def test_the_count_is_that_of_the_file_without_aliases(tmp_path: Path) -> None:
    # 100,000 = the list, 999 scalars beside it, and 99 times a list of 1,000 items.
    text = f"[&a [{'x, ' * 998}x], {'*a, ' * 98} {'y, ' * 999}]"
    assert len(yaml.safe_load(text)) == 99 + 999
    read_yaml(write(tmp_path, text))
    with pytest.raises(ValueError, match="100,001 items"):
        read_yaml(write(tmp_path, text.replace("y, ", "y, y, ", 1)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1\nb: :", r"file.yaml, line 2: no valid YAML: expected ',' or '\]'"),
        ("a: 1\nb: 2\n- c", "file.yaml, line 3: no valid YAML"),
        ("a: *b", "line 1: no valid YAML: found undefined alias 'b'"),
        ("a: &a [1, *a]", "line 1: no valid YAML: an alias stands within its own anchor"),
        ("a: !!python/object/apply:os.system [ls]", "line 1: no valid YAML: could not determine a constructor"),
        ("a: 1\n---\nb: 2", "line 2: no valid YAML: but found another document"),
        ("[" * 100_000, "items within items, too deep to read"),
        ("# " + "x" * 1_048_576, "1,048,578 bytes, at most 1,048,576 are read"),
        ("a: \x00", "no valid YAML: unacceptable character"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_line(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_yaml(write(tmp_path, text))


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "file.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="file.yaml: no valid YAML: 'utf-8' codec"):
        read_yaml(path)
