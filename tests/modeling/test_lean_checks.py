"""Layers that lean decoding does not write out."""

from typing import Any

import pytest

from chorus_moe import ChorusForConditionalGeneration
from chorus_moe.modeling.lean_checks import can_decode
from tests.conftest import tiny_config


@pytest.mark.parametrize(
    ("text", "is_lean"),
    [
        ({}, True),
        ({"norm_placement": "post"}, False),
        ({"use_qk_norm": True}, True),
        ({"use_qk_norm": True, "qk_norm_scope": "projection"}, False),
        ({"mlp_bias": True}, False),
        ({"attention_output_bias": True, "no_rope_layers": [0, 1, 1]}, True),
    ],
)
def test_layers_of_another_form_are_left_to_the_modules(text: dict[str, Any], is_lean: bool):
    assert can_decode(ChorusForConditionalGeneration(tiny_config(**text)).eval()) == is_lean
