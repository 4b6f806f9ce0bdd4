"""The rules of the house: who may import whom, what the Hub can carry, what never enters the repository.

Everything here reads source text, so it takes well under a second and runs in `make check`.
"""

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Who may import whom; a folder may import itself.
MAY_IMPORT = {
    "modeling": set(),
    "processors": set(),
    "fastpaths": {"modeling"},
    "surgery": {"modeling", "processors", "fastpaths"},
    "training": {"modeling", "processors", "fastpaths", "surgery"},
    "serving": {"modeling", "processors", "fastpaths", "surgery", "training"},
}
FOLDERS = tuple(MAY_IMPORT)
HUB_FOLDERS = ("modeling", "processors")
# What a user must trust for a forward pass, training and generation. What does the same faster, or serves the package's
# own commands alone, is registered by `import chorus_moe` (see `configuration_services`) and does not count.
MAX_SHIPPED_FILES, MAX_SHIPPED_LINES = 42, 8_500
# The listing shows the rooms of a flat folder by prefix.
ROOMS = (
    "attention",
    "configuration",
    "depth",
    "feature_extraction",
    "image_processing",
    "layers",
    "losses",
    "modeling",
    "moe",
    "processing",
    "tower",
)
MAX_LINES = 500
# Files longer than MAX_LINES, each with the reason why it is one noun all the same.
LONG_FILES: dict[str, str] = {}

# Public functions with a bare `Any` in their signature, each with the reason. Data from outside that is checked is
# `object`; a thing of ours or of a library has its type.
MAY_BE_ANY: dict[str, str] = {
    "ChatProcessor.apply_chat_template": "transformers': text, tokens or model inputs, by the arguments",
    "break_control_tokens": "returns what it was given, of any kind",
}

# What remote code may ask for (transformers brings safetensors); all else is optional and imported in a `try`.
HUB_REQUIREMENTS = {
    "huggingface_hub",
    "safetensors",
    "numpy",
    "torch",
    "torchaudio",
    "torchvision",
    "transformers",
    "timm",
}
# What `transformers.dynamic_module_utils.get_relative_imports` searches a file for, line by line, docstrings included.
RELATIVE_IMPORT = re.compile(r"^\s*(?:import\s+\.(\S+)\s*$|from\s+\.(\S+)\s+import)", flags=re.MULTILINE)
# A prose line that begins so is taken for an import by that search or by a reader's grep.
LIKE_AN_IMPORT = re.compile(r"^\s*(?:import\s+\S+|from\s+\S+\s+import\b)")

UNSAFE = {
    "pickle": re.compile(r"\b(?:import|from)\s+(?:pickle|cPickle|dill|cloudpickle|joblib)\b"),
    "trust_remote_code=True": re.compile(r"trust_remote_code\s*=\s*True"),
}
# Put together here, so that this file does not contain what it looks for.
MACHINE_PATHS = re.compile("|".join(f"/{name}/" for name in ("home", "root", "Users", "work", "mnt", "tmp")))


def sources(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def python_files() -> list[Path]:
    return sources(*FOLDERS, "tests", "benchmarks", "examples") + sorted((ROOT / "chorus_moe").glob("*.py"))


def tracked_files() -> list[Path]:
    """Files that git tracks or would track; without git (a source archive) every Python and Markdown file."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    names = listing.stdout.split("\0") if listing.returncode == 0 else [name_of(path) for path in python_files()]
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


def imports(tree: ast.AST) -> Iterator[tuple[str, int, int]]:
    """(module, relative level, line) of every import; `from . import x` gives an empty module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, 0, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "", node.level, node.lineno


def imports_outside_try(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """(top-level package, line) of what `transformers.dynamic_module_utils.get_imports` wants installed.

    That function reads the bodies of functions too; only `try` exempts an import.
    """
    todo: list[ast.AST] = [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Try):
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield (node.module or "").split(".")[0], node.lineno
        todo.extend(ast.iter_child_nodes(node))


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=name_of(path))


@pytest.mark.parametrize("folder", HUB_FOLDERS)
def test_hub_code_imports_its_siblings_one_file_at_a_time(folder: str) -> None:
    siblings = {path.stem for path in (ROOT / folder).glob("*.py")} - {"__init__"}
    wrong = [
        f"{name_of(path)}:{line}: {'.' * level}{module}"
        for path in sources(folder)
        for module, level, line in imports(parse(path))
        if level and (level > 1 or module not in siblings)
    ]
    assert not wrong, f"only `from .sibling import name` survives the Hub: {wrong}"


@pytest.mark.parametrize("folder", HUB_FOLDERS)
def test_hub_code_imports_no_other_part_of_the_project(folder: str) -> None:
    closed = {"chorus_moe", "tests", "benchmarks", "examples", *FOLDERS}
    wrong = [
        f"{name_of(path)}:{line}: {module}"
        for path in sources(folder)
        for module, level, line in imports(parse(path))
        if not level and module.split(".")[0] in closed
    ]
    assert not wrong, f"{folder} may import libraries and its own siblings: {wrong}"


@pytest.mark.parametrize("folder", HUB_FOLDERS)
def test_hub_code_imports_optional_packages_in_a_try(folder: str) -> None:
    allowed = HUB_REQUIREMENTS | set(sys.stdlib_module_names)
    allowed |= {"PIL"} if folder == "processors" else set()
    wrong = [
        f"{name_of(path)}:{line}: {package}"
        for path in sources(folder)
        for package, line in imports_outside_try(parse(path))
        if package not in allowed
    ]
    assert not wrong, f"not among {sorted(HUB_REQUIREMENTS)}: {wrong}"


def test_the_folders_are_imported_only_below_the_package() -> None:
    wrong = [
        f"{name_of(path)}:{line}: {'.' * level}{module}"
        for path in python_files()
        for module, level, line in imports(parse(path))
        if level > 1 or (not level and module.split(".")[0] in FOLDERS)
    ]
    assert not wrong, f"import them as chorus_moe.FOLDER: {wrong}"


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_go_one_way(folder: str) -> None:
    wrong = [
        f"{name_of(path)}:{line}: {module}"
        for path in sources(folder)
        for module, level, line in imports(parse(path))
        if not level and module.startswith("chorus_moe.") and module.split(".")[1] in FOLDERS
        if module.split(".")[1] not in MAY_IMPORT[folder] | {folder}
    ]
    assert not wrong, f"{folder} may import {sorted(MAY_IMPORT[folder])}: {wrong}"


def test_no_file_imports_itself_by_way_of_others() -> None:
    """Imports inside functions count: they hide a circle and do not cut it."""
    files = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in sources(*FOLDERS)}
    graph = {name: imported_files(path, set(files)) for name, path in files.items()}
    assert not circle(graph)


def imported_files(path: Path, names: set[str]) -> set[str]:
    """The files of the project that a file imports, as `folder.file`."""
    folder, found = path.relative_to(ROOT).parts[0], set()
    for node in ast.walk(parse(path)):
        if not isinstance(node, ast.ImportFrom | ast.Import):
            continue
        for alias in node.names:
            module = (node.module or "") if isinstance(node, ast.ImportFrom) else alias.name
            if isinstance(node, ast.ImportFrom) and node.level:
                module = f"{folder}.{module}"
            module = module.removeprefix("chorus_moe.")
            found |= {module, f"{module}.{alias.name}", f"{module}.__init__"} & names
    return found


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Files that are left when all that import nothing, or only such files, are taken away, again and again."""
    left = dict(graph)
    while free := [name for name, targets in left.items() if not targets & set(left)]:
        for name in free:
            del left[name]
    return sorted(left)


def test_what_ships_is_small_and_shows_its_rooms() -> None:
    paths = [path for path in sources(*HUB_FOLDERS) if path.name != "__init__.py"]
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)
    assert len(paths) <= MAX_SHIPPED_FILES and lines <= MAX_SHIPPED_LINES, (len(paths), lines)
    assert not [name_of(path) for path in paths if not path.stem.startswith(ROOMS)]


def test_public_signatures_have_types() -> None:
    found = {name: place for path in sources(*FOLDERS) for name, place in bare_any(parse(path).body, name_of(path))}
    wrong = {name: place for name, place in found.items() if name not in MAY_BE_ANY}
    assert not wrong, f"give them their type, or `object` where the input is checked: {wrong}"
    stale = sorted(set(MAY_BE_ANY) - set(found))
    assert not stale, f"have types now, remove from MAY_BE_ANY: {stale}"


def bare_any(body: list[ast.stmt], file: str, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(name, `file:line: arguments`) of public functions that take or return a bare `Any`; `->` is what is returned."""
    for node in body:
        name = prefix + getattr(node, "name", "_")
        if is_private(name):
            continue
        if isinstance(node, ast.ClassDef):
            yield from bare_any(node.body, file, f"{name}.")
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            given = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
            pairs = [*((argument.arg, argument.annotation) for argument in given), ("->", node.returns)]
            bad = [word for word, kind in pairs if isinstance(kind, ast.Name) and kind.id == "Any"]
            if bad:
                yield name, f"{file}:{node.lineno}: {', '.join(bad)}"


def is_private(name: str) -> bool:
    last = name.rpartition(".")[2]
    return last.startswith("_") and last != "__init__"


def test_every_folder_of_the_package_is_in_the_wheel() -> None:
    packages = set(
        tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    )
    folders = {path.parent.relative_to(ROOT) for path in sources(*FOLDERS)}
    assert packages == {"chorus_moe"} | {"chorus_moe." + ".".join(folder.parts) for folder in folders}


def test_nothing_imports_tests_examples_or_benchmarks() -> None:
    wrong = [
        f"{name_of(path)}:{line}: {module}"
        for path in [*sources(*FOLDERS), *sorted((ROOT / "chorus_moe").glob("*.py"))]
        for module, level, line in imports(parse(path))
        if not level and module.split(".")[0] in {"tests", "examples", "benchmarks"}
    ]
    assert not wrong


def test_hub_folders_are_flat_and_base_names_are_unique() -> None:
    paths = sources(*HUB_FOLDERS)
    nested = [name_of(path) for path in paths if path.parent.parent != ROOT]
    assert not nested, f"the Hub copies files by base name, sub-folders do not survive: {nested}"
    counts = Counter(path.name for path in paths if path.name != "__init__.py")
    assert not [name for name, count in counts.items() if count > 1]


@pytest.mark.parametrize("path", sources(*HUB_FOLDERS), ids=name_of)
def test_no_docstring_line_reads_like_an_import(path: Path) -> None:
    text, tree = path.read_text(encoding="utf-8"), parse(path)
    real = {module for module, level, _ in imports(tree) if level == 1}
    found = {left or right for left, right in RELATIVE_IMPORT.findall(text)}
    assert found <= real, f"the Hub's search takes a line of prose for an import of {sorted(found - real)}"

    code = {line for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom) for line in span(node)}
    lines = enumerate(text.splitlines(), start=1)
    wrong = [f"{name_of(path)}:{line}: {content}" for line, content in lines if is_fake_import(content, line, code)]
    assert not wrong


def span(node: ast.Import | ast.ImportFrom) -> range:
    return range(node.lineno, (node.end_lineno or node.lineno) + 1)


def is_fake_import(content: str, line: int, code: set[int]) -> bool:
    return line not in code and bool(LIKE_AN_IMPORT.match(content))


def test_long_files_have_a_reason() -> None:
    lengths = {name_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in python_files()}
    long = {name: length for name, length in lengths.items() if length > MAX_LINES}
    unexplained = {name: length for name, length in long.items() if name not in LONG_FILES}
    assert not unexplained, f"over {MAX_LINES} lines without a reason in LONG_FILES: {unexplained}"
    stale = sorted(set(LONG_FILES) - set(long))
    assert not stale, f"no longer long, remove from LONG_FILES: {stale}"


@pytest.mark.parametrize("path", sources(*FOLDERS), ids=name_of)
def test_shipped_code_never_unpickles_or_trusts_remote_code(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not [reason for reason, pattern in UNSAFE.items() if pattern.search(text)]
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            arguments = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            safe = arguments.get("weights_only") == "True"
            assert safe, f"{name_of(path)}:{node.lineno}: torch.load without weights_only=True"


def test_tracked_files_name_no_path_of_somebodys_machine() -> None:
    wrong = []
    for path in tracked_files():
        if path.suffix not in {".png", ".wav", ".safetensors"} and path.name != "LICENSE":
            lines = enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
            wrong += [f"{name_of(path)}:{line}" for line, content in lines if MACHINE_PATHS.search(content)]
    assert not wrong


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_import_name_reaches_each_folder_through_a_relative_link(folder: str) -> None:
    link = ROOT / "chorus_moe" / folder
    assert link.is_symlink()
    assert os.readlink(link) == f"../{folder}"


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_bare_name_is_refused_in_one_line(folder: str) -> None:
    done = subprocess.run([sys.executable, "-c", f"import {folder}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last == (
        f"ImportError: import chorus_moe.{folder}, not {folder}: the bare name would load every class twice"
    )


def test_other_releases_are_tested_by_files_that_are_there() -> None:
    """pytest runs nothing at all where one of its files is missing, and with workers it does not say which."""
    script = (ROOT / ".ci" / "matrix").read_text(encoding="utf-8")
    patterns = re.findall(r"tests/[\w/]+(?:\{[\w,]+\})?[\w.]*", script)
    named = []
    for pattern in patterns:
        start, _, rest = pattern.partition("{")
        names, _, end = rest.partition("}")
        named += [f"{start}{name}{end}" for name in names.split(",")]
    assert len(named) > 20
    assert not [name for name in named if not (ROOT / name).exists()]
