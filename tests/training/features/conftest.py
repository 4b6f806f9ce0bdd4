"""A saved model, rows with media on disk, and the cache of both."""

from pathlib import Path

import pytest

from chorus_moe import ChorusForConditionalGeneration, ChorusProcessor
from chorus_moe.training.data import load_rows
from chorus_moe.training.features.cache import cache_features
from tests.training.test_data import write_jsonl, write_media

WORDS = {"type": "text", "text": "what is it?"}
ANSWER = {"role": "assistant", "content": "three"}
UNLEARNED = {"role": "assistant", "content": "four", "weight": 0}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Rows of every kind: an image, a long clip and a short one, both, none, an image within a part, a turn that is
    not learned; with a task."""
    import numpy as np
    import soundfile
    from PIL import Image

    folder = tmp_path / "data"
    write_media(folder)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (24, 24, 3), dtype=np.uint8)).save(folder / "media" / "b.png")
    soundfile.write(folder / "media" / "b.wav", rng.normal(0, 0.1, 7_000).astype(np.float32), 16_000)
    image, audio = {"type": "image"}, {"type": "audio"}

    def user(*parts: dict[str, str]) -> dict[str, object]:
        return {"role": "user", "content": [*parts, WORDS]}

    rows = [
        {"messages": [user(image), ANSWER], "images": ["media/b.png"], "task": "see"},
        {"messages": [user(audio), ANSWER], "audio": ["media/b.wav"], "task": "hear"},
        {"messages": [user(audio, image), ANSWER], "images": ["media/a.png"], "audio": ["media/a.wav"]},
        {"messages": [{"role": "user", "content": [WORDS]}, ANSWER]},
        {"messages": [user(image, image), ANSWER], "images": ["media/b.png", "media/a.png"], "task": "see"},
        {"messages": [user({"type": "image", "path": "media/b.png"}), UNLEARNED, user(audio), ANSWER],
         "audio": ["media/b.wav"]},
    ]  # fmt: skip
    write_jsonl(folder / "train.jsonl", rows)
    write_jsonl(folder / "test.jsonl", rows[:3])
    return folder


@pytest.fixture
def base(model: ChorusForConditionalGeneration, processor: ChorusProcessor, tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def cache(data: Path, model: ChorusForConditionalGeneration, processor: ChorusProcessor, tmp_path: Path) -> Path:
    splits = {split: load_rows(data, split) for split in ("train", "test")}
    cache_features(model, processor, splits, tmp_path / "cache", source="base", batch_size=4, progress=False)
    return tmp_path / "cache"
