"""Any timm or Hugging Face encoder yields image tokens, starts as timm starts it and loads bit for bit."""

import pytest
import timm
import torch
from transformers import AutoConfig, CLIPVisionConfig, ConvNextConfig, SiglipVisionConfig

from chorus_moe.modeling.configuration_towers import ChorusVisionConfig
from chorus_moe.modeling.tower_vision import ChorusVisionModel

SMALL = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "intermediate_size": 32}
SMALL |= {"num_hidden_layers": 2, "num_attention_heads": 2}

CONFIGS = {
    "vit": ("vit_tiny_patch16_224", {"depth": 2, "embed_dim": 32, "num_heads": 2}, 32),
    "convnext": ("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}, 32),
    "swin": ("swin_tiny_patch4_window7_224", {"depths": [2, 2], "num_heads": [1, 2], "embed_dim": 8}, 64),
    "efficientnet": ("test_efficientnet", {}, 32),
    "eva_rope": ("eva02_tiny_patch14_224", {"depth": 2, "embed_dim": 32, "num_heads": 2}, 28),
    "vit_rope_mixed": ("vit_small_patch16_rope_mixed_224", {"depth": 1, "embed_dim": 32, "num_heads": 2}, 32),
    "registers": ("vit_small_patch14_reg4_dinov2", {"depth": 1, "embed_dim": 32, "num_heads": 2}, 28),
}


def timm_config(name, **changes):
    architecture, model_args, image_size = CONFIGS[name]
    return ChorusVisionConfig(architecture=architecture, model_args=model_args, image_size=image_size, **changes)


def backbone_config(backbone, image_size=32, **changes):
    return ChorusVisionConfig(backbone_config=backbone, image_size=image_size, **changes)


def build(config, seed=0):
    torch.manual_seed(seed)
    return ChorusVisionModel(config)


def images(config, number=2):
    shape = (number, config.num_channels, config.image_size, config.image_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def assert_equal_state(one, other):
    one, other = dict(one), dict(other)
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different


@pytest.fixture
def nan_memory():
    """Uninitialised memory is NaN, so that nothing can be right by luck."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("name", CONFIGS)
def test_weights_start_as_timm_starts_them(name):
    config = timm_config(name)
    tower = build(config)
    torch.manual_seed(0)
    arguments = dict(config.model_args)
    if name not in ("convnext", "efficientnet"):
        arguments["img_size"] = config.image_size
    reference = timm.create_model(config.architecture, num_classes=0, **arguments)
    assert_equal_state(tower.timm_model.state_dict(), reference.state_dict())


@pytest.mark.parametrize("name", CONFIGS)
def test_saved_and_loaded_towers_are_equal_bit_for_bit(name, tmp_path, nan_memory):
    tower = build(timm_config(name)).eval()
    tower.save_pretrained(tmp_path)
    loaded = ChorusVisionModel.from_pretrained(tmp_path)
    assert_equal_state(tower.state_dict(), loaded.state_dict())
    assert_equal_state(tower.named_buffers(), loaded.named_buffers())
    pixels = images(tower.config)
    with torch.no_grad():
        assert torch.equal(tower(pixels).last_hidden_state, loaded(pixels).last_hidden_state)


@pytest.mark.parametrize("name", CONFIGS)
def test_missing_keys_start_as_timm_starts_them(name, nan_memory):
    config = timm_config(name)
    torch.manual_seed(0)
    tower = ChorusVisionModel.from_pretrained(None, config=config, state_dict={})
    assert_equal_state(tower.state_dict(), build(config).state_dict())
    assert_equal_state(tower.named_buffers(), build(config).named_buffers())
    assert tower(images(config)).last_hidden_state.isfinite().all()
    assert tower._reference is None, "the fresh model must not outlive the first forward"


def test_a_key_in_the_checkpoint_survives_when_its_neighbours_are_missing(nan_memory):
    config = timm_config("vit")
    state = {name: torch.full_like(t, 7.0) for name, t in build(config).state_dict().items() if "qkv" in name}
    tower, _ = ChorusVisionModel.from_pretrained(None, config=config, state_dict=state, output_loading_info=True)
    assert all((tower.state_dict()[name] == 7.0).all() for name in state)
    assert tower.timm_model.pos_embed.isfinite().all()


@pytest.mark.parametrize("name", CONFIGS)
def test_every_layout_becomes_image_tokens_in_row_order(name):
    config = timm_config(name)
    tower = build(config).eval()
    pixels = images(config)
    features = tower.timm_model.forward_features(pixels)
    if features.ndim == 4:
        features = features if config.layout == "NHWC" else features.permute(0, 2, 3, 1)
        features = features.flatten(1, 2)
    tokens = tower(pixels).last_hidden_state
    assert tokens.shape == (2, config.num_tokens, config.hidden_size)
    assert torch.equal(tokens, features[:, config.num_prefix_tokens :])


@pytest.mark.parametrize(
    "config",
    [
        backbone_config(CLIPVisionConfig(**SMALL)),
        backbone_config(SiglipVisionConfig(**SMALL)),
        backbone_config(ConvNextConfig(image_size=32, num_stages=2, depths=[1, 1], hidden_sizes=[8, 16])),
        backbone_config(AutoConfig.for_model("vit", **SMALL)),
    ],
    ids=lambda config: config.backbone_config.model_type,
)
def test_a_hugging_face_backbone_yields_its_tokens_and_loads_exactly(config, tmp_path, nan_memory):
    tower = build(config).eval()
    tokens = tower(images(config)).last_hidden_state
    assert tokens.shape == (2, config.num_tokens, config.hidden_size)
    tower.save_pretrained(tmp_path)
    loaded = ChorusVisionModel.from_pretrained(tmp_path)
    assert torch.equal(tokens, loaded(images(config)).last_hidden_state)
    tower.train()(images(config)).last_hidden_state.square().sum().backward()
    assert not [name for name, p in tower.named_parameters() if p.grad is None]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_smallest_input_reaches_every_parameter(name):
    tower = build(timm_config(name)).train()
    (tower(tower.smallest_input()).last_hidden_state * 0.0).sum().backward()
    assert not [name for name, p in tower.named_parameters() if p.grad is None]
    assert all(p.grad.isfinite().all() for p in tower.parameters())


@pytest.mark.parametrize("name", ["vit", "swin", "convnext", "eva_rope"])
def test_activation_checkpointing_reaches_timm_and_changes_no_gradient(name):
    def gradients(enable):
        tower = build(timm_config(name)).train()
        (tower.activation_checkpointing_enable if enable else tower.activation_checkpointing_disable)()
        assert any(getattr(m, "grad_checkpointing", False) for m in tower.timm_model.modules()) == enable
        assert tower.gradient_checkpointing == enable
        tower(images(tower.config)).last_hidden_state.square().sum().backward()
        return {name: p.grad for name, p in tower.named_parameters()}

    assert_equal_state(gradients(False), gradients(True))


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
def test_every_attention_implementation_may_be_asked_for(implementation):
    tower = ChorusVisionModel._from_config(timm_config("vit"), attn_implementation=implementation)
    tower.set_attn_implementation(implementation)
    tower.set_experts_implementation("grouped_mm")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_pixels_follow_the_dtype_of_the_weights(dtype):
    config = timm_config("vit")
    assert build(config).to(dtype)(images(config)).last_hidden_state.dtype == dtype


def test_images_of_another_shape_are_named():
    tower = build(timm_config("vit"))
    with pytest.raises(ValueError, match=r"shape \(1, 4, 32, 32\), the vision tower takes .* with \(3, 32, 32\)"):
        tower(torch.zeros(1, 4, 32, 32))
    with pytest.raises(ValueError, match=r"shape \(1, 3, 48, 32\), the vision tower takes"):
        tower(torch.zeros(1, 3, 48, 32))
    with pytest.raises(ValueError, match=r"shape \(3, 32, 32\), the vision tower takes \(images, channels"):
        tower(torch.zeros(3, 32, 32))


def test_a_configuration_that_lies_about_its_tokens_is_caught():
    config = timm_config("vit", hidden_size=32, layout="NLC", num_prefix_tokens=0, num_tokens=5)
    config.num_tokens = 9
    with pytest.raises(ValueError, match=r"\(5, 32\).*\(9, 32\)"):
        build(config)(images(config))


def test_other_channel_counts_are_built():
    config = timm_config("vit", num_channels=1)
    assert build(config)(images(config)).last_hidden_state.shape == (2, 4, 32)


def test_a_frozen_tower_keeps_its_batch_statistics_in_training() -> None:
    config = ChorusVisionConfig(
        architecture="resnet10t", model_args={"channels": [8, 8, 8, 8], "stem_width": 8}, image_size=32
    )
    model = ChorusVisionModel(config).requires_grad_(False).train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}

    model(torch.randn(4, 3, 32, 32))

    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    model.requires_grad_(True).train()(torch.randn(4, 3, 32, 32))
    assert not all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
