"""The processor of a composed model: images as the vision parent's own, sound as the audio parent's, its tokenizer."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

from chorus_moe.processors import ChorusImageProcessor, ChorusProcessor
from chorus_moe.surgery.compose_processor import (
    carries_media,
    compose_processor,
    parent_image_settings,
    parent_tokenizer,
)
from chorus_moe.surgery.parent_towers import audio_parent, vision_parent
from tests.parents import (
    AUDIO_PARENTS,
    VISION_PARENTS,
    plain_tokenizer,
    save_audio_parent,
    save_text_parent,
    save_timm_parent,
    save_vision_parent,
)


class Folder(SimpleNamespace):
    """What is read of a text parent here: its tokenizer."""

    @property
    def tokenizer(self):
        return AutoTokenizer.from_pretrained(self.source)


def tokenizer_of(folder):
    return parent_tokenizer(Folder(source=folder))


RATE = 16_000
TURNS = (
    "{% for m in messages %}{{ m['role'] }}:{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for p in m['content'] %}{% if p['type'] == 'text' %}{{ p['text'] }}{% else %}<{{ p['type'] }}>{% endif %}"
    "{% endfor %}{% endif %}{% endfor %}"
)
MARKED = "{% if true %}{% generation %}{% endgeneration %}{% endif %}" + TURNS
TEXT_ONLY = (
    "{% generation %}{% endgeneration %}{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}"
)


def picture(width=50, height=40):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def config_of(tokens=258, vision=None, audio=None):
    return SimpleNamespace(
        vision_config=vision,
        audio_config=audio,
        image_token_id=tokens if vision is not None else None,
        audio_token_id=tokens + 1 if audio is not None else None,
    )


@pytest.mark.parametrize("name", VISION_PARENTS)
def test_images_are_prepared_as_the_parents_own_processor_does(name, tmp_path):
    save_vision_parent(name, tmp_path)
    ours = ChorusImageProcessor(**parent_image_settings(tmp_path, 32))
    theirs = AutoImageProcessor.from_pretrained(tmp_path)
    expected = theirs([picture(), picture(33, 64)], return_tensors="pt")["pixel_values"]
    assert torch.equal(ours([picture(), picture(33, 64)], return_tensors="pt")["pixel_values"], expected)


@pytest.mark.parametrize("crop", [{"crop_mode": "center", "crop_pct": 0.8}, {"crop_mode": "squash", "crop_pct": 1.0}])
def test_images_are_prepared_as_timms_own_transform_does(crop, tmp_path):
    model = save_timm_parent(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    values["pretrained_cfg"] |= crop
    (tmp_path / "config.json").write_text(json.dumps(values))
    transform = timm.data.create_transform(
        **timm.data.resolve_data_config({}, pretrained_cfg=values["pretrained_cfg"]), is_training=False
    )
    ours = ChorusImageProcessor(**parent_image_settings(tmp_path, 32))
    found = ours([picture(90, 64)], return_tensors="pt")["pixel_values"][0]
    # timm resizes with PIL, which rounds after each axis: worst difference seen is 2 steps of 255, over a std of 0.5.
    torch.testing.assert_close(found, transform(picture(90, 64)), atol=2.01 / 255 / 0.5, rtol=0)
    assert model.pretrained_cfg["mean"] == tuple(ours.image_mean)


def test_another_size_than_the_towers_is_refused(tmp_path):
    save_vision_parent("clip", tmp_path)
    with pytest.raises(ValueError, match="makes images of 32 x 32 pixels, the vision tower takes 48 x 48"):
        parent_image_settings(tmp_path, 48)


def test_a_way_of_cropping_that_is_not_known_is_refused(tmp_path):
    save_timm_parent(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    values["pretrained_cfg"]["crop_mode"] = "border"
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="crop_mode='border'"):
        parent_image_settings(tmp_path, 32)


def test_a_parent_without_image_processor_is_refused(tmp_path):
    save_vision_parent("siglip", tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises((OSError, ValueError), match=r"preprocessor_config\.json|image processor"):
        parent_image_settings(tmp_path, 32)


@pytest.mark.parametrize(
    ("template", "carries"),
    [(None, False), (TURNS, False), (MARKED, True), (TEXT_ONLY, False), ("{% generation %}{% endgeneration %}", False)],
)
def test_a_template_is_kept_if_it_holds_media_and_marks_answers(template, carries):
    tokenizer = plain_tokenizer(chat_template=template)
    assert carries_media(tokenizer, "<image>", "<audio>") is carries


@pytest.fixture
def text(tmp_path):
    save_text_parent(tmp_path / "text")
    return tmp_path / "text"


def test_media_tokens_are_appended_image_first(text):
    length = len(tokenizer_of(text))
    processor = compose_processor(config_of(), tokenizer_of(text))
    assert (processor.image_token_id, processor.audio_token_id) == (length, length + 1)


def test_media_tokens_that_exist_keep_their_ids(tmp_path):
    save_text_parent(tmp_path, others=["<audio>"])
    length = len(tokenizer_of(tmp_path))
    processor = compose_processor(config_of(), tokenizer_of(tmp_path))
    assert (processor.image_token_id, processor.audio_token_id) == (length, 2)


def test_ids_that_the_config_does_not_expect_are_refused(text, tmp_path):
    save_audio_parent("whisper", tmp_path / "audio")
    config = config_of(tokens=5, audio=audio_parent(tmp_path / "audio").config)
    with pytest.raises(ValueError, match="gives <audio> the id .*, the config expects 6"):
        compose_processor(config, tokenizer_of(text))


def test_the_parents_template_or_ours_is_that_of_tokenizer_and_processor(tmp_path):
    save_text_parent(tmp_path / "kept", chat_template=MARKED)
    save_text_parent(tmp_path / "ours", chat_template=TEXT_ONLY)
    kept = compose_processor(config_of(), tokenizer_of(tmp_path / "kept"))
    ours = compose_processor(config_of(), tokenizer_of(tmp_path / "ours"))
    assert kept.chat_template == kept.tokenizer.chat_template == MARKED
    assert ours.chat_template == ours.tokenizer.chat_template != TEXT_ONLY


def test_a_text_model_without_tokenizer_is_refused(text):
    (text / "tokenizer.json").unlink()
    (text / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="no tokenizer can be read beside the text model"):
        tokenizer_of(text)


def test_a_tokenizer_without_end_of_text_is_refused(tmp_path):
    plain_tokenizer(eos_token=None).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no eos token"):
        tokenizer_of(tmp_path)


@pytest.mark.parametrize("name", AUDIO_PARENTS)
def test_sound_gets_as_many_placeholders_as_the_tower_gives_tokens(name, text, tmp_path):
    save_audio_parent(name, tmp_path / "audio")
    length = len(tokenizer_of(text))
    audio = audio_parent(tmp_path / "audio", max_seconds=1.0, pool_size=2).config
    processor = compose_processor(config_of(length, audio=audio), tokenizer_of(text))
    for samples in (10, 4_000, 16_000, 16_100):
        sound = np.random.default_rng(0).normal(0, 0.1, samples)
        batch = processor(text="<audio>", audio=[sound], sampling_rate=RATE, return_tensors="pt")
        frames = batch["input_features_mask"].sum(dim=1).tolist()
        assert int((batch["input_ids"] == processor.audio_token_id).sum()) == sum(map(audio.num_audio_tokens, frames))
        assert len(frames) == (2 if samples > 16_000 else 1)
        assert sum(frames) * audio.hop_length >= samples


def test_a_reloaded_processor_is_equal(text, tmp_path):
    save_vision_parent("dinov2", tmp_path / "vision")
    save_audio_parent("wav2vec2", tmp_path / "audio")
    length = len(tokenizer_of(text))
    config = config_of(length, vision_parent(tmp_path / "vision").config, audio_parent(tmp_path / "audio").config)
    processor = compose_processor(config, tokenizer_of(text), tmp_path / "vision")
    processor.save_pretrained(tmp_path / "saved")
    loaded = AutoProcessor.from_pretrained(tmp_path / "saved")
    assert type(loaded) is ChorusProcessor
    assert loaded.to_dict() == processor.to_dict()
    inputs = {"text": "what is it? <image><audio>", "images": [picture()], "sampling_rate": RATE}
    inputs |= {"audio": [np.random.default_rng(0).normal(0, 0.1, 800)], "return_tensors": "pt"}
    first, second = processor(**inputs), loaded(**inputs)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
