"""timm is asked for models by plain names, with arguments that build one; odd names go nowhere."""

import builtins
from typing import Any

import pytest
from transformers import SiglipVisionConfig

from chorus_moe.modeling.configuration_towers import ChorusAudioConfig, ChorusVisionConfig
from chorus_moe.modeling.tower_vision_timm import check_backbone, create_timm_encoder

SIZES = {"hidden_size": 512, "num_tokens": 49, "layout": "NLC"}  # as a saved configuration has them: nothing is probed


@pytest.mark.parametrize("name", ["hf-hub:someone/model", "hf_hub:a/b", "local-dir:/etc", "../vit", "a b", "", None, 3])
def test_a_name_that_is_a_source_is_refused(name):
    with pytest.raises(ValueError, match="not a plain timm name"):
        create_timm_encoder(name, None, 32, 3)


def test_an_encoder_that_is_looked_up_is_refused_and_none_or_a_plain_one_is_not():
    check_backbone(None)
    check_backbone({"model_type": "siglip_vision_model"})
    check_backbone(SiglipVisionConfig())
    check_backbone({"model_type": "timm_backbone", "backbone": "resnet18"})
    check_backbone({"model_type": "timm_wrapper", "architecture": "resnet18"})
    for source in ({"model_type": "timm_backbone", "backbone": "hf-hub:a/b"},
                   {"model_type": "timm_wrapper", "architecture": "local-dir:/etc"}):  # fmt: skip
        for config in (source, {"model_type": "dpt", "parts": [{"backbone_config": source}]}):
            with pytest.raises(ValueError, match="not a plain timm name"):
                check_backbone(config)
    with pytest.raises(ValueError, match="'dpt': backbone='facebook/dinov2' is looked up on the Hub"):
        check_backbone({"model_type": "dpt", "backbone": "facebook/dinov2"})


def test_an_unknown_name_gets_close_matches():
    with pytest.raises(ValueError, match="did you mean .*vit_tiny_patch16_224"):
        create_timm_encoder("vit_tny_patch16_224", None, 224, 3)


@pytest.mark.parametrize("key", ["pretrained", "checkpoint_path", "pretrained_cfg", "num_classes", "in_chans"])
def test_reserved_arguments_are_refused(key):
    with pytest.raises(ValueError, match=f"may not hold '{key}'"):
        create_timm_encoder("vit_tiny_patch16_224", {key: 1}, 224, 3)


def test_an_absurd_argument_is_refused_before_anything_is_built():
    with pytest.raises(ValueError, match=r"model_args\['depth'\]=1000000000 is larger than 1024"):
        create_timm_encoder("vit_tiny_patch16_224", {"depth": 10**9}, 224, 3)


def test_an_argument_that_timm_does_not_know_is_named():
    with pytest.raises(ValueError, match="timm cannot build 'vit_tiny_patch16_224'.*no_such"):
        create_timm_encoder("vit_tiny_patch16_224", {"no_such": 1}, 224, 3)


def test_a_missing_timm_is_one_clear_line(monkeypatch):
    real_import = builtins.__import__

    def without_timm(name, *args, **kwargs):
        if name == "timm":
            raise ImportError("No module named 'timm'")
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_timm)
    with pytest.raises(ImportError, match="pip install 'timm>=1.0.31"):
        create_timm_encoder("vit_tiny_patch16_224", {"depth": 2}, 224, 3)


@pytest.mark.parametrize("saved", [{}, SIZES], ids=["new", "saved"])
@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        ({"model_type": "timm_wrapper", "architecture": "hf-hub:someone/model"}, "not a plain timm name"),
        ({"model_type": "timm_wrapper", "architecture": "local-dir:models"}, "not a plain timm name"),
        ({"model_type": "timm_wrapper", "architecture": "resnet17"}, "timm has no architecture 'resnet17'"),
        (
            {"model_type": "timm_wrapper", "architecture": "resnet18", "model_args": {"checkpoint_path": "x.pth"}},
            "may not hold 'checkpoint_path'",
        ),
        (
            {"model_type": "timm_wrapper", "architecture": "vit_tiny_patch16_224", "model_args": {"depth": 10**9}},
            "is larger than 1024",
        ),
        ({"model_type": "timm_backbone", "backbone": "hf-hub:someone/model"}, "not a plain timm name"),
        ({"model_type": "timm_backbone", "backbone": "local-dir:models"}, "not a plain timm name"),
        ({"model_type": "detr", "backbone": "someone/model", "use_timm_backbone": False}, "looked up on the Hub"),
        (
            {"model_type": "upernet", "backbone_config": {"model_type": "timm_backbone", "backbone": "hf-hub:a/b"}},
            "not a plain timm name",
        ),
    ],
)
def test_timm_inside_of_transformers_follows_the_same_rules(
    backbone: dict[str, Any], message: str, saved: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    def no_network(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a configuration opened a connection")

    monkeypatch.setattr("socket.socket.connect", no_network)
    with pytest.raises(ValueError, match=message):
        ChorusVisionConfig(backbone_config=backbone, **saved)
    with pytest.raises(ValueError, match=message):
        ChorusAudioConfig(backbone_config=backbone)


def test_timm_inside_of_transformers_is_built_from_its_name():
    config = ChorusVisionConfig(
        backbone_config={"model_type": "timm_wrapper", "architecture": "resnet18", "do_pooling": False}, image_size=64
    )
    assert (config.hidden_size, config.layout, config.grid_size) == (512, "NCHW", [2, 2])
    assert ChorusVisionConfig(**config.to_dict()).backbone_config.architecture == "resnet18"
