"""Pooling is exact at ragged ends and agrees with the token counts of the configuration."""

from math import ceil

import pytest
import torch

from chorus_moe.modeling.configuration_towers import ChorusAudioConfig, ChorusVisionConfig
from chorus_moe.modeling.tower_connectors import AudioConnector, VisionConnector, masked_mean_pool


def vision_config(grid_size, num_tokens, pool_size):
    return ChorusVisionConfig(
        architecture="vit_tiny_patch16_224",
        hidden_size=8,
        layout="NLC",
        num_prefix_tokens=0,
        grid_size=grid_size,
        num_tokens=num_tokens,
        pool_size=pool_size,
    )


@pytest.mark.parametrize("pool_size", [1, 2, 3, 5])
@pytest.mark.parametrize(("grid_size", "num_tokens"), [([4, 4], 16), ([3, 5], 15), ([1, 1], 1), (None, 7)])
def test_an_image_gives_as_many_tokens_as_the_configuration_says(grid_size, num_tokens, pool_size):
    config = vision_config(grid_size, num_tokens, pool_size)
    output = VisionConnector(config, 12)(torch.randn(2, num_tokens, 8))
    assert output.shape == (2, config.num_image_tokens, 12)


def test_pooling_on_a_ragged_grid_averages_the_tokens_that_exist():
    connector = VisionConnector(vision_config([3, 3], 9, 2), 12)
    connector.projector = torch.nn.Identity()
    tokens = torch.arange(9.0)[None, :, None].expand(1, 9, 8)
    assert connector(tokens)[0, :, 0].tolist() == [2.0, 3.5, 6.5, 8.0]


def test_a_ragged_end_is_the_mean_of_its_real_tokens():
    hidden = torch.tensor([[[1.0], [3.0], [5.0], [torch.nan], [torch.nan]]])
    mask = torch.tensor([[True, True, True, False, False]])
    pooled, pooled_mask = masked_mean_pool(hidden, mask, 2)
    assert pooled[0, :, 0].tolist() == [2.0, 5.0, 0.0]
    assert pooled_mask[0].tolist() == [True, True, False]


@pytest.mark.parametrize("pool_size", [1, 2, 3])
def test_a_clip_alone_equals_the_clip_in_a_batch(pool_size):
    config = ChorusAudioConfig(hidden_size=8, num_attention_heads=2, pool_size=pool_size)
    connector = AudioConnector(config, 12)
    lengths = [1, 4, 7]
    hidden, mask = torch.randn(3, 7, 8), torch.arange(7) < torch.tensor(lengths)[:, None]
    features, feature_mask = connector(hidden, mask)
    for row, length in enumerate(lengths):
        alone, alone_mask = connector(hidden[row : row + 1, :length], mask[row : row + 1, :length])
        assert feature_mask[row].sum() == alone_mask.sum() == ceil(length / pool_size)
        # a matrix product of other sizes adds up in another order: at most 1e-7 seen at features of size 1
        torch.testing.assert_close(features[row, feature_mask[row]], alone[0], atol=1e-6, rtol=0)
        assert features[row, ~feature_mask[row]].abs().sum() == 0


@pytest.mark.parametrize("subsampling", [1, 2, 4])
@pytest.mark.parametrize("pool_size", [1, 2, 3])
def test_rounding_up_twice_is_rounding_up_once(subsampling, pool_size):
    config = ChorusAudioConfig(hidden_size=8, num_attention_heads=2, subsampling=subsampling, pool_size=pool_size)
    connector = AudioConnector(config, 4)
    for frames in range(1, 30):
        tokens = ceil(frames / subsampling)
        features, _ = connector(torch.randn(1, tokens, 8), torch.ones(1, tokens, dtype=torch.bool))
        assert features.shape[1] == config.num_audio_tokens(frames)
