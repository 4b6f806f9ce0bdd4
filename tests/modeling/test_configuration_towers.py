"""How many tokens a picture and a sound have, by torch's own layers; what an audio tower may be."""

import pytest
import torch

from chorus_moe import ChorusAudioConfig, ChorusVisionConfig

PROBED = {"hidden_size": 8, "layout": "NLC", "num_prefix_tokens": 0}


@pytest.mark.parametrize("pool", [1, 2, 3])
@pytest.mark.parametrize("grid", [[1, 1], [4, 4], [5, 3], [2, 7]])
def test_a_picture_has_as_many_tokens_as_pooling_leaves(grid: list[int], pool: int) -> None:
    rows, columns = grid
    config = ChorusVisionConfig(**PROBED, num_tokens=rows * columns, grid_size=grid, pool_size=pool)
    pooled = torch.nn.functional.avg_pool2d(torch.zeros(1, 1, rows, columns), pool, ceil_mode=True)
    assert config.num_image_tokens == pooled.numel()


@pytest.mark.parametrize(("tokens", "pool", "found"), [(9, 1, 9), (9, 2, 3), (8, 2, 2), (1, 4, 1), (17, 4, 2)])
def test_tokens_without_a_grid_are_pooled_in_groups(tokens: int, pool: int, found: int) -> None:
    assert ChorusVisionConfig(**PROBED, num_tokens=tokens, pool_size=pool).num_image_tokens == found


def test_a_probe_that_contradicts_itself_is_refused() -> None:
    with pytest.raises(Exception, match=r"grid_size=\[2, 3\] does not hold num_tokens=7"):
        ChorusVisionConfig(**PROBED, num_tokens=7, grid_size=[2, 3])
    with pytest.raises(Exception, match="unknown layout 'NCLH'"):
        ChorusVisionConfig(**PROBED | {"layout": "NCLH"}, num_tokens=6)


@pytest.mark.parametrize("subsampling", [1, 2, 4, 8])
@pytest.mark.parametrize("frames", [1, 2, 3, 7, 8, 9, 100])
def test_frames_are_halved_by_each_convolution_and_pooled(frames: int, subsampling: int) -> None:
    config = ChorusAudioConfig(subsampling=subsampling, pool_size=3)
    maps, halvings = torch.zeros(1, 1, frames), subsampling.bit_length() - 1
    for _ in range(halvings):
        maps = torch.nn.functional.conv1d(maps, torch.zeros(1, 1, 3), stride=2, padding=1)
    pooled = torch.nn.functional.avg_pool1d(torch.cat([maps, maps.new_zeros(1, 1, -maps.shape[2] % 3)], 2), 3)
    assert config.num_audio_tokens(frames) == pooled.shape[2]
    assert (config.convolutions, config.frames_per_token) == ([], 3 * subsampling)


WAVEFORM = {"feature_type": "waveform", "subsampling": 1, "hop_length": 1, "num_mel_bins": 1, "hidden_size": 32}
WAVES = {"model_type": "wav2vec2", "hidden_size": 32, "conv_kernel": [10, 3, 2], "conv_stride": [5, 2, 2]}
WAVES |= {"conv_dim": [4] * 3, "num_feat_extract_layers": 3, "num_attention_heads": 2}


@pytest.mark.parametrize("samples", [47, 48, 100, 16_000])
def test_samples_go_through_the_convolutions_of_the_encoder(samples: int) -> None:
    config = ChorusAudioConfig(**WAVEFORM, num_attention_heads=2, backbone_config=WAVES)
    assert config.convolutions == [[10, 5], [3, 2], [2, 2]]
    maps = torch.zeros(1, 1, samples)
    for kernel, stride in config.convolutions:
        maps = torch.nn.functional.conv1d(maps, torch.zeros(1, 1, kernel), stride=stride)
    assert config.num_audio_tokens(samples) == maps.shape[2]
    # What is too short for one token is heard with silence after it.
    assert config.num_audio_tokens(1) == 1


def test_a_waveform_needs_an_encoder_of_samples_and_frames_of_one() -> None:
    with pytest.raises(Exception, match="feature_type='waveform' needs a backbone_config"):
        ChorusAudioConfig(**WAVEFORM)
    for name, value in (("num_mel_bins", 80), ("hop_length", 160), ("subsampling", 2)):
        with pytest.raises(Exception, match=f"{name}={value}, a waveform has {name}=1"):
            ChorusAudioConfig(**WAVEFORM | {name: value}, backbone_config=WAVES)
    for name in ("feature_type", "backbone_library"):
        with pytest.raises(Exception, match=f"unknown {name} 'other'"):
            ChorusAudioConfig(**{name: "other"})


AUDIO_ENDS = {
    "hidden_size": (4, 1_048_576), "num_attention_heads": (1, 1_048_576), "intermediate_size": (1, 1_048_576),
    "num_hidden_layers": (1, 4_096), "sampling_rate": (1_000, 768_000), "n_fft": (2, 65_536),
    "hop_length": (1, 65_536), "num_mel_bins": (1, 1_024), "pool_size": (1, 1_024), "subsampling": (1, 64),
    "conv_kernel_size": (1, 4_095),
}  # fmt: skip


@pytest.mark.parametrize("name", AUDIO_ENDS)
def test_a_size_of_an_audio_tower_may_be_both_ends_of_its_range(name: str) -> None:
    width = {"hidden_size": 1_048_576} if name == "num_attention_heads" else {}
    low, high = AUDIO_ENDS[name]
    for end in (low, high):
        assert getattr(ChorusAudioConfig(**width | {name: end}), name) == end
    floor = 1 if name == "hidden_size" else low
    for beyond in (floor - 1, high + 1):
        with pytest.raises(Exception, match=rf"ChorusAudioConfig: {name}={beyond} is outside \d+\.\.{high}$"):
            ChorusAudioConfig(**width | {name: beyond})


@pytest.mark.parametrize(
    ("name", "high"),
    [("image_size", 16_384), ("num_channels", 64), ("pool_size", 1_024), ("hidden_size", 1_048_576)],
)
def test_a_size_of_a_vision_tower_may_be_both_ends_of_its_range(name: str, high: int) -> None:
    for end in (1, high):
        assert getattr(ChorusVisionConfig(**PROBED | {"num_tokens": 1, name: end}), name) == end
    for beyond in (0, high + 1):
        with pytest.raises(Exception, match=rf"ChorusVisionConfig: {name}={beyond} is outside 1\.\.{high}$"):
            ChorusVisionConfig(**PROBED | {"num_tokens": 1, name: beyond})


def test_defaults_are_those_of_saved_models() -> None:
    """A file names every field, but what is written by hand relies on these."""
    audio = ChorusAudioConfig()
    assert (audio.feature_type, audio.do_normalize, audio.backbone_library) == ("log_mel", False, "transformers")
    assert (audio.sampling_rate, audio.num_mel_bins, audio.n_fft, audio.hop_length) == (16_000, 80, 400, 160)
    assert (audio.max_seconds, audio.hidden_size, audio.num_hidden_layers) == (30.0, 256, 4)
    assert (audio.num_attention_heads, audio.intermediate_size, audio.conv_kernel_size) == (4, 1_024, 31)
    assert (audio.hidden_act, audio.dropout, audio.subsampling, audio.pool_size) == ("silu", 0.0, 4, 1)
    assert audio.backbone_config is None and audio.initializer_range == 0.02
    vision = ChorusVisionConfig(**PROBED, num_tokens=1)
    assert (vision.architecture, vision.model_args) == ("vit_tiny_patch16_224", None)
    assert (vision.image_size, vision.num_channels, vision.pool_size) == (224, 3, 1)
    assert vision.backbone_config is None and vision.grid_size is None and vision.initializer_range == 0.02


@pytest.mark.parametrize("subsampling", [3, 6, 12, 63])
def test_frames_are_halved_whole_times(subsampling: int) -> None:
    with pytest.raises(Exception, match=f"subsampling={subsampling} must be a power of two"):
        ChorusAudioConfig(subsampling=subsampling)


def test_the_conformer_has_one_activation() -> None:
    with pytest.raises(Exception, match=r"unknown hidden_act 'gelu'; choose from \['silu'\]"):
        ChorusAudioConfig(hidden_act="gelu")


def test_a_backbone_takes_the_place_of_an_architecture() -> None:
    backbone = {"model_type": "siglip_vision_model", "hidden_size": 8, "num_attention_heads": 2}
    config = ChorusVisionConfig(**PROBED, num_tokens=4, backbone_config=backbone)
    assert config.architecture is None and config.backbone_config.model_type == "siglip_vision_model"
    # Without a type it is of the kind that has always been meant.
    assert (
        ChorusVisionConfig(**PROBED, num_tokens=4, backbone_config={}).backbone_config.model_type
        == "siglip_vision_model"
    )
    assert ChorusAudioConfig(backbone_config={}).backbone_config.model_type == "whisper"


@pytest.mark.parametrize("missing", ["hidden_size", "num_tokens"])
def test_a_tower_that_lacks_one_of_two_numbers_is_probed(missing: str) -> None:
    given = {"hidden_size": 7, "num_tokens": 9, "layout": "NLC", "num_prefix_tokens": 0}
    del given[missing]
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
    config = ChorusVisionConfig(**given, model_args=small, image_size=32)
    assert (config.hidden_size, config.num_tokens, config.grid_size) == (32, 16, [4, 4])
    assert (config.layout, config.num_prefix_tokens) == ("NLC", 1)
