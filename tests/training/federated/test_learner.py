"""What a client is asked to leave out of its recipe."""

from typing import Any

import pytest

from chorus_moe.training.federated.learner import check_federated_recipe
from chorus_moe.training.recipe import build_recipe

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no model": ({"model": {}}, "set model.model_name_or_path"),
    "stream": ({"data": {"streaming": True}}, "a stream does not end"),
    "tasks": ({"tasks": {"task_names": ["a", "b"]}}, "a federation does not join"),
    "teacher": ({"distillation": {"teachers": ["large"]}}, "has no teacher"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_meaning_in_a_federation_is_refused(case: str) -> None:
    sections, said = REFUSED[case]
    recipe = build_recipe({"model": {"model_name_or_path": "base"}} | sections, "test")
    with pytest.raises(ValueError, match=said):
        check_federated_recipe(recipe)


def test_epsilon_of_rows_would_be_spent_anew_in_each_round() -> None:
    pytest.importorskip("opacus", reason="a private recipe needs Opacus: `.ci/matrix` has a set with it")
    sections = {
        "model": {"model_name_or_path": "base"},
        "lora": {"banks": ["all"]},
        "privacy": {"epsilon": 8.0, "delta": 1e-5, "max_grad_norm": 1.0},
    }
    with pytest.raises(ValueError, match="privacy"):
        check_federated_recipe(build_recipe(sections, "test"))
