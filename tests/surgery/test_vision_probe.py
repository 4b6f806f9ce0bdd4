"""What an encoder yields is found before anything is allocated."""

import pytest
import torch
from transformers import CLIPVisionConfig, ConvNextConfig

from chorus_moe.surgery.vision_probe import VisionProbe, _describe, _map_layout, probe_backbone, probe_vision_encoder


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


@pytest.mark.parametrize(
    ("shape", "output_fmt", "expected"),
    [
        ((1, 4, 4, 9), "NCHW", "NHWC"),
        ((1, 9, 4, 4), "NHWC", "NCHW"),
        # As many channels as places on a side; Python keeps one object for each number up to 256 alone.
        ((1, 4, 4, 4), "NHWC", "NHWC"),
        ((1, 300, 300, 300), "NHWC", "NHWC"),
        ((1, 300, 300, 300), None, "NCHW"),
        ((1, 16, 9), None, "NCHW"),
    ],
)
def test_the_axis_that_differs_holds_the_channels_and_timm_decides_where_none_does(shape, output_fmt, expected):
    model = torch.nn.Identity()
    if output_fmt is not None:
        model.output_fmt = output_fmt
    assert _map_layout(model, torch.empty(shape, device="meta")) == expected


def test_an_odd_number_of_tokens_hides_a_class_token():
    assert probe_vision_encoder("coat_lite_tiny", None, 224, 3) == VisionProbe(320, "NLC", 1, (7, 7), 49)


def test_prefix_tokens_alone_are_no_picture():
    assert _describe("one", torch.zeros(1, 3, 8), "NLC", 2) == VisionProbe(8, "NLC", 2, (1, 1), 1)
    with pytest.raises(ValueError, match="'none' yields 2 tokens, of which 2 are prefix tokens"):
        _describe("none", torch.zeros(1, 2, 8), "NLC", 2)


def test_probing_leaves_the_random_state_alone():
    state = torch.get_rng_state()
    probe_vision_encoder("vit_tiny_patch16_224", {"depth": 1}, 48, 1)
    assert torch.equal(state, torch.get_rng_state())


def test_another_image_size_than_the_fixed_one_is_refused():
    with pytest.raises(ValueError, match=r"\(3, 32, 32\).*224"):
        probe_vision_encoder("vit_tiny_patch16_224", {"depth": 1, "img_size": 224}, 32, 3)


def test_several_feature_maps_are_refused():
    with pytest.raises(ValueError, match="neither tokens nor one feature map"):
        probe_vision_encoder("crossvit_9_240", None, 240, 3)


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
