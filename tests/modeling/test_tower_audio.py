"""Padding never changes a clip, a clip of n frames gives ceil(n / subsampling) tokens, and loading is exact."""

import sys
from math import ceil

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
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


def tiny_delays(**changes):
    return tiny_config(**({"encoder_type": "time_delay", "num_hidden_layers": 4, "conv_kernel_size": 3} | changes))


def tiny_tower(config=None, seed=0):
    torch.manual_seed(seed)
    return ChorusAudioModel(config or tiny_config())


def trained_tower(config):
    """With statistics of its own in its batch norms."""
    tower = tiny_tower(config).train()
    tower(*ragged_batch([40, 97, 12], bins=config.num_mel_bins))
    return tower.eval()


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


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("config", [tiny_config(), tiny_delays(), tiny_whisper()])
def test_padding_on_the_left_is_padding(config, training):
    tower, lengths = tiny_tower(config).train(training), [9, 90, 1, 37]
    features, mask = ragged_batch(lengths)
    shifted, shifted_mask = features.clone(), mask.clone()
    for row, length in enumerate(lengths):
        shifted[row], shifted_mask[row] = features[row].roll(-length, 0), mask[row].roll(-length, 0)
    assert torch.equal(tower(shifted, shifted_mask).last_hidden_state, tower(features, mask).last_hidden_state)


@pytest.mark.parametrize(
    ("config", "training"),
    [
        *((config, training) for config in (tiny_config(), tiny_whisper()) for training in (False, True)),
        *((tiny_config(subsampling=subsampling), True) for subsampling in (1, 8)),
        # In training the clips of a batch share the statistics of batch norms.
        *((tiny_delays(subsampling=subsampling), False) for subsampling in (1, 2, 4, 8)),
    ],
)
def test_a_clip_alone_equals_the_clip_beside_one_ten_times_longer(config, training):
    tower = trained_tower(config).train(training)
    lengths = [9, 90, 1, 37]
    features, mask = ragged_batch(lengths)
    together = tower(features, mask).last_hidden_state
    for row, length in enumerate(lengths):
        alone = tower(features[row : row + 1, :length]).last_hidden_state[0]
        torch.testing.assert_close(together[row, : len(alone)], alone, atol=ATOL, rtol=0)


@pytest.mark.parametrize(
    "config",
    # In the first the products of attention are large enough to be summed in two ways.
    [
        tiny_config(hidden_size=80, intermediate_size=160, num_attention_heads=4),
        *(tiny_config(), tiny_delays(), tiny_whisper()),
    ],
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


@pytest.mark.parametrize("config", [tiny_config(), tiny_delays()])
def test_no_gradient_flows_into_padding(config):
    features, mask = ragged_batch([9, 30], garbage=3.0)
    features.requires_grad_()
    tiny_tower(config)(features, mask).last_hidden_state.sum().backward()
    assert features.grad[0, 9:].abs().max() == 0


@pytest.mark.parametrize("make", [tiny_config, tiny_delays])
@pytest.mark.parametrize("subsampling", [1, 2, 4, 8])
def test_the_number_of_tokens_is_frames_over_subsampling_rounded_up(subsampling, make):
    tower = tiny_tower(make(subsampling=subsampling))
    lengths = list(range(1, 20))
    output = tower(*ragged_batch(lengths))
    assert output.last_hidden_state.shape == (19, ceil(19 / subsampling), 32)
    assert output.attention_mask.sum(dim=1).tolist() == [ceil(length / subsampling) for length in lengths]


@pytest.mark.parametrize("config", [tiny_config(), tiny_delays(), tiny_whisper()])
def test_a_row_of_padding_gives_zeros_and_finite_gradients(config):
    tower = tiny_tower(config).train()
    features, mask = ragged_batch([12, 12])
    mask[1] = 0
    hidden = tower(features, mask).last_hidden_state
    hidden.sum().backward()
    assert hidden[1].abs().max() == 0
    assert all(p.grad.isfinite().all() for p in tower.parameters() if p.requires_grad)


@pytest.mark.parametrize("config", [tiny_config(), tiny_delays(), tiny_whisper()])
def test_loading_is_bit_exact_and_missing_keys_are_initialised(config, tmp_path, nan_memory):
    tower = trained_tower(config)
    tower.save_pretrained(tmp_path)
    loaded = ChorusAudioModel.from_pretrained(tmp_path)
    assert all(
        torch.equal(a, b) for a, b in zip(tower.state_dict().values(), loaded.state_dict().values(), strict=True)
    )
    features = ragged_batch([12, 30])
    assert torch.equal(tower(*features).last_hidden_state, loaded(*features).last_hidden_state)
    scratch = ChorusAudioModel.from_pretrained(None, config=config, state_dict={})
    assert all(p.isfinite().all() for p in [*scratch.parameters(), *scratch.buffers()])
    assert scratch.train()(*features).last_hidden_state.std() > 0.1


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


@pytest.mark.parametrize("config", [tiny_config(), tiny_delays()])
def test_the_smallest_input_reaches_every_parameter(config):
    tower = tiny_tower(config).train()
    tower(tower.smallest_input()).last_hidden_state.square().sum().backward()
    assert all(p.grad is not None for p in tower.parameters())


@pytest.mark.parametrize("config", [tiny_config(), tiny_delays()])
def test_half_precision_gives_finite_features(config):
    features, mask = ragged_batch([9, 30])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert tiny_tower(config)(features, mask).last_hidden_state.isfinite().all()
    assert tiny_tower(config).bfloat16()(features, mask).last_hidden_state.isfinite().all()


def test_a_batch_norm_takes_its_statistics_over_real_frames_alone():
    lengths = [9, 90, 1, 37]
    alone, padded = tiny_tower(tiny_delays()).train(), tiny_tower(tiny_delays()).train()
    features, mask = ragged_batch(lengths, garbage=3.0)
    expected = alone(features, mask).last_hidden_state
    longer = torch.nn.functional.pad(features, (0, 0, 0, 64), value=5.0)
    found = padded(longer, torch.nn.functional.pad(mask, (0, 64))).last_hidden_state
    torch.testing.assert_close(found[:, : expected.shape[1]], expected, atol=ATOL, rtol=0)
    for (name, own), other in zip(alone.named_buffers(), padded.buffers(), strict=True):
        torch.testing.assert_close(other, own, atol=ATOL, rtol=0, msg=name)
    # What the first norm has seen: a tenth of the way from 0 to the mean of 137 real frames.
    convolved = [alone.encoder.convolutions[0](f[None, :n].mT)[0].mT for f, n in zip(features, lengths, strict=True)]
    mean = torch.cat(convolved).mean(dim=0).detach()
    torch.testing.assert_close(alone.encoder.norms[0].running_mean, 0.1 * mean, atol=ATOL, rtol=0)


def test_a_frozen_tower_keeps_the_statistics_of_its_batch_norms_and_has_them_in_training():
    tower = trained_tower(tiny_delays()).requires_grad_(False).train()
    before = {name: value.clone() for name, value in tower.named_buffers()}
    assert before
    features = ragged_batch([9, 30])
    found = tower(*features).last_hidden_state
    assert all(torch.equal(value, before[name]) for name, value in tower.named_buffers())
    assert torch.equal(found, tower.eval()(*features).last_hidden_state)


def test_each_layer_of_a_time_delay_network_hears_a_frame_more_on_either_side():
    # Kernels of three: two layers see one more frame on either side each, and two at half the rate two more each.
    tower = trained_tower(tiny_delays(subsampling=2)).double()
    features = torch.randn(1, 80, 20, dtype=torch.double, requires_grad=True)
    tower(features).last_hidden_state[0, 20].square().sum().backward()
    reached = features.grad[0].abs().sum(dim=1).nonzero().squeeze(1)
    assert [reached.min().item(), reached.max().item()] == [40 - 6, 40 + 6]


@pytest.mark.parametrize("frames", [0, 1])
def test_a_time_delay_network_trains_on_a_single_frame(frames: int):
    """One frame has no variance: it is normed as in evaluation, and the running statistics stay."""
    torch.manual_seed(0)
    model = ChorusAudioModel(tiny_delays())
    for norm in model.encoder.norms:
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    features = torch.randn(1, 8, model.config.num_mel_bins)
    mask = torch.arange(8)[None] < frames
    expected = model.eval()(features, mask).last_hidden_state
    found = model.train()(features, mask).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    found.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    # Two frames have one, in every layer that still has two.
    model(features, torch.arange(8)[None] < 2)
    assert model.encoder.norms[0].num_batches_tracked == 1 and model.encoder.norms[-1].num_batches_tracked == 0


def test_a_time_delay_network_is_exported_with_its_padding():
    tower = trained_tower(tiny_delays())
    ones = torch.ones(3, 41, dtype=torch.bool)
    exported = torch.export.export(tower, (torch.randn(3, 41, 20), ones)).module()
    features, mask = ragged_batch([30, 41, 7], garbage=3.0)
    found = exported(features, mask.bool())
    torch.testing.assert_close(found.last_hidden_state, tower(features, mask).last_hidden_state, atol=ATOL, rtol=0)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"encoder_type": "timedelay"}, "unknown encoder_type 'timedelay'; did you mean 'time_delay'"),
        ({"encoder_type": "time_delay", "subsampling": 4}, "subsampling=4 .*num_hidden_layers=2"),
        ({"encoder_type": "time_delay", "conv_kernel_size": 4, "subsampling": 2}, "conv_kernel_size=4 must be odd"),
    ],
)
def test_a_time_delay_network_that_cannot_be_is_named(changes, match):
    with pytest.raises(StrictDataclassClassValidationError, match=match):
        tiny_config(**changes)


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
