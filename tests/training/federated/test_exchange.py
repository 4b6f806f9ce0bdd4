"""What a federation over a network needs is named where it is missing."""

import importlib.machinery

import pytest

from chorus_moe.training.federated import exchange


def test_flower_is_asked_for_by_name_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(exchange, "find_spec", lambda name: asked.append(name))
    with pytest.raises(ImportError, match=r"^flwr is missing: pip install 'chorus-moe\[federated\]'$"):
        exchange.need_flower()
    monkeypatch.setattr(exchange, "find_spec", lambda name: importlib.machinery.ModuleSpec(name, None))
    exchange.need_flower()
    assert asked == ["flwr"]
