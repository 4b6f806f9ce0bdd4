"""Padding never changes a clip, a clip of n frames gives ceil(n / subsampling) tokens, and loading is exact."""

import sys
from math import ceil

import pytest
import torch
from transformers import WhisperConfig

from chorus_moe.modeling.configuration_towers import ChorusAudioConfig
from chorus_moe.modeling.tower_audio import ChorusAudioModel

# float32 sums in another order: worst difference seen over 40 seeds is 1.2e-6 at features of size 4.
ATOL = 1e-5


def tiny_config(**changes):
    sizes = {
        "num_mel_bins": 20,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "conv_kernel_size": 7,
    }
    return ChorusAudioConfig(**(sizes | changes))


def tiny_whisper(**changes):
    sizes = {"d_model": 32, "num_mel_bins": 20, "encoder_layers": 2, "encoder_attention_heads": 2}
    whisper = WhisperConfig(**sizes, encoder_ffn_dim=48, max_source_positions=50, decoder_layers=1)
    return tiny_config(backbone_config=whisper, **({"subsampling": 2} | changes))


def tiny_tower(config=None, seed=0):
    torch.manual_seed(seed)
    return ChorusAudioModel(config or tiny_config())


def ragged_batch(lengths, bins=20, garbage=torch.nan):
    """Clips of the given lengths, padded with `garbage`, and their mask."""
    features = torch.full((len(lengths), max(lengths), bins), garbage)
    mask = torch.zeros(features.shape[:2], dtype=torch.long)
    for row, length in enumerate(lengths):
        features[row, :length] = torch.randn(length, bins, generator=torch.Generator().manual_seed(row))
        mask[row, :length] = 1
    return features, mask


@pytest.fixture
def nan_memory():
    """Uninitialised memory is NaN, so that nothing can be right by luck."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("config", [tiny_config(), tiny_whisper()])
def test_padding_on_the_left_is_padding(config):
    tower, lengths = tiny_tower(config).eval(), [9, 90, 1, 37]
    features, mask = ragged_batch(lengths)
    shifted, shifted_mask = features.clone(), mask.clone()
    for row, length in enumerate(lengths):
        shifted[row], shifted_mask[row] = features[row].roll(-length, 0), mask[row].roll(-length, 0)
    assert torch.equal(tower(shifted, shifted_mask).last_hidden_state, tower(features, mask).last_hidden_state)


@pytest.mark.parametrize(
    "config", [tiny_config(), tiny_config(subsampling=1), tiny_config(subsampling=8), tiny_whisper()]
)
@pytest.mark.parametrize("training", [False, True])
def test_a_clip_alone_equals_the_clip_beside_one_ten_times_longer(config, training):
    tower = tiny_tower(config).train(training)
    lengths = [9, 90, 1, 37]
    features, mask = ragged_batch(lengths)
    together = tower(features, mask).last_hidden_state
    for row, length in enumerate(lengths):
        alone = tower(features[row : row + 1, :length]).last_hidden_state[0]
        torch.testing.assert_close(together[row, : len(alone)], alone, atol=ATOL, rtol=0)


@pytest.mark.parametrize(
    "config",
    # In the first the products of attention are large enough to be summed in two ways.
    [tiny_config(hidden_size=80, intermediate_size=160, num_attention_heads=4), tiny_config(), tiny_whisper()],
)
@torch.no_grad()
def test_freezing_a_tower_changes_no_bit_of_its_features(config):
    tower = tiny_tower(config).eval()
    for parameter in tower.parameters():
        parameter.mul_(2.0).add_(torch.randn_like(parameter), alpha=0.02)
    features, mask = ragged_batch([40, 97, 12], bins=config.num_mel_bins)
    trained = tower(features, mask).last_hidden_state
    tower.requires_grad_(False)
    assert torch.equal(tower(features, mask).last_hidden_state, trained)


def test_gradients_of_a_batch_are_the_sum_of_those_of_its_clips():
    lengths = [9, 90, 1]
    features, mask = ragged_batch(lengths)

    def gradients(rows):
        tower = tiny_tower().train()
        for features, mask in rows:
            tower(features, mask).last_hidden_state.square().sum().backward()
        return torch.cat([p.grad.flatten() for p in tower.parameters()])

    together = gradients([(features, mask)])
    alone = gradients([(features[r : r + 1, :n], mask[r : r + 1, :n]) for r, n in enumerate(lengths)])
    torch.testing.assert_close(together, alone, atol=1e-5 * alone.abs().max().item(), rtol=0)


def test_no_gradient_flows_into_padding():
    features, mask = ragged_batch([9, 30], garbage=3.0)
    features.requires_grad_()
    tiny_tower()(features, mask).last_hidden_state.sum().backward()
    assert features.grad[0, 9:].abs().max() == 0


@pytest.mark.parametrize("subsampling", [1, 2, 4, 8])
def test_the_number_of_tokens_is_frames_over_subsampling_rounded_up(subsampling):
    tower = tiny_tower(tiny_config(subsampling=subsampling, num_hidden_layers=1))
    lengths = list(range(1, 20))
    output = tower(*ragged_batch(lengths))
    assert output.last_hidden_state.shape == (19, ceil(19 / subsampling), 32)
    assert output.attention_mask.sum(dim=1).tolist() == [ceil(length / subsampling) for length in lengths]


@pytest.mark.parametrize("config", [tiny_config(), tiny_whisper()])
def test_a_row_of_padding_gives_zeros_and_finite_gradients(config):
    tower = tiny_tower(config).train()
    features, mask = ragged_batch([12, 12])
    mask[1] = 0
    hidden = tower(features, mask).last_hidden_state
    hidden.sum().backward()
    assert hidden[1].abs().max() == 0
    assert all(p.grad.isfinite().all() for p in tower.parameters() if p.requires_grad)


@pytest.mark.parametrize("config", [tiny_config(), tiny_whisper()])
def test_loading_is_bit_exact_and_missing_keys_are_initialised(config, tmp_path, nan_memory):
    tower = tiny_tower(config).eval()
    tower.save_pretrained(tmp_path)
    loaded = ChorusAudioModel.from_pretrained(tmp_path)
    assert all(
        torch.equal(a, b) for a, b in zip(tower.state_dict().values(), loaded.state_dict().values(), strict=True)
    )
    features = ragged_batch([12, 30])
    assert torch.equal(tower(*features).last_hidden_state, loaded(*features).last_hidden_state)
    scratch = ChorusAudioModel.from_pretrained(None, config=config, state_dict={})
    assert all(p.isfinite().all() for p in scratch.parameters())
    assert scratch(*features).last_hidden_state.std() > 0.1


def test_activation_checkpointing_changes_no_gradient():
    features, mask = ragged_batch([9, 30])

    def gradients(enable):
        tower = tiny_tower().train()
        if enable:
            tower.activation_checkpointing_enable()
            assert all(layer.gradient_checkpointing for layer in tower.encoder.layers)
        tower(features, mask).last_hidden_state.square().sum().backward()
        return torch.cat([p.grad.flatten() for p in tower.parameters()])

    assert torch.equal(gradients(False), gradients(True))


def test_the_smallest_input_reaches_every_parameter():
    tower = tiny_tower().train()
    tower(tower.smallest_input()).last_hidden_state.square().sum().backward()
    assert all(p.grad is not None for p in tower.parameters())


def test_half_precision_gives_finite_features():
    features, mask = ragged_batch([9, 30])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert tiny_tower()(features, mask).last_hidden_state.isfinite().all()
    assert tiny_tower().bfloat16()(features, mask).last_hidden_state.isfinite().all()


def test_shapes_that_disagree_are_named():
    tower = tiny_tower()
    with pytest.raises(ValueError, match=r"shape \(1, 5, 21\), the audio tower takes .*mel bins = 20"):
        tower(torch.zeros(1, 5, 21))
    with pytest.raises(ValueError, match=r"shape \(1, 4\), .*\(1, 5\)"):
        tower(torch.zeros(1, 5, 20), torch.ones(1, 4))
    with pytest.raises(ValueError, match=r"shape \(1, 0, 20\)"):
        tower(torch.zeros(1, 0, 20))


def test_a_backbone_that_disagrees_is_named():
    with pytest.raises(ValueError, match="subsampling=4, its Whisper backbone needs 2"):
        tiny_tower(tiny_whisper(subsampling=4))
    with pytest.raises(ValueError, match="110 frames, a Whisper window holds 100"):
        tiny_tower(tiny_whisper())(torch.zeros(1, 110, 20))


def test_a_missing_torchaudio_is_one_clear_message(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchaudio.models.conformer", None)
    with pytest.raises(ImportError, match=r"torchaudio 2.11 with torch >=2.11,<2.15"):
        tiny_tower()
