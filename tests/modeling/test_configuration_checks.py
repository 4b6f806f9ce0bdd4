"""What a number, a share and a name of a configuration may be, at both ends."""

from types import SimpleNamespace
from typing import Any

import pytest
from transformers import SiglipVisionConfig

from chorus_moe import ChorusAudioConfig, ChorusConfig, ChorusTextConfig, ChorusVisionConfig
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
    with pytest.raises(ValueError, match="^here: width=6 is not a multiple of heads=12$"):
        check_divides({"width": 6, "heads": 12}, "width", "heads", "here")
    # What is no pair of numbers is no whole and part: stages of an encoder, or a name that is not there.
    for values in (
        {"width": 12, "heads": [5, 5]},
        {"width": [12], "heads": 5},
        {"width": 12},
        {"width": 12, "heads": 0},
    ):
        check_divides(values, "width", "heads")


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


WIDTH, LAYERS, NO_END = 1_048_576, 4_096, float("inf")
# By the last word of a name or by the whole name, which comes first.
ENDS = [
    ("norm_eps", 0, 1), ("drop_dropout", 0, 1), ("some_range", 0, 1_000), ("rope_theta", 1e-6, NO_END),
    ("a_factor", 1e-6, NO_END), ("partial_rotary_factor", 1, 1), ("no_rope_layers", 0, 1), ("new_coef", 0, NO_END),
    ("num_prefix_tokens", 0, WIDTH), ("max_seconds", 1e-6, 86_400), ("hidden_size", 1, WIDTH), ("d_model", 1, WIDTH),
    ("some_heads", 1, WIDTH), ("patch_size", 1, WIDTH), ("grid_size", 1, WIDTH), ("conv_stride", 1, WIDTH),
    ("conv_kernel", 1, WIDTH), ("num_hidden_layers", 0, LAYERS), ("num_labels", 1, WIDTH),
    ("projection_dim", 1, WIDTH), ("skip_budget", 0, 1), ("exit_thresholds", 0, 1),
    ("original_max_position_embeddings", 1, 1_073_741_824),
]  # fmt: skip


def with_setting(name: str, value: Any) -> ChorusVisionConfig:
    """A configuration with a nested setting that nothing else looks at."""
    probed = {"hidden_size": 8, "layout": "NLC", "num_prefix_tokens": 0, "num_tokens": 1}
    return ChorusVisionConfig(**probed, model_args={"outer": [{name: value}]})


@pytest.mark.parametrize(("name", "low", "high"), ENDS)
def test_a_number_may_be_both_ends_of_what_is_sensible_and_nothing_beyond(name: str, low: float, high: float) -> None:
    below = low - 1e-7 if low < 1e-5 and low else low - 1
    for value in (low, min(high, 1e30), None, "text", [low, low]):
        with_setting(name, value)
    for value in (below, high + 1):
        if value < NO_END:
            found = rf"model_args\['outer'\]\[0\]\['{name}'\]={value} is outside {low}\.\.{high}$"
            with pytest.raises(ValueError, match=f"^ChorusVisionConfig: {found}"):
                with_setting(name, value)
            with pytest.raises(ValueError, match=rf"\['{name}'\]\[1\]={value} is outside"):
                with_setting(name, [low, value])
    for value in (NO_END, -NO_END, float("nan")):
        with pytest.raises(ValueError, match=rf"\['{name}'\]={value} is not a finite number$"):
            with_setting(name, value)


def test_a_name_without_a_range_may_hold_any_finite_number() -> None:
    for value in (-1e30, 0, 1e30):
        with_setting("anything", value)


@pytest.mark.parametrize(
    ("kind", "backbone", "found"),
    [
        (
            ChorusVisionConfig,
            SIGLIP | {"num_attention_heads": 5},
            "hidden_size=32 is not a multiple of num_attention_h",
        ),
        (
            ChorusAudioConfig,
            {"model_type": "whisper", "d_model": 32, "encoder_attention_heads": 3},
            "d_model=32 is not a multiple of encoder_attention_heads=3",
        ),
    ],
)
def test_the_heads_of_an_encoder_share_its_width(kind: Any, backbone: dict[str, Any], found: str) -> None:
    with pytest.raises(ValueError, match=f"^{kind.__name__}: backbone_config: {found}"):
        kind(backbone_config=backbone)
    # Heads of a width of their own need not.
    with_setting("vision", {"hidden_size": 32, "num_attention_heads": 5, "head_dim": 8})


@pytest.mark.parametrize(
    ("key", "hint"), [("hiden_size", "; did you mean 'hidden_size'\\?"), ("zzzzzz", "")], ids=["near", "far"]
)
def test_a_key_that_nobody_knows_is_refused_with_the_nearest(key: str, hint: str) -> None:
    with pytest.raises(ValueError, match=f"^ChorusTextConfig: unknown key '{key}'{hint}$"):
        ChorusTextConfig(**TEXT | {key: 1})
    # What transformers keeps for itself, and settings of generation, which it moves to a file of their own.
    ChorusTextConfig(**TEXT, _anything=1, name_or_path="x", temperature=0.5, rope_scaling=None)


def test_the_ends_of_what_numbers_may_be_are_accepted() -> None:
    text = ChorusTextConfig(**TEXT, rms_norm_eps=0, attention_dropout=1.0, initializer_range=0.0, rope_theta=1e-6)
    assert (text.rms_norm_eps, text.attention_dropout, text.rope_parameters["rope_theta"]) == (0, 1.0, 1e-6)
    with pytest.raises(ValueError, match="rope_theta=-1.0 is outside"):
        ChorusTextConfig(**TEXT, rope_theta=-1.0)
    backbone = SiglipVisionConfig(**SIGLIP | {"layer_norm_eps": -1.0})
    with pytest.raises(ValueError, match=r"backbone_config\['layer_norm_eps'\]=-1.0 is outside"):
        ChorusVisionConfig(backbone_config=backbone, image_size=32)
