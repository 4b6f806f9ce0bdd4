"""transformers' own test mixins, and PEFT's, taken from the source distributions of the installed versions.

Unusual here:
- the sdist is fetched with pip into a cache outside the repository, nothing of it is copied into the project;
- its `tests` folder becomes the package `transformers_tests`, so that it does not meet our own `tests`;
- the sdist of 5.23 leaves out sub-folders and helpers which the mixins import. Each gets a stand-in below, and a mixin
  that is missing altogether becomes one test that is skipped with the reason;
- `CHORUS_TRANSFORMERS_TESTS=FOLDER` uses the `tests` folder of a checkout of that version: nothing is missing.

A test file says:

    suite = transformers_suite.load("test_modeling_common")
    class TestChorus(suite.ModelTesterMixin, unittest.TestCase): ...
"""

import importlib
import os
import subprocess
import sys
import tarfile
import tempfile
import unittest
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import transformers

from tests.fresh_process import PRELOADED

PACKAGE = "transformers_tests"
DOWNLOAD_SECONDS = 120
# Project -> a file that every sdist with tests has; its presence marks the folder as complete.
LANDMARKS = {"transformers": "test_modeling_common.py", "peft": "testing_common.py"}


# Marks that transformers puts on its tests; ours are in pyproject.toml.
MARKERS = ["accelerate_tests", "generate", "torch_compile_test", "torch_export_test"]
MARKERS += [f"flash_attn{version}_test" for version in ("", "_3", "_4")]
MARKERS += [f"is_{kind}_test" for kind in ("training", "tensor_parallel", "expert_parallel")]


def pytest_configure(config: pytest.Config) -> None:
    for name in MARKERS:
        config.addinivalue_line("markers", f"{name}: set by transformers")


class SuiteUnavailable(RuntimeError):
    """The tests of the installed transformers cannot be obtained; the message says why."""


def load(module: str) -> ModuleType:
    """Import one module of transformers' tests, or skip the calling test file with the reason.

    Args:
        module: dotted name below transformers' `tests` folder, e.g. `test_modeling_common`.
    """
    try:
        _install(tests_folder("transformers"))
    except SuiteUnavailable as reason:
        pytest.skip(f"transformers' own tests: {reason}", allow_module_level=True)
    return importlib.import_module(f"{PACKAGE}.{module}")


def load_peft(module: str) -> ModuleType:
    """Import one module of PEFT's tests, which become the package `peft_tests`, as `load` does."""
    if "peft_tests" not in sys.modules:
        try:
            _module("peft_tests", path=tests_folder("peft"))
        except SuiteUnavailable as reason:
            pytest.skip(f"PEFT's own tests: {reason}", allow_module_level=True)
        # Imported at the top for tests of another library.
        vars(_module("diffusers"))["StableDiffusionPipeline"] = type("StableDiffusionPipeline", (), {})
    return importlib.import_module(f"peft_tests.{module}")


def tests_folder(project: str) -> Path:
    """The unpacked `tests` folder of the installed version, from the cache or the package index.

    Raises:
        SuiteUnavailable: there is no network, no source distribution, or it holds another version.
    """
    variable, landmark = f"CHORUS_{project.upper()}_TESTS", LANDMARKS[project]
    name = f"{project}-{version(project)}"
    checkout = os.environ.get(variable)
    if checkout:
        if not (Path(checkout) / landmark).is_file():
            raise SuiteUnavailable(f"{variable}={checkout} holds no {landmark}")
        return Path(checkout)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "chorus-moe"
    folder = cache / name / "tests"
    if not (folder / landmark).is_file():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            unpacked = _unpack(
                _download(project, Path(scratch)), Path(scratch) / "unpacked", f"{name}/tests/", landmark
            )
            folder.parent.mkdir(exist_ok=True)
            if not folder.exists():  # another process may have been faster
                unpacked.rename(folder)
    return folder


def _download(project: str, folder: Path) -> Path:
    """Fetch the sdist through pip, which checks it against the hash of the index."""
    wanted = version(project)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--no-build-isolation", "--no-binary", project, "--dest", str(folder)]
    try:
        done = subprocess.run(
            [*command, f"{project}=={wanted}"],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=DOWNLOAD_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise SuiteUnavailable(f"downloading the sdist of {wanted} took over {DOWNLOAD_SECONDS} seconds") from None
    archives = list(folder.glob(f"{project}-*.tar.gz"))
    if done.returncode or len(archives) != 1:
        last = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise SuiteUnavailable(f"no sdist of {wanted}: {last}")
    return archives[0]


def _unpack(archive: Path, folder: Path, inside: str, landmark: str) -> Path:
    """Unpack the tests only; the `data` filter refuses links and paths that lead outside."""
    with tarfile.open(archive) as content:
        members = [member for member in content.getmembers() if member.name.startswith(inside)]
        if f"{inside}{landmark}" not in {member.name for member in members}:
            raise SuiteUnavailable(f"{archive.name} does not hold {inside}{landmark}")
        content.extractall(folder, members=members, filter="data")
    tests = folder / inside
    (tests / "__init__.py").touch()  # test_configuration_common loads it by path
    return tests


def _install(folder: Path) -> None:
    """Make the folder importable as `transformers_tests`, with stand-ins for what the sdist leaves out."""
    if PACKAGE in sys.modules:
        return
    _module(PACKAGE, path=folder)
    generation, export = "GenerationTesterMixin", "ExportTesterMixin"
    stand_ins: dict[str, dict[str, Any]] = {
        "generation.test_utils": {generation: _missing_mixin(generation, "generation/test_utils.py")},
        "exporters.test_export": {export: _missing_mixin(export, "exporters/test_export.py")},
        "utils.test_configuration_utils": {"config_common_kwargs": CONFIG_COMMON_KWARGS},
        "distributed_testing_utils": {"run_distributed": run_distributed},
    }
    for name, members in stand_ins.items():
        if not (folder / f"{name.replace('.', '/')}.py").is_file():
            parent, _, _ = name.rpartition(".")
            if parent and f"{PACKAGE}.{parent}" not in sys.modules:
                _module(f"{PACKAGE}.{parent}", path=folder / parent)
            vars(_module(f"{PACKAGE}.{name}")).update(members)
    if not (folder.parent / "utils" / "fetch_hub_objects_for_ci.py").is_file():
        vars(_module("fetch_hub_objects_for_ci"))["url_to_local_path"] = lambda url, *_: url


def _module(name: str, path: Path | None = None) -> ModuleType:
    module = ModuleType(name)
    if path is not None:
        module.__path__ = [str(path)]
    sys.modules[name] = module
    return module


def _missing_mixin(name: str, file: str) -> type:
    reason = f"the sdist of transformers {transformers.__version__} does not hold tests/{file}"

    def test(self: unittest.TestCase) -> None:
        self.skipTest(reason)

    return type(name, (), {f"test_{name}_is_available": test, "is_stand_in": True, "__doc__": f"Stand-in: {reason}."})


# Settings every config understands, each unlike its default (transformers' own list is not in the sdist).
CONFIG_COMMON_KWARGS = {
    "return_dict": False,
    "output_hidden_states": True,
    "architectures": ["ModelClass"],
    "id2label": {0: "label"},
    "label2id": {"label": "0"},
    "problem_type": "regression",
}


def run_distributed(world_size: int, backend: str = "gloo") -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Stand-in for the launcher of transformers' distributed mixins: run a function in `world_size` new processes."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        def launch(*arguments: Any) -> None:
            import multiprocessing

            from torch.multiprocessing import start_processes

            # Not this package as well: programs that must run without it fork from the same server.
            multiprocessing.set_forkserver_preload(PRELOADED)
            module = function.__module__.removeprefix(f"{PACKAGE}.")
            with tempfile.TemporaryDirectory() as folder:
                group = {"backend": backend, "init_method": f"file://{folder}/store", "world_size": world_size}
                start_processes(
                    _rank, (group, module, function.__name__, arguments), world_size, start_method="forkserver"
                )

        return launch

    return decorate


def _rank(rank: int, group: dict[str, Any], module: str, name: str, arguments: tuple[Any, ...]) -> None:
    """One process: `transformers_tests` exists only after `load`, so the function arrives by name."""
    from torch import distributed

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(group["world_size"])}
    function = getattr(load(module), name)
    distributed.init_process_group(rank=rank, **group)
    try:
        function(rank, *arguments)
    finally:
        distributed.destroy_process_group()
