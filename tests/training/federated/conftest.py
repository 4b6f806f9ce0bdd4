"""A saved base, three clients with unequal rows and modalities, and their recipes."""

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import soundfile
from transformers import PreTrainedTokenizerFast

from chorus_moe import ChorusProcessor
from chorus_moe.surgery.processor import processor_from_config
from chorus_moe.training.federated.learner import Learner
from chorus_moe.training.federated.updates import Update
from chorus_moe.training.recipe import Recipe, build_recipe
from tests.training.conftest import make_model, make_row, make_tokenizer

# Rows by their number: 0, 3, ... have an image, 1, 4, ... a sound, 2, 5, ... both.
CLIENTS = {"eyes": [0, 3, 6, 9, 12, 15], "ears": [1, 4], "both": [2, 5, 8, 11]}
ADAPTER: dict[str, Any] = {"banks": ["image", "audio", "text"], "cross_modal": True, "lora_rank": 2}
BANKS: dict[str, Any] = {"train": ["image", "audio"]}
TRAINED = {
    "adapter": ADAPTER,
    "banks": BANKS,
    "adapter, one side": ADAPTER,
    "banks of another base": BANKS,
    "three steps": BANKS,
}


def write_rows(folder: Path, name: str, numbers: list[int]) -> Path:
    """Rows of `make_row` as a file, media beside it."""
    lines = []
    (folder / "media").mkdir(parents=True, exist_ok=True)
    for number in numbers:
        row = make_row(number)
        for place, image in enumerate(row["images"]):
            row["images"][place] = f"media/{number}.png"
            image.save(folder / "media" / f"{number}.png")
        for place, clip in enumerate(row["audio"]):
            row["audio"][place] = f"media/{number}.wav"
            soundfile.write(folder / "media" / f"{number}.wav", clip["array"], clip["sampling_rate"])
        lines.append(json.dumps(row))
    path = folder / f"{name}.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_federation(folder: Path) -> Path:
    """`model/`, and a file of rows for each client."""
    tokenizer: PreTrainedTokenizerFast = make_tokenizer()
    model = make_model(tokenizer)
    processor: ChorusProcessor = processor_from_config(model.config, tokenizer)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    for name, numbers in CLIENTS.items():
        write_rows(folder, name, numbers)
    return folder


@pytest.fixture(scope="session")
def federation_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_federation(tmp_path_factory.mktemp("federation"))


def sections(folder: Path, trained: dict[str, Any], out: Path, rows: str | None = None) -> dict[str, Any]:
    """A recipe of the server, or with rows of a client."""
    kind = "parts" if "train" in trained else "lora"
    return {
        "model": {"model_name_or_path": str(folder / "model")},
        **({"data": {"train_data": str(folder / f"{rows}.jsonl")}} if rows else {}),
        kind: trained,
        "training": {
            "output_dir": str(out),
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
        },
    }


MakeRecipe = Callable[..., Recipe]


@pytest.fixture
def make_recipe(federation_folder: Path, tmp_path: Path) -> MakeRecipe:
    def make(trained: dict[str, Any], rows: str | None = None, **federated: Any) -> Recipe:
        found = sections(federation_folder, trained, tmp_path / "out", rows)
        if federated:
            found["federated"] = federated
        return build_recipe(found, "test")

    return make


@pytest.fixture(scope="session")
def make_learner(federation_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Learner]:
    """A client, made once: each question writes all that is trained anew."""
    out = tmp_path_factory.mktemp("clients")

    @functools.cache
    def make(kind: str, rows: str) -> Learner:
        found = sections(federation_folder, TRAINED[kind], out, rows)
        found["training"]["max_steps"] = 3 if kind == "three steps" else 1
        return Learner.of(build_recipe(found, "test"))

    return make


def by_rows(answer: Callable[[bytes], bytes | None]) -> Callable[[bytes], bytes | None]:
    """A client whose experts weigh by its rows, as all do under masks."""

    def changed(payload: bytes) -> bytes | None:
        found = answer(payload)
        if found is None:
            return None
        update = Update.unpack(found)
        tokens = {place: (counts > 0) * update.examples for place, counts in update.tokens.items()}
        return replace(update, tokens=tokens).pack()

    return changed
