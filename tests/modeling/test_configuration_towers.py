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
