"""The wheel holds the folders and is imported where there is no checkout."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("modeling", "processors", "fastpaths", "surgery", "training", "serving")

pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the tracked sources so that no `build/` folder appears in the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for path in [*(ROOT / name for name in ("pyproject.toml", "README.md", "LICENSE")), *ROOT.glob("chorus_moe/*.*")]:
        copy(path, source / path.relative_to(ROOT))
    for name in FOLDERS:
        for path in files_of(name):
            copy(path, source / path.relative_to(ROOT))
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, source, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


def files_of(folder: str) -> list[Path]:
    """Code, and the recipes that ship with it."""
    return [path for kind in ("*.py", "*.yaml") for path in (ROOT / folder).rglob(kind)]


def copy(path: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(path.read_bytes())


def test_the_wheel_holds_every_file_of_the_folders_and_the_type_marker(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    wanted = {f"chorus_moe/{path.relative_to(ROOT).as_posix()}" for name in FOLDERS for path in files_of(name)}
    wanted |= {"chorus_moe/__init__.py", "chorus_moe/py.typed"}
    assert wanted <= held, f"missing from the wheel: {sorted(wanted - held)}"
    packages = {name.split("/")[0] for name in held if not name.split("/")[0].endswith(".dist-info")}
    assert packages == {"chorus_moe"}, f"the wheel installs other top-level names: {sorted(packages)}"


def test_the_installed_wheel_is_imported_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    target, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    run(*pip, "--no-deps", "--no-index", "--target", target, wheel, cwd=elsewhere)
    # The environment of the tests may hold an editable install: the folder of the wheel goes first, its finders go.
    program = f"""
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
sys.path.insert(0, {str(target)!r})
import importlib, pathlib
for name in ("chorus_moe", *("chorus_moe." + folder for folder in {FOLDERS!r})):
    module = importlib.import_module(name)
    assert pathlib.Path(module.__file__).is_relative_to({str(target)!r}), (name, module.__file__)
import chorus_moe
missing = [name for name in getattr(chorus_moe, "__all__", ()) if not hasattr(chorus_moe, name)]
assert not missing, missing
print("imported")
"""
    assert run(sys.executable, "-P", "-c", program, cwd=elsewhere).strip().endswith("imported")
