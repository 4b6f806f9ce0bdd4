"""The section `objectives`: which weights can be, and what they are called."""

import math
from typing import Any

import pytest

from chorus_moe.training.objectives.arguments import ObjectiveArguments, weights_of

NOTHING = {"next_token_weight": 0.0}


def test_by_default_the_labelled_tokens_alone_are_learned() -> None:
    given = ObjectiveArguments()
    expected = {"next_token": 1.0, "masked_image": 0.0, "masked_audio": 0.0, "contrast": 0.0}
    assert weights_of(given) == {f"{name}_weight": value for name, value in expected.items()}
    assert (given.mask_share, given.contrastive_loss, given.contrastive_temperature) == (0.5, None, None)


@pytest.mark.parametrize("name", weights_of(ObjectiveArguments()))
def test_one_weight_above_zero_is_enough(name: str) -> None:
    found = weights_of(ObjectiveArguments(**NOTHING | {name: 1e-9}))
    assert {key: value for key, value in found.items() if value} == {name: 1e-9}


@pytest.mark.parametrize("share", [math.nextafter(0, 1), math.nextafter(1, 0)])
def test_any_share_within_the_row_can_be_hidden(share: float) -> None:
    weights_of(ObjectiveArguments(mask_share=share))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            NOTHING,
            "nothing is learned: next_token_weight=0, masked_image_weight=0, masked_audio_weight=0, contrast_weight=0$",
        ),
        *(
            ({name: value}, f"objectives.{name} must be 0 or more and finite, found {value}")
            for name in weights_of(ObjectiveArguments())
            for value in (-1.0, math.inf, math.nan)
        ),
        *(
            ({"mask_share": share}, f"mask_share must lie between 0 and 1, found {share}")
            for share in (0.0, 1.0, -0.5, 1.5, math.nan)
        ),
    ],
)
def test_what_cannot_be_weighed_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        weights_of(ObjectiveArguments(**values))
