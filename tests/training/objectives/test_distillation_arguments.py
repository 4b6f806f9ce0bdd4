"""The section `distillation`: defaults, bounds, and what no teacher can make right."""

import math
from typing import Any

import pytest

from chorus_moe.training.objectives.distillation_arguments import DistillationArguments, check_distillation
from chorus_moe.training.objectives.divergences import LOSSES


def recipe(**values: Any) -> DistillationArguments:
    return DistillationArguments(**values)


def test_defaults_are_the_forward_divergence_and_ask_for_no_teacher() -> None:
    check_distillation(given := recipe())
    assert (given.teachers, given.teacher_logits, given.teacher_dtype) == (None, None, "auto")
    assert (given.distillation_loss, given.teacher_top_k) == ("forward_kl", 64)
    assert (given.distillation_beta, given.distillation_temperature) == (0.5, 1.0)
    assert (given.distilled_layers, given.distilled_routers) == (None, None)
    weights = given.distillation_weight, given.distilled_layers_weight, given.distilled_routers_weight
    assert weights == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    "values",
    [
        {"teachers": ["x"]},
        {"teacher_logits": "x"},
        {"teacher_logits": "x", "teacher_top_k": 1},
        {"teachers": ["x"], "distilled_layers": "{}", "distilled_routers": "{}"},
        {"teachers": ["x"], "distillation_temperature": 1e-9, "distillation_weight": 0.0},
        *({"teachers": ["x"], "distillation_loss": name} for name in LOSSES),
        {"teachers": ["x"], "distillation_loss": "jensen_shannon", "distillation_beta": math.nextafter(0, 1)},
        {"teachers": ["x"], "distillation_loss": "jensen_shannon", "distillation_beta": math.nextafter(1, 0)},
        # Of another loss.
        {"teachers": ["x"], "distillation_loss": "reverse_kl", "distillation_beta": 7.0},
    ],
    ids=str,
)
def test_arguments_at_their_bounds_are_taken(values: dict[str, Any]) -> None:
    check_distillation(recipe(**values))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"distillation_temperature": 2.0}, "distillation: name the teachers, or a folder of teacher_logits"),
        ({"teachers": [], "teacher_top_k": 3}, "name the teachers, or a folder of teacher_logits"),
        ({"teachers": ["x"], "distillation_loss": "kl"}, "distillation_loss='kl'; choose from forward_kl, reverse_kl"),
        ({"teachers": ["x"], "distillation_temperature": 0.0}, "distillation_temperature=0.0 must be above 0"),
        ({"teachers": ["x"], "distillation_temperature": math.nan}, "distillation_temperature=nan must be above 0"),
        *(
            (
                {"teachers": ["x"], "distillation_loss": "jensen_shannon", "distillation_beta": beta},
                f"distillation_beta={beta} must lie between 0 and 1; at the ends jensen_shannon is 0",
            )
            for beta in (0.0, 1.0, -0.5, math.nan)
        ),
        ({"teachers": ["x"], "distillation_weight": -1.0}, "distillation_weight=-1.0 must not be negative"),
        ({"teachers": ["x"], "distillation_weight": math.nan}, "distillation_weight=nan must not be negative"),
        ({"teachers": ["x"], "teacher_top_k": 0}, "teacher_top_k=0: keep at least one token"),
        ({"teacher_logits": "x", "distilled_layers": "{0: 0}"}, "need the teacher itself"),
        ({"teacher_logits": "x", "distilled_routers": "{0: 0}"}, "need the teacher itself"),
        ({"teachers": ["x"], "teacher_logits": "x", "distilled_layers": "{0: 0}"}, "leave teacher_logits out"),
    ],
)
def test_arguments_that_no_teacher_can_make_right_are_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_distillation(recipe(**values))
