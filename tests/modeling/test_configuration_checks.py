"""What a number, a share and a name of a configuration may be, at both ends."""

from types import SimpleNamespace
from typing import Any

import pytest
from transformers import SiglipVisionConfig

from chorus_moe import ChorusConfig, ChorusTextConfig, ChorusVisionConfig
from chorus_moe.modeling.configuration_checks import check_divides, check_exit, check_range
from tests.conftest import TEXT, tiny_config


def test_a_range_holds_its_ends_and_nothing_beyond() -> None:
    limits = {"size": (2, 5)}
    for size in (2, 5, None):
        check_range(SimpleNamespace(size=size), limits)
    for size in (1, 6):
        with pytest.raises(ValueError, match=rf"^SimpleNamespace: size={size} is outside 2\.\.5$"):
            check_range(SimpleNamespace(size=size), limits)
        with pytest.raises(ValueError, match=rf"^here: size={size} is outside 2\.\.5$"):
            check_range(SimpleNamespace(size=size), limits, "here")


def test_an_exit_stands_before_the_last_layer() -> None:
    for layers in (1, 3):
        check_exit("exits", layers, 4)
    for layers in (0, 4):
        with pytest.raises(ValueError, match=rf"^exits={layers} is outside 1\.\.3 of 4 layers$"):
            check_exit("exits", layers, 4)


def test_a_part_divides_its_whole() -> None:
    config: Any = SimpleNamespace(width=12, heads=4)
    check_divides(config, "width", "heads")
    config.heads = 5
    with pytest.raises(ValueError, match="^SimpleNamespace: width=12 is not a multiple of heads=5$"):
        check_divides(config, "width", "heads")


SIGLIP = {"model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
SIGLIP |= {"num_attention_heads": 2, "image_size": 32, "patch_size": 8}
WAVES = {"model_type": "wav2vec2", "hidden_size": 32, "num_attention_heads": 2, "conv_stride": [5] * 7}


@pytest.mark.parametrize(
    ("part", "key", "value", "found"),
    [
        ("text_config", "rms_norm_eps", -1, "rms_norm_eps=-1 is outside 0..1"),
        ("text_config", "rms_norm_eps", 1.5, "rms_norm_eps=1.5 is outside 0..1"),
        ("text_config", "initializer_range", -0.1, "initializer_range=-0.1 is outside 0"),
        ("text_config", "attention_dropout", 1.01, "attention_dropout=1.01 is outside 0..1"),
        ("text_config", "alignment_loss_coef", -0.5, "alignment_loss_coef=-0.5 is outside 0"),
        ("text_config", "no_rope_layers", [1, 2, 0], r"no_rope_layers\[1\]=2 is outside 0..1"),
        ("text_config", "rope_parameters", {"rope_theta": 0.0}, r"rope_parameters\['rope_theta'\]=0.0 is outside"),
        ("text_config", "rope_parameters", {"rope_type": "linear", "factor": -2.0}, r"\['factor'\]=-2.0 is outside"),
        ("text_config", "rope_parameters", {"partial_rotary_factor": 0.5}, r"rotary_factor'\]=0.5 is outside 1..1"),
        ("vision_config", "initializer_range", -1, "initializer_range=-1 is outside 0"),
        ("vision_config", "num_prefix_tokens", -1, "num_prefix_tokens=-1 is outside 0"),
        ("vision_config", "grid_size", [-2, -2], r"grid_size\[0\]=-2 is outside 1"),
        (
            "vision_config",
            "backbone_config",
            SIGLIP | {"layer_norm_eps": -1.0},
            r"\['layer_norm_eps'\]=-1.0 is outside",
        ),
        ("vision_config", "backbone_config", SIGLIP | {"attention_dropout": 3.0}, r"dropout'\]=3.0 is outside 0..1"),
        ("vision_config", "backbone_config", SIGLIP | {"patch_size": 0}, r"\['patch_size'\]=0 is outside 1"),
        ("vision_config", "backbone_config", SIGLIP | {"hidden_size": 0}, r"\['hidden_size'\]=0 is outside 1"),
        ("audio_config", "dropout", -0.1, "dropout=-0.1 is outside 0..1"),
        ("audio_config", "initializer_range", -1.0, "initializer_range=-1.0 is outside 0"),
        ("audio_config", "max_seconds", 1e9, "max_seconds=1000000000.0 is outside"),
        ("audio_config", "backbone_config", WAVES | {"layer_norm_eps": -1.0}, r"\['layer_norm_eps'\]=-1.0 is outside"),
        ("audio_config", "backbone_config", WAVES | {"conv_stride": [0]}, r"\['conv_stride'\]\[0\]=0 is outside 1"),
    ],
)
def test_numbers_that_can_only_be_wrong_are_refused_by_name(part: str, key: str, value: Any, found: str) -> None:
    values = tiny_config().to_dict()
    values[part][key] = value
    with pytest.raises(ValueError, match=rf"Chorus\w+Config: .*{found}"):
        ChorusConfig(**values)


def test_the_ends_of_what_numbers_may_be_are_accepted() -> None:
    text = ChorusTextConfig(**TEXT, rms_norm_eps=0, attention_dropout=1.0, initializer_range=0.0, rope_theta=1e-6)
    assert (text.rms_norm_eps, text.attention_dropout, text.rope_parameters["rope_theta"]) == (0, 1.0, 1e-6)
    with pytest.raises(ValueError, match="rope_theta=-1.0 is outside"):
        ChorusTextConfig(**TEXT, rope_theta=-1.0)
    backbone = SiglipVisionConfig(**SIGLIP | {"layer_norm_eps": -1.0})
    with pytest.raises(ValueError, match=r"backbone_config\['layer_norm_eps'\]=-1.0 is outside"):
        ChorusVisionConfig(backbone_config=backbone, image_size=32)
