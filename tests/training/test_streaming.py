"""Streams: every source, endless passes in an order of their own, the same rows after a stop, and what is refused."""

import io
import json
import tarfile
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import soundfile
import torch
import yaml
from accelerate.data_loader import IterableDatasetShard
from PIL import Image
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from chorus_moe import ChorusProcessor
from chorus_moe.surgery import freeze
from chorus_moe.training.checkpoints import numbered_checkpoints
from chorus_moe.training.collator import ChorusDataCollator
from chorus_moe.training.data import SKIPPED
from chorus_moe.training.recipe import Recipe, build_recipe, read_recipe
from chorus_moe.training.streaming import StreamedRows, _shards, sample_of, skip_learned, training_rows
from chorus_moe.training.train import run_training
from tests.fresh_process import kill
from tests.training.conftest import make_model

COUNT = 7


def picture(index: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((24, 24, 3), index * 30, dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def write_parquet(folder: Path) -> None:
    for shard in range(2):
        rows = [i for i in range(COUNT) if i % 2 == shard]
        table = {"text": [f"three {i}" for i in rows], "image": [{"bytes": picture(i), "path": None} for i in rows]}
        features = datasets.Features({"text": datasets.Value("string"), "image": datasets.Image()})
        datasets.Dataset.from_dict(table, features).to_parquet(folder / f"train-{shard:05}-of-00002.parquet")


def write_jsonl(folder: Path) -> None:
    (folder / "pictures").mkdir()
    lines = []
    for i in range(COUNT):
        (folder / f"pictures/{i}.png").write_bytes(picture(i))
        lines.append(json.dumps({"text": f"three {i}", "images": [f"pictures/{i}.png"]}))
    (folder / "train.jsonl").write_text("\n".join(lines))


def write_shards(folder: Path) -> None:
    for shard in range(2):
        with tarfile.open(folder / f"{shard:05}.tar", "w") as tar:
            for i in range(shard, COUNT, 2):
                for suffix, data in (("png", picture(i)), ("txt", f"three {i}".encode())):
                    member = tarfile.TarInfo(f"{i:05}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


def write_images(folder: Path) -> None:
    for i in range(COUNT):
        path = folder / f"train/kind{i % 2}/{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(i))


def write_sounds(folder: Path) -> None:
    for i in range(COUNT):
        soundfile.write(folder / f"{i}.wav", np.full(2000, 0.1 * (i + 1), dtype=np.float32), 16_000)


SOURCES: dict[str, Callable[[Path], None]] = {
    "parquet": write_parquet,
    "jsonl": write_jsonl,
    "shards": write_shards,
    "images": write_images,
    "sounds": write_sounds,
}


def recipe_of(folder: Path, **settings: Any) -> Recipe:
    data = {"train_data": str(folder), "streaming": True, "documents": True, "shuffle_buffer": 4}
    training = {"output_dir": str(folder.parent / "out"), "max_steps": 4, "per_device_train_batch_size": 2,
                "report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_steps": 2,
                "learning_rate": 1e-2}  # fmt: skip
    sections: dict[str, Any] = {"data": data, "training": training}
    for section, values in settings.items():
        sections[section] = {**sections.get(section, {}), **values}
    return build_recipe(sections, "recipe")


def stream_of(folder: Path, **settings: Any) -> StreamedRows:
    rows = training_rows(recipe_of(folder, **settings))
    assert isinstance(rows, StreamedRows)
    return rows


def texts(rows: Iterator[dict[str, Any]]) -> list[str]:
    return [str(row["messages"][0]["content"][-1].get("text")) for row in rows]


@pytest.fixture(params=SOURCES)
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    SOURCES[request.param](folder)
    return folder


def test_every_source_gives_documents_that_the_collator_reads(source: Path, processor: ChorusProcessor) -> None:
    rows = list(islice(stream_of(source), COUNT))
    batch = ChorusDataCollator(processor)(rows)
    assert len(batch["pixel_values"] if "pixel_values" in batch else batch["input_features"]) == COUNT
    media = torch.isin(batch["input_ids"], torch.tensor([processor.image_token_id, processor.audio_token_id]))
    assert bool((batch["labels"][media] == -100).all())
    # All text is learned, and the end.
    learned = (batch["labels"] != -100).sum(dim=1)
    has_text = rows[0]["messages"][0]["content"][-1].get("type") == "text"
    assert bool((learned > 1).all() if has_text else (learned == 1).all())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    write_shards(folder)
    return folder


def test_each_pass_has_every_row_once_in_an_order_of_its_own(folder: Path) -> None:
    found = texts(islice(stream_of(folder), 3 * COUNT))
    passes = [found[i * COUNT : (i + 1) * COUNT] for i in range(3)]
    assert all(sorted(one) == [f"three {i}" for i in range(COUNT)] for one in passes)
    assert passes[0] != passes[1] != passes[2]
    assert found == texts(islice(stream_of(folder), 3 * COUNT))
    assert found != texts(islice(stream_of(folder, training={"seed": 1}), 3 * COUNT))
    plain = texts(islice(stream_of(folder, data={"shuffle_buffer": 1}), 2 * COUNT))
    assert plain[:COUNT] == plain[COUNT:] == [f"three {i}" for i in (0, 2, 4, 6, 1, 3, 5)]


def plain(rows: list[dict[str, Any]]) -> list[str]:
    return texts(iter(rows))


@pytest.mark.parametrize("workers", [1, 2])
def test_the_order_does_not_depend_on_the_workers(folder: Path, workers: int) -> None:
    rows = stream_of(folder)
    loader = DataLoader(rows, batch_size=2, collate_fn=plain, num_workers=workers, multiprocessing_context="fork")
    alone = DataLoader(rows, batch_size=2, collate_fn=plain)
    assert list(islice(loader, 8)) == list(islice(alone, 8))


def test_learned_rows_are_skipped_and_the_next_ones_are_those_of_a_whole_run(folder: Path) -> None:
    rows = stream_of(folder)
    whole = texts(islice(rows, 12))
    rows.start = 8
    resumed = list(islice(rows, 12))
    assert all(row is SKIPPED for row in resumed[:8]) and texts(iter(resumed[8:])) == whole[8:]


@pytest.mark.parametrize("workers", [0, 2])
def test_two_ranks_take_the_rows_of_one_with_twice_the_batch(folder: Path, workers: int) -> None:
    """As accelerate deals a stream out: each rank reads all rows and takes its part of each batch."""
    rows = stream_of(folder, data={"shuffle_buffer": 3})
    rows.batch = 4
    alone = list(islice(DataLoader(rows, batch_size=4, collate_fn=plain), 6))
    ranks = []
    for rank in range(2):
        shard = IterableDatasetShard(rows, batch_size=2, num_processes=2, process_index=rank)
        context = "fork" if workers else None
        loader = DataLoader(shard, 2, collate_fn=plain, num_workers=workers, multiprocessing_context=context)
        ranks.append(list(islice(loader, 6)))
    assert [[*first, *second] for first, second in zip(*ranks, strict=True)] == alone


def saved_model(tokenizer: PreTrainedTokenizerFast, processor: ChorusProcessor, folder: Path) -> str:
    model = make_model(tokenizer, attention_dropout=0.1)
    freeze(model, "towers")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_stopped_and_resumed_run_ends_at_the_same_bits(
    folder: Path, tokenizer: PreTrainedTokenizerFast, processor: ChorusProcessor, tmp_path: Path, accumulated: int
) -> None:
    sections: dict[str, Any] = {
        "model": {"model_name_or_path": saved_model(tokenizer, processor, tmp_path / "model")},
        "parts": {"freeze": ["towers"]},
        "objectives": {"masked_image_weight": 0.5},
        "training": {"gradient_accumulation_steps": accumulated, "lr_scheduler_type": "constant"},
    }
    whole = recipe_of(folder, **sections, data={"train_data": str(folder)})
    run_training(whole)
    expected = (tmp_path / "out/model.safetensors").read_bytes()
    objectives = (tmp_path / "out/checkpoint-4/objectives.safetensors").read_bytes()
    sections["training"] |= {"output_dir": str(tmp_path / "other"), "max_steps": 2}
    run_training(recipe_of(folder, **sections))
    sections["training"] |= {"max_steps": 4, "resume_from_checkpoint": "auto", "overwrite_output_dir": True}
    run_training(recipe_of(folder, **sections))
    assert (tmp_path / "other/model.safetensors").read_bytes() == expected
    assert (tmp_path / "other/checkpoint-4/objectives.safetensors").read_bytes() == objectives


@pytest.mark.slow
def test_a_killed_stream_ends_at_the_same_bits(
    folder: Path, tokenizer: PreTrainedTokenizerFast, processor: ChorusProcessor, tmp_path: Path
) -> None:
    sections: dict[str, Any] = {
        "model": {"model_name_or_path": saved_model(tokenizer, processor, tmp_path / "model")},
        "parts": {"freeze": ["towers"]},
        "data": {"train_data": str(folder), "streaming": True, "documents": True, "shuffle_buffer": 4},
        "training": {"max_steps": 8, "save_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2,
                     "report_to": "none", "use_cpu": True, "disable_tqdm": True, "dataloader_num_workers": 2},
    }  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(sections))
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    command = ["train", str(path), "--output_dir", str(killed)]
    kill(command, cwd=tmp_path, when=lambda: bool(numbered_checkpoints(killed)))
    assert not (killed / "model.safetensors").exists()
    run_training(read_recipe(path, ["--output_dir", str(killed), "--resume_from_checkpoint", "auto"]))
    run_training(read_recipe(path, ["--output_dir", str(whole)]))
    assert (killed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_files_of_a_shard_are_columns() -> None:
    row = sample_of(
        {"left.jpg": b"1", "right.PNG": b"2", "wav": b"3", "json": b'{"text": "x", "task": "t"}', "cls": b"4"}
    )
    media = {"images": [{"bytes": b"1", "path": None}, {"bytes": b"2", "path": None}],
             "audio": [{"bytes": b"3", "path": None}]}  # fmt: skip
    assert row == media | {"text": "x", "task": "t", "cls": b"4"}
    assert "key 'txt': 'text' is in another file" in str(sample_of({"json": b'{"text": "x"}', "txt": b"y"})["error"])
    assert "key 'json': expected a mapping of columns, found [1]" in str(sample_of({"json": b"[1]"})["error"])


def test_a_damaged_shard_is_named(folder: Path) -> None:
    path = folder / "00001.tar"
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(ValueError, match="00001.tar: no readable shard"):
        list(stream_of(folder).head(COUNT))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"training": {"max_steps": -1}}, "training.max_steps must say how long"),
        ({"data": {"shuffle_buffer": 0}}, "shuffle_buffer must be 1 or more, found 0"),
        ({"data": {"documents": False}}, "row 0, key 'text': .*data.documents=true"),
        (
            {"objectives": {"masked_audio_weight": 1.0}},
            "none of the first 1,000 rows has audio",
        ),
        ({"data": {"train_split": "test", "train_data": "none.tar"}}, "no data at 'none.tar'"),
    ],
)
def test_what_cannot_be_streamed_is_refused(folder: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        training_rows(recipe_of(folder, **settings))


def test_a_folder_of_pictures_and_sound_says_nothing_of_pairs(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    write_images(folder)
    write_sounds(folder / "train")
    with pytest.raises(ValueError, match="holds 7 images and 7 clips: what belongs together"):
        training_rows(recipe_of(folder))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no train.jsonl, .* and no images or sound"):
        training_rows(recipe_of(tmp_path / "empty"))


def test_a_stream_trains_no_tokenizer(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a tokenizer cannot be trained on a stream; give model.tokenizer"):
        run_training(recipe_of(folder, model={"config": {"text_config": {"hidden_size": 32}}}))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["train.tar", "train-0.tar", "trainer.tar", "eval.tar", "7.tar"], ["train-0.tar", "train.tar"]),
        (["00001.tar", "00000.tar", "notes.tar", "eval-0.tar"], ["00000.tar", "00001.tar"]),
        (["a.tar", "z.tar"], []),
    ],
)
def test_shards_are_those_of_the_split_or_the_numbered_ones(
    names: list[str], expected: list[str], tmp_path: Path
) -> None:
    for name in names:
        (tmp_path / name).touch()
    assert [Path(found).name for found in _shards(tmp_path, "train")] == expected


@pytest.mark.parametrize(("ignores", "start"), [(False, 5 * 4 * 3), (True, 0)])
def test_a_stream_begins_where_its_checkpoint_ended_unless_told_not_to(
    tmp_path: Path, ignores: bool, start: int
) -> None:
    (tmp_path / "trainer_state.json").write_text('{"global_step": 5}')
    rows: Any = SimpleNamespace(batch=4, start=0)
    arguments: Any = SimpleNamespace(ignore_data_skip=ignores, gradient_accumulation_steps=3)
    skip_learned(rows, str(tmp_path), arguments)
    assert rows.start == start
