"""`chorus-moe federated ...`: what its options ask for, and what is refused before a model is loaded."""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from chorus_moe.training.federated import commands as module
from chorus_moe.training.federated.commands import federated

PARENT = "chorus_moe.training.federated"


class Modules:
    """Stand for the modules that commands import when they run, and note what is called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        self.calls: list[Any] = []
        monkeypatch.setattr(module, "need_flower", lambda: None)
        recipe = type("Recipe", (), {"training": type("T", (), {"output_dir": str(tmp_path / "out")})})
        names = {
            "flower_server": {"FlowerServer": self.server, "read_clients": lambda path: f"keys of {path.name}"},
            "flower_client": {"serve_server": self.note("serve")},
            "secure_client": {"SecureLearner": lambda learner: type("S", (), {"answer": f"answer of {learner}"})},
            "learner": {"Learner": type("L", (), {"of": staticmethod(lambda recipe: "learner")})},
            "run": {"run_server": self.note("run", {"rounds": 2}), "simulate": self.note("simulate", {"rounds": 3})},
            "owned_banks": {
                "gather_banks": self.note("gather", ["a", "b"]),
                "read_gates": lambda path: f"gates of {path}",
                "withdraw_bank": self.note("withdraw", ["a"]),
            },
        }
        for name, content in names.items():
            stand_in = ModuleType(name)
            vars(stand_in).update(content)
            monkeypatch.setitem(sys.modules, f"{PARENT}.{name}", stand_in)
        stand_in = ModuleType("recipe")
        vars(stand_in)["read_recipe"] = lambda name, more=(): self.calls.append(("read", name, list(more))) or recipe
        monkeypatch.setitem(sys.modules, "chorus_moe.training.recipe", stand_in)
        self.recipe = recipe

    def note(self, name: str, answer: Any = None) -> Any:
        def call(*given: Any, **options: Any) -> Any:
            self.calls.append((name, *given, *([options] if options else [])))
            return answer

        return call

    def server(self, *given: Any) -> Any:
        self.calls.append(("server", *given))
        return self

    def __enter__(self) -> str:
        return "exchange"

    def __exit__(self, *given: Any) -> None:
        self.calls.append(("closed",))


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Modules:
    for name in ("keys", "pem", "key"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    return Modules(monkeypatch, tmp_path)


def run(*words: str) -> None:
    federated(list(words), standalone_mode=False)


def test_a_server_listens_here_unless_told_otherwise(
    modules: Modules, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("server", "r.yaml", "--insecure", "--rounds", "5")
    database = tmp_path / "out" / "flower.sqlite"
    assert modules.calls == [
        ("read", "r.yaml", ["--rounds", "5"]),
        ("server", "127.0.0.1:9092", database, None, None, None),
        ("run", modules.recipe, "exchange"),
        ("closed",),
    ]
    assert json.loads(capsys.readouterr().out) == {"rounds": 2}
    modules.calls.clear()
    words = ["--listen", "0.0.0.0:1", "--clients", "keys", "--certificate", "pem", "--key", "key"]
    run("server", "r.yaml", *words)
    assert modules.calls[1] == ("server", "0.0.0.0:1", database, "keys of keys", Path("pem"), Path("key"))


def test_a_client_asks_here_unless_told_otherwise(modules: Modules) -> None:
    run("client", "r.yaml", "--insecure")
    serve = ("serve", "127.0.0.1:9092", "answer of learner", None, None, {"is_plain": True})
    assert modules.calls == [("read", "r.yaml", []), serve]
    modules.calls.clear()
    run("client", "r.yaml", "--server", "h:2", "--private-key", "key", "--root-certificate", "pem", "--seed", "3")
    serve = ("serve", "h:2", "answer of learner", Path("key"), Path("pem"), {"is_plain": False})
    assert modules.calls == [("read", "r.yaml", ["--seed", "3"]), serve]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["server", "r"], "give --certificate and --key, or --insecure for plain HTTP"),
        (["server", "r", "--insecure", "--certificate", "pem", "--key", "key"], "give --certificate and --key"),
        (["server", "r", "--certificate", "pem", "--clients", "keys"], "give --certificate and --key"),
        (["server", "r", "--insecure", "--key", "key"], "give --certificate and --key"),
        (["server", "r", "--certificate", "pem", "--key", "key"], "--clients is missing"),
        (["client", "r"], "--private-key is missing"),
        (["client", "r", "--root-certificate", "pem"], "--private-key is missing"),
        (["client", "r", "--insecure", "--private-key", "key"], "--insecure speaks plain HTTP"),
        (["client", "r", "--insecure", "--root-certificate", "pem"], "--insecure speaks plain HTTP"),
    ],
)
def test_half_a_connection_is_refused_before_work(modules: Modules, words: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        run(*words)
    assert modules.calls == []


def test_a_simulation_numbers_its_clients(modules: Modules, capsys: pytest.CaptureFixture[str]) -> None:
    run("simulate", "s.yaml", "--client", "a/eyes.yaml", "--client", "b/eyes.yaml", "--rounds", "1")
    reads = [call[1:] for call in modules.calls if call[0] == "read"]
    assert sorted(reads) == [("a/eyes.yaml", []), ("b/eyes.yaml", []), ("s.yaml", ["--rounds", "1"])]
    recipe = modules.recipe
    assert modules.calls[-1] == ("simulate", recipe, {"0_eyes": recipe, "1_eyes": recipe})
    assert json.loads(capsys.readouterr().out) == {"rounds": 3}


def test_banks_are_gathered_and_taken_out(modules: Modules, capsys: pytest.CaptureFixture[str]) -> None:
    run("gather", "base", "--bank", "key", "--bank", "pem", "--out", "new")
    run("gather", "base", "--bank", "key", "--out", "new", "--gates", "keys")
    run("withdraw", "new", "a", "--out", "newer")
    assert modules.calls == [
        ("gather", "base", [Path("key"), Path("pem")], Path("new"), "gates of None"),
        ("gather", "base", [Path("key")], Path("new"), "gates of keys"),
        ("withdraw", Path("new"), "a", Path("newer")),
    ]
    said = capsys.readouterr().out.splitlines()
    assert said == ["wrote new with the banks a, b", "wrote new with the banks a, b", "wrote newer with the banks a"]


@pytest.mark.parametrize("words", [["server", "r", "--insecure"], ["client", "r", "--insecure"]])
def test_flower_is_asked_for_first(modules: Modules, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise ImportError("flwr is missing")

    monkeypatch.setattr(module, "need_flower", missing)
    with pytest.raises(ImportError, match="flwr is missing"):
        run(*words)


def test_without_a_command_there_is_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        federated([])
    said = capsys.readouterr()
    assert ended.value.code == 2 and "Train one model on rows that stay where they are" in said.out + said.err
