"""Encoders of other libraries as towers: the same features as the parent's own model, and clear refusals."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaModel, Siglip2VisionConfig, Siglip2VisionModel

from chorus_moe import ChorusModel
from chorus_moe.modeling.configuration_towers import ChorusVisionConfig
from chorus_moe.modeling.tower_audio import ChorusAudioModel
from chorus_moe.modeling.tower_vision import ChorusVisionModel
from chorus_moe.processors.feature_extraction_chorus import ChorusFeatureExtractor
from chorus_moe.surgery.parent_towers import audio_parent, vision_parent
from tests.conftest import tiny_config
from tests.parents import (
    AUDIO_PARENTS,
    VISION_PARENTS,
    WAVEFORM_PARENTS,
    encoder_of,
    feature_extractor,
    save_audio_parent,
    save_timm_parent,
    save_vision_parent,
)

# Group norm and attention under a mask take their float32 sums in another order than the parent does for a lone clip:
# worst difference seen over all parents is 2.3e-6 at features of size 3. Vision and Whisper towers are exact.
ATOL = 1e-5
RATE = 16_000


def tower_of(parent):
    """Our tower with the parent's tensors, all of them and nothing else."""
    kind = ChorusVisionModel if isinstance(parent.config, ChorusVisionConfig) else ChorusAudioModel
    tower = kind._from_config(parent.config).eval()
    tower.load_state_dict(dict(parent.tensors()), strict=True)
    return tower


def clip(samples, seed=0):
    return np.random.default_rng(seed).normal(0, 0.1, samples).astype(np.float32)


def extract(config, clips):
    """The features of our extractor, as the processor sets it up."""
    settings = ("feature_type", "do_normalize", "sampling_rate", "n_fft", "hop_length", "max_seconds")
    extractor = ChorusFeatureExtractor(
        feature_size=config.num_mel_bins, **{name: getattr(config, name) for name in settings}
    )
    return extractor(clips, sampling_rate=RATE, return_tensors="pt")


@pytest.mark.parametrize("name", VISION_PARENTS)
def test_a_vision_tower_gives_the_parents_features(name, tmp_path):
    model = save_vision_parent(name, tmp_path)
    parent = vision_parent(tmp_path, pool_size=2)
    pixels = torch.randn(2, 3, 32, 32)
    features = encoder_of(model)(pixel_values=pixels).last_hidden_state[:, parent.config.num_prefix_tokens :]
    assert torch.equal(tower_of(parent)(pixels).last_hidden_state, features)
    assert (parent.config.num_tokens, parent.config.num_image_tokens) == (16, 4)


@pytest.mark.parametrize("name", ["siglip", "clip", "dinov2_registers"])
def test_every_parameter_of_a_vision_tower_can_learn(name, tmp_path):
    save_vision_parent(name, tmp_path)
    tower = tower_of(vision_parent(tmp_path)).train()
    tower(tower.smallest_input()).last_hidden_state.sum().backward()
    assert not [name for name, p in tower.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.parametrize(
    ("prefix", "arguments"),
    [
        ("", {}),
        ("local-dir:", {}),
        ("", {"name": "resnet10t", "num_classes": 3}),
        ("", {"name": "test_convnext", "num_classes": 0}),
    ],
)
def test_a_timm_folder_gives_timms_features(prefix, arguments, tmp_path):
    model = save_timm_parent(tmp_path, **arguments)
    parent = vision_parent(f"{prefix}{tmp_path}")
    size = parent.config.image_size
    pixels = torch.randn(1, 3, size, size)
    tower = tower_of(parent)
    assert torch.equal(tower.timm_model.forward_features(pixels), model.forward_features(pixels))
    assert tower(pixels).last_hidden_state.shape[1] == parent.config.num_tokens


@pytest.mark.parametrize("name", AUDIO_PARENTS)
def test_an_audio_tower_gives_the_parents_features_of_a_clip(name, tmp_path):
    model = save_audio_parent(name, tmp_path)
    parent = audio_parent(tmp_path)
    samples = clip(7_777)
    theirs = feature_extractor(name)(samples, sampling_rate=RATE, return_tensors="pt")
    expected = encoder_of(model)(theirs[model.main_input_name]).last_hidden_state[0]
    found = tower_of(parent)(**extract(parent.config, [clip(12_000, seed=1), samples]))
    tokens = parent.config.num_audio_tokens(-(-len(samples) // parent.config.hop_length))
    assert found.attention_mask[1].sum() == tokens
    torch.testing.assert_close(found.last_hidden_state[1, :tokens], expected[:tokens], atol=ATOL, rtol=0)


def test_whispers_features_are_those_of_its_own_extractor(tmp_path):
    save_audio_parent("whisper_large_v3", tmp_path)
    ours = extract(audio_parent(tmp_path).config, [clip(5_000)])
    theirs = feature_extractor("whisper_large_v3")(clip(5_000), sampling_rate=RATE, return_tensors="pt")
    assert torch.equal(ours["input_features"].transpose(1, 2), theirs["input_features"])
    assert int(ours["input_features_mask"].sum()) == 32


def test_a_whisper_window_that_is_not_full_is_refused(tmp_path):
    save_audio_parent("whisper", tmp_path)
    tower = tower_of(audio_parent(tmp_path))
    with pytest.raises(ValueError, match="99 frames, a Whisper window holds 100"):
        tower(torch.zeros(1, 99, 80))
    assert tower(tower.smallest_input()).last_hidden_state.shape == (1, 50, 32)


@pytest.mark.parametrize("name", WAVEFORM_PARENTS)
def test_torchaudios_modules_give_the_parents_features(name, tmp_path):
    model = save_audio_parent(name, tmp_path)
    samples = torch.randn(1, 500)
    tower = tower_of(audio_parent(tmp_path, backbone_library="torchaudio"))
    assert type(tower.encoder.backbone).__module__.startswith("torchaudio")
    expected = encoder_of(model)(samples).last_hidden_state
    torch.testing.assert_close(tower(samples[..., None]).last_hidden_state, expected, atol=ATOL, rtol=0)


@pytest.mark.parametrize("name", ["wav2vec2", "hubert_ctc"])
def test_older_names_of_weight_norm_are_understood(name, tmp_path):
    save_audio_parent(name, tmp_path)
    expected = dict(audio_parent(tmp_path).tensors())
    file = tmp_path / "model.safetensors"
    older = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    renamed = {}
    for key, tensor in load_file(file).items():
        for new, old in older.items():
            key = key.replace(new, old)
        renamed[key] = tensor
    assert any(key.endswith("weight_g") for key in renamed)
    save_file(renamed, file, metadata={"format": "pt"})
    found = dict(audio_parent(tmp_path).tensors())
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)


@pytest.mark.parametrize("library", ["transformers", "torchaudio"])
def test_a_parent_keeps_its_dtype(library, tmp_path):
    save_audio_parent("wav2vec2", tmp_path / "audio", torch.bfloat16)
    save_vision_parent("siglip", tmp_path / "vision", torch.bfloat16)
    parents = audio_parent(tmp_path / "audio", backbone_library=library), vision_parent(tmp_path / "vision")
    assert {tensor.dtype for parent in parents for _, tensor in parent.tensors()} == {torch.bfloat16}
    # The dtype of the whole model decides, not that of the file the encoder came from.
    assert {p.dtype for p in tower_of(parents[0]).parameters()} == {torch.float32}


@pytest.mark.parametrize("headless", [False, True])
def test_the_towers_of_a_chorus_model_are_taken_over(model, headless, tmp_path):
    whole = model.model if headless else model
    whole.save_pretrained(tmp_path)
    base = whole if isinstance(whole, ChorusModel) else whole.model
    for parent, tower in (
        (vision_parent(tmp_path), base.vision_tower),
        (audio_parent(tmp_path), base.audio_tower),
    ):
        ours = tower_of(parent).state_dict()
        assert all(torch.equal(ours[key], value) for key, value in tower.state_dict().items())


def test_a_chorus_tower_alone_is_taken_over(model, tmp_path):
    model.model.audio_tower.save_pretrained(tmp_path)
    ours = tower_of(audio_parent(tmp_path)).state_dict()
    assert all(torch.equal(ours[key], value) for key, value in model.model.audio_tower.state_dict().items())
    with pytest.raises(ValueError, match="'chorus_audio' is no vision tower|does not encode images"):
        vision_parent(tmp_path)


def test_a_chorus_model_without_the_tower_is_refused(tmp_path):
    values = tiny_config().to_dict() | {"audio_config": None, "audio_token_id": None}
    model = ChorusModel(type(tiny_config())(**values))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no audio tower"):
        audio_parent(tmp_path)


def test_a_missing_tensor_is_refused(tmp_path):
    save_vision_parent("siglip", tmp_path / "siglip")
    save_timm_parent(tmp_path / "timm")
    for folder, key in (
        (tmp_path / "siglip", "vision_model.encoder.layers.1.mlp.fc1.weight"),
        (tmp_path / "timm", "blocks.1.mlp.fc1.weight"),
    ):
        file = folder / "model.safetensors"
        tensors = load_file(file)
        del tensors[key]
        save_file(tensors, file, metadata={"format": "pt"})
        parent = vision_parent(folder)
        with pytest.raises(ValueError, match=r"layers\.1\.mlp\.fc1\.weight|blocks\.1\.mlp\.fc1\.weight"):
            list(parent.tensors())


def test_an_encoder_of_samples_needs_its_feature_extractor(tmp_path):
    save_audio_parent("hubert", tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match=r"found no preprocessor_config\.json"):
        audio_parent(tmp_path)


@pytest.mark.parametrize("kind", ["siglip", "timm"])
def test_pickled_weights_are_refused(kind, tmp_path):
    save_timm_parent(tmp_path) if kind == "timm" else save_vision_parent(kind, tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="only safetensors files are read"):
        vision_parent(tmp_path)


def test_a_model_of_another_kind_is_refused(tmp_path):
    LlamaModel(LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, vocab_size=9)).save_pretrained(
        tmp_path / "llama"
    )
    Siglip2VisionModel(Siglip2VisionConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2)).save_pretrained(
        tmp_path / "naflex"
    )
    with pytest.raises(ValueError, match="'llama' does not encode images"):
        vision_parent(tmp_path / "llama")
    with pytest.raises(ValueError, match="not NaFlex"):
        vision_parent(tmp_path / "naflex")
    with pytest.raises(ValueError, match="'llama' is not a supported audio encoder; choose from whisper, wav2vec2"):
        audio_parent(tmp_path / "llama")


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    for parent in (vision_parent, audio_parent):
        with pytest.raises(OSError, match="nowhere"):
            parent(tmp_path / "nowhere")


def test_the_name_of_a_timm_model_needs_the_hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises((OSError, ValueError), match=r"timm/vit_tiny_patch16_224\.augreg_in21k_ft_in1k"):
        vision_parent("vit_tiny_patch16_224", local_files_only=True)


def test_a_timm_model_of_oblong_images_is_refused(tmp_path):
    save_timm_parent(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    values["pretrained_cfg"]["input_size"] = [3, 32, 48]
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="32 x 48 pixels"):
        vision_parent(tmp_path)


def test_a_window_of_samples_is_thirty_seconds_unless_another_is_asked_for(tmp_path):
    save_audio_parent(next(iter(WAVEFORM_PARENTS)), tmp_path)
    assert audio_parent(tmp_path).config.max_seconds == 30
    parent = audio_parent(tmp_path, max_seconds=0.5, pool_size=2)
    assert (parent.config.max_seconds, parent.config.pool_size) == (0.5, 2)
