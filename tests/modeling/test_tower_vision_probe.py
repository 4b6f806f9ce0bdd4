"""What an encoder yields is found before anything is allocated, and odd names go nowhere."""

import builtins
from typing import Any

import pytest
import torch
from transformers import CLIPVisionConfig, ConvNextConfig

from chorus_moe.modeling.configuration_towers import ChorusAudioConfig, ChorusVisionConfig
from chorus_moe.modeling.tower_vision_probe import VisionProbe, probe_backbone, probe_vision_encoder


@pytest.mark.parametrize(
    ("architecture", "model_args", "expected"),
    [
        ("vit_tiny_patch16_224", {"depth": 1, "embed_dim": 32, "num_heads": 2}, VisionProbe(32, "NLC", 1, (2, 2), 4)),
        ("vit_small_patch14_reg4_dinov2", {"depth": 1}, VisionProbe(384, "NLC", 5, (2, 2), 4)),
        ("convnext_atto", {"depths": [1] * 4, "dims": [8, 8, 8, 16]}, VisionProbe(16, "NCHW", 0, (2, 2), 4)),
        (
            "swin_tiny_patch4_window7_224",
            {"depths": [1, 1], "num_heads": [1, 2], "embed_dim": 8},
            VisionProbe(16, "NHWC", 0, (4, 4), 16),
        ),
        ("efficientnet_b0", None, VisionProbe(1280, "NCHW", 0, (2, 2), 4)),
    ],
)
def test_every_layout_is_recognised(architecture, model_args, expected):
    image_size = 64 if expected.layout == "NCHW" else 28 if "patch14" in architecture else 32
    assert probe_vision_encoder(architecture, model_args, image_size, 3) == expected


def test_an_odd_number_of_tokens_hides_a_class_token():
    assert probe_vision_encoder("coat_lite_tiny", None, 224, 3) == VisionProbe(320, "NLC", 1, (7, 7), 49)


def test_probing_leaves_the_random_state_alone():
    state = torch.get_rng_state()
    probe_vision_encoder("vit_tiny_patch16_224", {"depth": 1}, 48, 1)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("name", ["hf-hub:someone/model", "hf_hub:a/b", "local-dir:/etc", "../vit", "a b", "", None, 3])
def test_a_name_that_is_a_source_is_refused(name):
    with pytest.raises(ValueError, match="not a plain timm name"):
        probe_vision_encoder(name, None, 32, 3)


def test_an_unknown_name_gets_close_matches():
    with pytest.raises(ValueError, match="did you mean .*vit_tiny_patch16_224"):
        probe_vision_encoder("vit_tny_patch16_224", None, 224, 3)


@pytest.mark.parametrize("key", ["pretrained", "checkpoint_path", "pretrained_cfg", "num_classes", "in_chans"])
def test_reserved_arguments_are_refused(key):
    with pytest.raises(ValueError, match=f"may not hold '{key}'"):
        probe_vision_encoder("vit_tiny_patch16_224", {key: 1}, 224, 3)


def test_an_absurd_argument_is_refused_before_anything_is_built():
    with pytest.raises(ValueError, match=r"model_args\['depth'\]=1000000000 is larger than 1024"):
        probe_vision_encoder("vit_tiny_patch16_224", {"depth": 10**9}, 224, 3)


def test_an_argument_that_timm_does_not_know_is_named():
    with pytest.raises(ValueError, match="timm cannot build 'vit_tiny_patch16_224'.*no_such"):
        probe_vision_encoder("vit_tiny_patch16_224", {"no_such": 1}, 224, 3)


def test_another_image_size_than_the_fixed_one_is_refused():
    with pytest.raises(ValueError, match=r"\(3, 32, 32\).*224"):
        probe_vision_encoder("vit_tiny_patch16_224", {"depth": 1, "img_size": 224}, 32, 3)


def test_several_feature_maps_are_refused():
    with pytest.raises(ValueError, match="neither tokens nor one feature map"):
        probe_vision_encoder("crossvit_9_240", None, 240, 3)


def test_a_missing_timm_is_one_clear_line(monkeypatch):
    real_import = builtins.__import__

    def without_timm(name, *args, **kwargs):
        if name == "timm":
            raise ImportError("No module named 'timm'")
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_timm)
    with pytest.raises(ImportError, match="pip install 'timm>=1.0.31"):
        probe_vision_encoder("vit_tiny_patch16_224", {"depth": 2}, 224, 3)


def test_a_hugging_face_backbone_is_probed():
    clip = CLIPVisionConfig(
        image_size=32, patch_size=8, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    assert probe_backbone(clip, 32, 3) == VisionProbe(32, "NLC", 1, (4, 4), 16)
    convnext = ConvNextConfig(image_size=64, depths=[1, 1], hidden_sizes=[8, 16], num_stages=2)
    assert probe_backbone(convnext, 64, 3) == VisionProbe(16, "NCHW", 0, (8, 8), 64)


def test_a_backbone_for_other_images_is_refused():
    with pytest.raises(ValueError, match="image_size=224 but the vision config has image_size=32"):
        probe_backbone(CLIPVisionConfig(), 32, 3)


SIZES = {"hidden_size": 512, "num_tokens": 49, "layout": "NLC"}  # as a saved configuration has them: nothing is probed


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
