"""A federation from recipes: what is refused, what is reported, and whose answers are asked."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from chorus_moe.training.federated import run as module
from chorus_moe.training.federated.arguments import FederatedArguments
from chorus_moe.training.federated.run import run_server, simulate


def recipe_of(folder: Path, **federated: Any) -> Any:
    return SimpleNamespace(
        training=SimpleNamespace(seed=7, output_dir=str(folder)),
        federated=FederatedArguments(**federated),
        privacy=SimpleNamespace(use_privacy=False),
    )


class Saved:
    """Model and processor: what is saved has its name."""

    def __init__(self, name: str):
        self.name = name

    def save_pretrained(self, folder: Path) -> None:
        (folder / self.name).write_text("new")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    seen: list[Any] = []

    class Federation:
        history = [SimpleNamespace(names=["a"], bytes_in=5, epsilon=9.0),
                   SimpleNamespace(names=["a", "b"], bytes_in=7, epsilon=None)]  # fmt: skip
        done = 4

        def __init__(self, *given: Any):
            seen.append(("federation", *given))

        def run(self, exchange: Any) -> None:
            seen.append(("run", exchange))

    monkeypatch.setattr(module, "Federation", Federation)
    monkeypatch.setattr(module, "check_federated_recipe", lambda recipe: seen.append("checked"))
    monkeypatch.setattr(module, "set_seed", lambda seed: seen.append(("seed", seed)))
    monkeypatch.setattr(module, "load_or_build", lambda *given: seen.append(given[1:]) or (MODEL, PROCESSOR))
    monkeypatch.setattr(module, "run_card", lambda model, metrics: f"card of {metrics}")
    return seen


MODEL, PROCESSOR = Saved("model"), Saved("processor")


def test_a_server_runs_all_rounds_and_saves_what_came_of_them(calls: list[Any], tmp_path: Path) -> None:
    recipe, exchange = recipe_of(tmp_path), object()
    expected = {"rounds": 4, "clients": 2, "bytes_received": 12}
    assert run_server(recipe, exchange) == expected  # type: ignore[arg-type]
    assert calls == [
        "checked", ("seed", 7), (None,), ("federation", MODEL, recipe.federated, tmp_path), ("run", exchange),
    ]  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "model", "processor"]
    assert (tmp_path / "README.md").read_text() == f"card of {expected}"


def test_epsilon_is_that_of_the_last_round(calls: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.Federation, "history", [*module.Federation.history[::-1]])
    assert run_server(recipe_of(tmp_path), object())["epsilon"] == 9.0  # type: ignore[arg-type]


def test_a_server_has_no_rows_to_protect(calls: list[Any], tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    recipe.privacy.use_privacy = True
    with pytest.raises(ValueError, match="privacy: a server has no rows to protect; clients have the section"):
        run_server(recipe, object())  # type: ignore[arg-type]
    assert calls == ["checked"] and not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("clients", "names"), [(["r0", "r1"], ["client_0", "client_1"]), ({"eyes": "r0", "ears": "r1"}, ["ears", "eyes"])]
)
def test_clients_in_one_process_have_the_names_that_were_given(
    clients: Any, names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, seen = recipe_of(tmp_path), []

    def serve(given: Any, exchange: Any) -> dict[str, float]:
        seen.append(given)
        return exchange.ask(dict.fromkeys(exchange.clients(), b"?"), 0.0)

    learner = SimpleNamespace(of=lambda found: SimpleNamespace(answer=lambda payload: f"{found}".encode() + payload))
    monkeypatch.setattr(module, "Learner", learner)
    monkeypatch.setattr(module, "run_server", serve)
    found = simulate(recipe, clients)
    assert seen == [recipe] and list(found) == names
    assert sorted(found.values()) == [b"r0?", b"r1?"]  # type: ignore[type-var, comparison-overlap]


def test_masks_want_flower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise ImportError("flwr is missing")

    monkeypatch.setattr(module, "need_flower", missing)
    monkeypatch.setattr(module, "run_server", lambda recipe, exchange: {})
    with pytest.raises(ImportError, match="flwr is missing"):
        simulate(recipe_of(tmp_path, secure_aggregation=True), [])
    assert simulate(recipe_of(tmp_path), []) == {}
