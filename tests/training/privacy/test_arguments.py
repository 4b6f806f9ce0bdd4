"""Settings that say nothing, or two things, are refused."""

from pathlib import Path

import pytest
import yaml

from chorus_moe.training.privacy.arguments import PrivacyArguments, check_arguments
from chorus_moe.training.recipe import read_recipe


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "give exactly one of epsilon, noise_multiplier, epsilon_per_update; found none"),
        (
            {"epsilon": 8.0, "noise_multiplier": 1.0},
            "exactly one of .*; found {'epsilon': 8.0, 'noise_multiplier': 1.0}",
        ),
        ({"epsilon": 0.0}, "epsilon must be positive and finite, found 0.0"),
        ({"noise_multiplier": float("inf")}, "noise_multiplier must be positive and finite"),
        ({"epsilon_per_update": 0.5}, "epsilon_per_update is of mechanism: laplace"),
        ({"epsilon": 8.0, "delta": 1.0}, "delta must lie between 0 and 1, found 1.0"),
        ({"epsilon": 8.0, "mechanism": "cauchy"}, "mechanism='cauchy'; choose from gaussian, laplace"),
        ({"epsilon": 8.0, "accountant": "gdp"}, "accountant='gdp'; choose from prv, rdp"),
    ],
)
def test_settings_that_do_not_say_one_thing_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_arguments(PrivacyArguments(use_privacy=True, **settings))  # type: ignore[arg-type]


def test_a_section_switches_it_on_and_may_hold_the_norm_of_a_row(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    sections = {"privacy": {"epsilon": 8, "max_grad_norm": 0.5}, "training": {"use_cpu": True, "report_to": "none"}}
    path.write_text(yaml.safe_dump(sections))
    recipe = read_recipe(path)
    assert recipe.privacy == PrivacyArguments(use_privacy=True, epsilon=8.0)
    assert recipe.training.max_grad_norm == 0.5
    assert not read_recipe(path, ["--use_privacy", "false"]).privacy.use_privacy
    path.write_text(yaml.safe_dump({**sections, "training": {"max_grad_norm": 1.0}}))
    with pytest.raises(ValueError, match="max_grad_norm is 0.5 in one section and 1.0 in 'training'"):
        read_recipe(path)
    path.write_text(yaml.safe_dump({"lora": {"max_grad_norm": 1.0}}))
    with pytest.raises(ValueError, match="section 'lora' has no 'max_grad_norm'; it belongs to 'training'"):
        read_recipe(path)
