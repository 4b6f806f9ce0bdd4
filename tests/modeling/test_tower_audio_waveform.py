"""wav2vec 2.0, HuBERT and WavLM in the audio tower: padding changes nothing, tokens follow the convolutions."""

import pytest
import torch
from transformers import HubertConfig, Wav2Vec2Config, WavLMConfig, WhisperConfig

from chorus_moe.modeling.configuration_towers import ChorusAudioConfig
from chorus_moe.modeling.tower_audio import ChorusAudioModel
from tests.parents import LAYER_NORM, WAVEFORM

# float32 sums in another order: worst difference seen over all backbones is 2.6e-6 at features of size 3.
ATOL = 1e-5
KINDS = {"wav2vec2": Wav2Vec2Config, "hubert": HubertConfig, "wavlm": WavLMConfig}
NORMS = {"group": {}, "layer": LAYER_NORM}
LENGTHS = [150, 400, 20]


def waveform_config(kind="wav2vec2", norm="group", library="transformers", **changes):
    return ChorusAudioConfig(
        feature_type="waveform", num_mel_bins=1, hop_length=1, subsampling=1, hidden_size=32, num_attention_heads=2,
        backbone_config=KINDS[kind](**WAVEFORM, **NORMS[norm]), backbone_library=library, **changes,
    )  # fmt: skip


def tiny_tower(*arguments, **changes):
    torch.manual_seed(0)
    return ChorusAudioModel(waveform_config(*arguments, **changes)).eval()


def ragged_batch(lengths, garbage=torch.nan):
    samples = torch.full((len(lengths), max(lengths), 1), garbage)
    mask = torch.zeros(samples.shape[:2], dtype=torch.long)
    for row, length in enumerate(lengths):
        samples[row, :length] = torch.randn(length, 1, generator=torch.Generator().manual_seed(row))
        mask[row, :length] = 1
    return samples, mask


@pytest.mark.parametrize("library", ["transformers", "torchaudio"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_clip_alone_equals_the_clip_in_a_batch(kind, norm, library):
    tower = tiny_tower(kind, norm, library)
    samples, mask = ragged_batch(LENGTHS)
    together = tower(samples, mask)
    for row, length in enumerate(LENGTHS):
        alone = tower(samples[row : row + 1, :length]).last_hidden_state[0]
        assert together.attention_mask[row].sum() == len(alone)
        torch.testing.assert_close(together.last_hidden_state[row, : len(alone)], alone, atol=ATOL, rtol=0)


@pytest.mark.parametrize("library", ["transformers", "torchaudio"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_freezing_a_tower_changes_its_features_by_rounding_alone(kind, library):
    tower = tiny_tower(kind, "group", library)
    samples, mask = ragged_batch(LENGTHS)
    trained = tower(samples, mask).last_hidden_state
    tower.requires_grad_(False)
    # Torch has another product for frozen weights where a processor has no AVX-512: 4.8e-7 in transformers' WavLM.
    torch.testing.assert_close(tower(samples, mask).last_hidden_state, trained, atol=2e-6, rtol=0)


def test_the_number_of_tokens_is_that_of_the_convolutions():
    config = waveform_config(pool_size=2)
    tower = ChorusAudioModel(config).eval()
    for length in (1, 29, 30, 31, 49, 50, 69, 70, 400):
        tokens = int(tower(torch.randn(1, length, 1)).attention_mask.sum())
        assert config.num_audio_tokens(length) == -(-tokens // 2)
        if length >= tower.encoder.shortest:
            assert tokens == tower.encoder.backbone._get_feat_extract_output_lengths(length)


@pytest.mark.parametrize("library", ["transformers", "torchaudio"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_smallest_input_trains_every_parameter(kind, library):
    tower = tiny_tower(kind, library=library).train()
    tower(tower.smallest_input()).last_hidden_state.square().sum().backward()
    assert not [name for name, p in tower.named_parameters() if p.grad is None]


def test_a_row_of_padding_gives_no_token_and_finite_gradients():
    tower = tiny_tower().train()
    samples, mask = ragged_batch([100, 100])
    mask[1] = 0
    output = tower(samples, mask)
    output.last_hidden_state.sum().backward()
    assert output.attention_mask.sum(dim=1).tolist() == [4, 0]
    assert output.last_hidden_state[1].abs().max() == 0
    assert all(p.grad.isfinite().all() for p in tower.parameters())


@pytest.mark.parametrize("library", ["transformers", "torchaudio"])
def test_a_saved_tower_loads_bit_for_bit(library, tmp_path):
    tower = tiny_tower("wavlm", library=library)
    tower.save_pretrained(tmp_path)
    loaded = ChorusAudioModel.from_pretrained(tmp_path)
    batch = ragged_batch(LENGTHS)
    assert torch.equal(tower(*batch).last_hidden_state, loaded(*batch).last_hidden_state)


def test_activation_checkpointing_changes_no_gradient():
    batch = ragged_batch([100, 150])

    def gradients(enable):
        torch.manual_seed(0)
        tower = tiny_tower("wav2vec2", "layer").train()
        for module in tower.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        for layer in tower.encoder.backbone.encoder.layers:
            layer.attention.dropout = 0.0
        if enable:
            tower.activation_checkpointing_enable()
        tower(*batch).last_hidden_state.square().sum().backward()
        return torch.cat([p.grad.flatten() for p in tower.parameters()])

    assert torch.equal(gradients(False), gradients(True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_model_may_ask_for_sdpa(kind, tmp_path):
    tower = tiny_tower(kind)
    tower.save_pretrained(tmp_path)
    batch = ragged_batch(LENGTHS)
    asked = ChorusAudioModel.from_pretrained(tmp_path, attn_implementation="sdpa")(*batch)
    torch.testing.assert_close(asked.last_hidden_state, tower(*batch).last_hidden_state, atol=ATOL, rtol=0)


def test_bfloat16_gives_finite_features():
    assert tiny_tower().bfloat16()(*ragged_batch(LENGTHS)).last_hidden_state.isfinite().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hop_length": 160}, "hop_length=160, a waveform has hop_length=1"),
        ({"subsampling": 2}, "subsampling=2, a waveform has subsampling=1"),
        ({"backbone_config": None}, "needs a backbone_config"),
        ({"feature_type": "mel"}, "unknown feature_type 'mel'; did you mean 'log_mel'"),
        ({"backbone_library": "fairseq"}, "unknown backbone_library 'fairseq'"),
    ],
)
def test_a_configuration_that_cannot_hear_samples_is_refused(changes, message):
    values = waveform_config().to_dict() | changes
    with pytest.raises(Exception, match=message):
        ChorusAudioConfig(**values)


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        (HubertConfig(**WAVEFORM, conv_pos_batch_norm=True), "conv_pos_batch_norm=True, only False"),
        (Wav2Vec2Config(**WAVEFORM, add_adapter=True), "add_adapter=True, only False"),
        (Wav2Vec2Config(**WAVEFORM | {"hidden_size": 16}), "hidden_size=32, its wav2vec2 backbone needs 16"),
    ],
)
def test_a_backbone_that_is_not_understood_is_refused(backbone, message):
    with pytest.raises(ValueError, match=message):
        ChorusAudioModel(ChorusAudioConfig(**waveform_config().to_dict() | {"backbone_config": backbone}))


def test_an_encoder_of_mel_frames_hears_no_waveform():
    config = ChorusAudioConfig(hidden_size=32, num_attention_heads=2, backbone_config=Wav2Vec2Config(**WAVEFORM))
    with pytest.raises(ValueError, match="'wav2vec2' is no mel encoder"):
        ChorusAudioModel(config)
    whisper = WhisperConfig(d_model=32, encoder_attention_heads=4)
    whisper.conv_kernel, whisper.conv_stride = (3, 3), (1, 2)
    with pytest.raises(ValueError, match="'whisper' hears no waveform"):
        ChorusAudioModel(ChorusAudioConfig(**waveform_config().to_dict() | {"backbone_config": whisper}))


def test_torchaudio_refuses_what_its_builders_cannot_do():
    config = waveform_config(library="torchaudio")
    config.backbone_config.hidden_act = "relu"
    with pytest.raises(ValueError, match="hidden_act=gelu, not relu"):
        ChorusAudioModel(config)
