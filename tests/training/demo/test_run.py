"""The demo in miniature: every stage runs, and what it writes is whole."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from chorus_moe.training.demo import run as demo
from chorus_moe.training.demo.answers import load_questions, save_questions, variants_of
from chorus_moe.training.demo.data import BASE_SKILLS, DigitQuestions, handwritten_digits
from chorus_moe.training.demo.speech import SpeechClips
from chorus_moe.training.demo.speech_sets import SpeechSets


def spoken_digits(seed: int, per_digit: int = 2) -> SpeechClips:
    """Noise in the place of speech: the demo's stages do not care."""
    rng = np.random.default_rng(seed)
    count = 10 * per_digit
    waveforms = [rng.normal(0, 0.1, 4_000 + 100 * i).astype(np.float32) for i in range(count)]
    return SpeechClips(waveforms, np.arange(count) % 10, ["voice"] * count)


@pytest.fixture
def small_speech(monkeypatch: pytest.MonkeyPatch) -> None:
    clips = [spoken_digits(seed) for seed in range(4)]
    monkeypatch.setattr(demo, "synthetic_speech_sets", lambda cache: SpeechSets(*clips, "noise", known=clips[1]))


@pytest.mark.slow
def test_the_demo_trains_adapts_reloads_and_reports(tmp_path: Path, small_speech: None) -> None:
    settings = demo.DemoSettings(
        picture_steps=2,
        sound_steps=2,
        base_steps=4,
        voice_steps=2,
        lora_steps=2,
        batch_size=8,
        questions_per_skill=2,
        workers=0,
    )
    card = tmp_path / "card.md"

    result = demo.run_demo(tmp_path / "out", settings, model_card=card)

    assert json.loads((tmp_path / "out" / "report.json").read_text()) == result
    assert set(result["skills"]) == {*BASE_SKILLS, "smaller"}
    # As many questions of every further set as of a skill.
    assert all(result[name]["n"] == 2 for name in ("new_voices", "new_phrasings", "known_speakers"))
    for figures in result["skills"].values():
        assert set(figures) == {"n", "before", "after", "image_withheld", "audio_withheld"}
    assert 0 < result["parameters"]["active"] < result["parameters"]["total"]
    # Four and two steps, all of which are logged.
    assert {name: [step for step, _ in points] for name, points in result["losses"].items()} == {
        "loss, stage 1, base": [1, 2, 3, 4],
        "loss, stage 2, LoRA": [1, 2],
    }
    for name in ("accuracy.png", "routing.png", "examples.png", "curves.png"):
        with Image.open(tmp_path / "out" / name) as picture:
            picture.verify()
    assert "](curves.png)" in (tmp_path / "out" / "report.md").read_text()
    assert f"{result['parameters']['total']:,}" in card.read_text()
    assert "(routing.png)" in card.read_text()
    shown = [tmp_path / "routing.png", tmp_path / "out" / "merged" / "routing.png"]
    assert all(path.read_bytes() == (tmp_path / "out" / "routing.png").read_bytes() for path in shown)
    adapter = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    base = load_file(tmp_path / "out" / "base" / "model.safetensors")
    # The adapter holds the audio tower as the speaker's own clips have left it, with the batch norms' statistics.
    learnt = {
        name.removeprefix("base_model.model."): weight for name, weight in adapter.items() if "audio_tower" in name
    }
    assert learnt.keys() == {name for name in base if "audio_tower" in name}
    changed = {name for name, weight in learnt.items() if not torch.equal(weight, base[name])}
    assert changed == {name for name in learnt if not name.endswith(("running_mean", "running_var", "batches_tracked"))}


def test_questions_come_back_from_disk_as_they_were(tmp_path: Path) -> None:
    _, pictures = handwritten_digits()
    samples = DigitQuestions(pictures, spoken_digits(0), ["sum", "written"], 4)
    save_questions((samples[i] for i in range(4)), tmp_path)

    rows = load_questions(tmp_path)

    assert [row["answer"] for row in rows] == [samples[i]["answer"] for i in range(4)]
    assert [len(row["images"]) for row in rows] == [len(samples[i]["images"]) for i in range(4)]
    with Image.open(rows[0]["images"][0]) as picture:
        assert np.array_equal(np.asarray(picture), np.asarray(samples[0]["images"][0]))


def test_withheld_variants_hold_neither_the_medium_nor_its_placeholder() -> None:
    _, pictures = handwritten_digits()
    sample = DigitQuestions(pictures, spoken_digits(0), ["sum"], 1)[0]

    variants = variants_of([sample])

    for variant, column, kind in (("image_withheld", "images", "image"), ("audio_withheld", "audio", "audio")):
        row = variants[variant][0]
        assert row[column] == []
        assert kind not in {part["type"] for turn in row["messages"] for part in turn["content"]}
