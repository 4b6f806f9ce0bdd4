import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoProcessor

import chorus_moe
from chorus_moe.processors import ChorusProcessor, MediaError, MediaLimits
from chorus_moe.surgery.processor import processor_from_config
from chorus_moe.surgery.tokenizer import build_tokenizer
from tests.processors.conftest import CLIP, CORPUS, IMAGE, RATE, assistant, model_config, picture, tone, user

# Raw calls


def test_any_mixture_gives_matching_tensors(processor):
    texts = ["no media", "<audio> before <image>", "<image><image>", "<audio>"]
    images = [[], [picture()], [picture(30, 20), picture(5, 5)], None]
    audio = [None, [tone(0.5)], [], [{"array": tone(3.0, rate=8_000), "sampling_rate": 8_000}]]
    batch = processor(text=texts, images=images, audio=audio, sampling_rate=RATE, return_tensors="pt")
    types = batch["mm_token_type_ids"]
    assert (types == 1).sum(1).tolist() == [0, 4, 8, 0]
    # 0.5 s are 50 frames = 7 tokens of 8; 3 s are windows of 200 and 100 frames = 25 + 13 tokens.
    assert (types == 3).sum(1).tolist() == [0, 7, 0, 38]
    assert batch["pixel_values"].shape == (3, 3, 16, 16)
    assert batch["input_features"].shape == (3, 200, 20)
    assert batch["input_features_mask"].sum(1).tolist() == [50, 200, 100]
    assert batch["attention_mask"][0].tolist() == sorted(batch["attention_mask"][0].tolist())


def test_only_what_is_there_is_returned(processor):
    assert set(processor(text=["a", "b c"], return_tensors="pt")) == {
        "input_ids",
        "attention_mask",
        "mm_token_type_ids",
    }
    assert set(processor(images=[picture()])) == {"pixel_values"}
    assert set(processor(audio=tone(0.1), sampling_rate=RATE)) == {"input_features", "input_features_mask"}
    with pytest.raises(ValueError, match="needs text, images or audio"):
        processor()
    with pytest.raises(MediaError, match="unknown modality: videos"):
        processor(text="a", videos=[1])


def test_serving_engines_get_the_same_counts(processor):
    counts = processor._get_num_multimodal_tokens(image_sizes=[(3, 4), (100, 5)], audio_lengths=[1, 8_000, 48_000])
    assert counts.num_image_tokens == [4, 4]
    assert counts.num_audio_tokens == [1, 7, 38]


BAD_MEDIA = [
    (
        {"images": [[picture()], [picture()], [picture(), picture()]]},
        "sample 2: found 1 image placeholder for 2 images",
    ),
    ({"images": [[picture()], [picture()], [b"broken"]]}, "sample 2, image 0: not a readable image"),
    ({"images": [[picture()], [picture()], [np.full((4, 4), np.nan)]]}, "sample 2, image 0: the image holds NaN"),
    ({"images": [[picture()], [picture()], ["http://x.org/a.png"]]}, "sample 2, image 0: web addresses are never"),
    ({"audio": [[tone(0.1)], [tone(0.1)], [np.zeros(0)]]}, "sample 2, audio 0: empty clip"),
    ({"audio": [[tone(0.1)], [tone(0.1)], [np.zeros(99)]]}, "sample 2, audio 0: the clip is silent"),
    ({"audio": [[tone(0.1)], [tone(0.1)], [np.full(99, np.nan)]]}, "sample 2, audio 0: the clip holds NaN"),
    ({"audio": [[tone(0.1)], [tone(0.1)], [tone(600.0)]]}, "sample 2, audio 0: 600.00 seconds"),
    ({"audio": [[tone(0.1)], [tone(0.1)], []]}, "sample 2: found 1 audio placeholder for 0 clips"),
]


@pytest.mark.parametrize(("media", "reason"), BAD_MEDIA)
def test_one_bad_sample_is_named_and_no_tensor_is_made(processor, monkeypatch, media, reason):
    for part, method in ((processor.image_processor, "preprocess"), (processor.feature_extractor, "featurize")):
        monkeypatch.setattr(part, method, lambda *args, **kwargs: pytest.fail("tensor work before the checks"))
    token = "<image>" if "images" in media else "<audio>"
    with pytest.raises(MediaError, match=reason) as caught:
        processor(text=[f"see {token}"] * 3, sampling_rate=RATE, **media)
    assert caught.value.sample == 2


def test_a_surplus_placeholder_in_raw_text_is_an_error_with_the_way_out(processor):
    with pytest.raises(MediaError, match="sample 1: found 1 image placeholder for 0 images; .*apply_chat_template"):
        processor(text=["fine", "what is <image>?"])


def test_a_model_without_a_modality_refuses_it():
    config = model_config()
    config.audio_config = None
    deaf = processor_from_config(config, build_tokenizer(CORPUS, vocab_size=300))
    assert deaf(text="<image>", images=picture())["input_ids"]
    with pytest.raises(MediaError, match="sample 0: this model hears nothing"):
        deaf(text="<audio>", audio=tone(0.1), sampling_rate=RATE)


def test_from_config_passes_overrides_and_refuses_unknown_ones():
    tokenizer = build_tokenizer(CORPUS, vocab_size=300)
    made = processor_from_config(model_config(), tokenizer, image_mean=[0.4] * 3, max_audio_seconds=5.0)
    assert made.image_processor.image_mean == (0.4, 0.4, 0.4)
    assert made.feature_extractor.max_audio_seconds == 5.0
    with pytest.raises(TypeError, match="max_audio_second=5"):
        processor_from_config(model_config(), tokenizer, max_audio_second=5)
    config = model_config()
    config.image_token_id = 7
    with pytest.raises(ValueError, match="<image> the id 3, the config expects 7"):
        processor_from_config(config, tokenizer)


# Saving and importing


def test_the_saved_processor_is_the_same_through_the_auto_class(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "chat_template.jinja", "processor_config.json", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is ChorusProcessor
    assert loaded.to_dict() == processor.to_dict()
    assert loaded.tokenizer.padding_side == "left"
    conversation = [user("before", IMAGE, "after"), assistant("a 7"), user(CLIP)]
    options = {"return_labels": True, "return_tensors": "pt"}
    first, second = (each.apply_chat_template(conversation, **options) for each in (processor, loaded))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert json.loads((tmp_path / "processor_config.json").read_text())["num_image_tokens"] == 4


@pytest.mark.parametrize("chosen", [None, "left", "right"])
def test_the_padding_side_is_saved(chosen, tmp_path):
    tokenizer = build_tokenizer(CORPUS, vocab_size=320)
    # A tokenizer as most models have it: nothing is said of sides.
    del tokenizer.init_kwargs["padding_side"]
    tokenizer.padding_side = "right"
    processor = processor_from_config(model_config(), tokenizer)
    assert processor.tokenizer.padding_side == "left"
    if chosen is not None:
        processor.tokenizer.padding_side = processor.tokenizer.truncation_side = chosen
    processor.save_pretrained(tmp_path)
    loaded = ChorusProcessor.from_pretrained(tmp_path).tokenizer
    expected = processor.tokenizer
    assert (loaded.padding_side, loaded.truncation_side) == (expected.padding_side, expected.truncation_side)
    # As older versions saved it.
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del settings["padding_side"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert ChorusProcessor.from_pretrained(tmp_path).tokenizer.padding_side == "left"


def rewritten(folder: Path, name: str, **values) -> None:
    """A saved processor with other values: at the top, or in the part of that name."""
    path = folder / "processor_config.json"
    settings = json.loads(path.read_text())
    (settings if name == "" else settings[name]).update(values)
    path.write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("part", "values", "reason"),
    [
        ("", {"num_image_tokens": 10**9}, "num_image_tokens=1000000000: expected finite numbers from 1 to 65536"),
        ("", {"frames_per_token": 0}, "frames_per_token=0"),
        ("", {"audio_convolutions": [[3, 0]]}, r"audio_convolutions=\[\[3, 0\]\]"),
        ("", {"num_image_token": 4}, "num_image_tokens is meant"),
        ("image_processor", {"size": {"height": 10**6, "width": 16}}, "size="),
        ("image_processor", {"image_mean": [float("nan")] * 3}, "image_mean="),
        ("image_processor", {"rescale_factor": float("inf")}, "rescale_factor=inf"),
        ("image_processor", {"image_meen": 0.5}, "image_mean is meant"),
        ("feature_extractor", {"hop_length": 0}, "hop_length=0"),
        ("feature_extractor", {"n_fft": 10**9}, "n_fft=1000000000"),
        ("feature_extractor", {"max_seconds": float("nan")}, "max_seconds=nan"),
        ("feature_extractor", {"max_audio_seconds": "long"}, "max_audio_seconds='long'"),
        ("feature_extractor", {"hop_lenght": 160}, "hop_length is meant"),
    ],
)
def test_settings_without_bound_or_misspelt_are_refused(processor, tmp_path, part, values, reason):
    processor.save_pretrained(tmp_path)
    rewritten(tmp_path, part, **values)
    with pytest.raises(ValueError, match=reason):
        ChorusProcessor.from_pretrained(tmp_path)


@pytest.mark.parametrize(("saved", "loaded"), [(20.0, 20.0), (300.0, 300.0), (1e4, 300.0)])
def test_a_repository_can_lower_the_longest_clip_and_not_raise_it(processor, tmp_path, saved, loaded):
    processor.save_pretrained(tmp_path)
    rewritten(tmp_path, "feature_extractor", max_audio_seconds=saved)
    assert ChorusProcessor.from_pretrained(tmp_path).feature_extractor.max_audio_seconds == loaded


def test_the_caller_can_raise_the_longest_clip():
    longer = processor_from_config(model_config(), build_tokenizer(CORPUS, vocab_size=320), max_audio_seconds=1e4)
    assert longer.feature_extractor.max_audio_seconds == 1e4


def test_the_pixels_of_a_sample_count_together(processor):
    limits = processor.limits
    try:
        processor.limits = MediaLimits(sample_pixels=1_000)
        processor(text=["<image>", "<image>"], images=[[picture(30, 30)], [picture(30, 30)]])
        with pytest.raises(MediaError, match="sample 1: images of 1800 pixels, the limit is 1000"):
            processor(text=["", "<image><image>"], images=[[], [picture(30, 30), np.zeros((30, 30, 3))]])
    finally:
        processor.limits = limits


def test_the_seconds_of_a_sample_count_together(processor):
    limits = processor.limits
    clips = [{"array": tone(0.6), "sampling_rate": RATE}] * 2
    try:
        processor.limits = MediaLimits(sample_seconds=1.0)
        processor(text=["<audio>", "<audio>"], audio=[clips[:1], clips[:1]])
        with pytest.raises(MediaError, match=r"sample 1: 1.20 seconds, the limit is 1"):
            processor(text=["", "<audio><audio>"], audio=[[], clips])
    finally:
        processor.limits = limits


def test_the_tokenizers_own_limit_holds_unless_another_is_given():
    words = "which digit is written in the image and which one is spoken"
    limited = processor_from_config(model_config(), build_tokenizer(CORPUS, 320, model_max_length=8))
    full = limited(text=words)["input_ids"][0]
    assert len(full) > 10
    assert limited(text=words, truncation=True)["input_ids"][0] == full[:8]
    assert limited(text=words, truncation=True, max_length=5)["input_ids"][0] == full[:5]
    assert limited(text=words, truncation=True, max_length=10)["input_ids"][0] == full[:10]
    assert len(limited(text="a", padding="max_length")["input_ids"][0]) == 8
    assert len(limited(text="a", padding="max_length", max_length=12)["input_ids"][0]) == 12
    # Without any limit there is none to pad to, as in transformers: rows are as they are.
    unlimited = processor_from_config(model_config(), build_tokenizer(CORPUS, 320))
    assert unlimited.tokenizer.model_max_length > 10**9
    assert unlimited(text=words, truncation=True, padding="max_length")["input_ids"][0] == full


def test_the_bare_name_is_refused():
    root = Path(chorus_moe.__file__).resolve().parents[1]
    run = subprocess.run(
        [sys.executable, "-c", "import processors"], cwd=root, capture_output=True, text=True, check=False
    )
    assert run.stderr.strip().splitlines()[-1].startswith("ImportError: import chorus_moe.processors")


def test_the_placeholders_of_a_clip_are_those_of_the_first_unless_another_is_meant(processor) -> None:
    clips = [np.zeros(16_000, np.float32), np.zeros(48_000, np.float32)]
    counts = [processor.num_audio_tokens_for(len(clip)) for clip in clips]
    assert counts[0] < counts[1]
    assert processor.replace_audio_token(clips) == "<audio>" * counts[0]
    assert processor.replace_audio_token(clips, 1) == "<audio>" * counts[1]
    assert processor.replace_image_token() == "<image>" * processor.num_image_tokens_for()


@pytest.mark.parametrize(
    "settings", [{"audio_convolutions": [[3, 0]]}, {"frames_per_token": 0}, {"num_image_tokens": -1}]
)
def test_settings_without_bound_are_refused_where_a_processor_is_built(processor, settings) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(settings))}="):
        ChorusProcessor(tokenizer=processor.tokenizer, **settings)
