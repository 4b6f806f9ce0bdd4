"""Rows from files and folders: media stay undecoded, mistakes name the row and the key."""

import io
import json
import socket
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from chorus_moe import ChorusProcessor
from chorus_moe.training.collator import ChorusDataCollator
from chorus_moe.training.data import RowDataset, find_problem, load_rows

MESSAGES = [
    {"role": "user", "content": [{"type": "image"}, {"type": "audio"}, {"type": "text", "text": "what is it?"}]},
    {"role": "assistant", "content": "three"},
]
TURN = {"role": "assistant", "content": "three"}
SOUND = np.sin(np.arange(2_000, dtype=np.float32))
PLAIN = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "four"}]


def write_media(folder: Path) -> None:
    (folder / "media").mkdir(parents=True)
    Image.new("L", (20, 20)).save(folder / "media" / "a.png")
    soundfile.write(folder / "media" / "a.wav", SOUND, 16_000)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def write_splits(folder: Path) -> None:
    """`train.jsonl`, eight rows, and `test.jsonl`, two: with an image and a clip, and without any."""
    write_media(folder)
    user = [{"type": "image"}, {"type": "audio"}, {"type": "text", "text": "what is it?"}]
    turn = {"role": "assistant", "content": "three"}
    rows = [
        {"messages": [{"role": "user", "content": user}, turn], "images": ["media/a.png"], "audio": ["media/a.wav"]},
        {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "four"}]},
    ]
    write_jsonl(folder / "train.jsonl", rows * 4)
    write_jsonl(folder / "test.jsonl", rows)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two rows in train.jsonl: with media beside the file, and without any."""
    write_media(tmp_path)
    rows = [{"messages": MESSAGES, "images": ["media/a.png"], "audio": ["media/a.wav"]}, {"messages": PLAIN}]
    write_jsonl(tmp_path / "train.jsonl", rows)
    return tmp_path


@pytest.mark.parametrize("name", ["train.jsonl", ""])
def test_paths_are_relative_to_the_data_file(folder: Path, name: str, processor: ChorusProcessor) -> None:
    rows = load_rows(folder / name)
    assert rows[0]["images"] == [str(folder / "media" / "a.png")]
    assert (rows[1]["images"], rows[1]["audio"]) == ([], [])
    batch = ChorusDataCollator(processor)(list(rows))
    assert len(batch["pixel_values"]) == len(batch["input_features"]) == 1


def test_media_inside_a_parquet_file_stay_undecoded(tmp_path: Path, processor: ChorusProcessor) -> None:
    picture, sound = io.BytesIO(), io.BytesIO()
    Image.new("L", (20, 20)).save(picture, "png")
    soundfile.write(sound, SOUND, 16_000, format="wav")
    kinds = datasets.Features(
        {
            "messages": datasets.List({"role": datasets.Value("string"), "content": datasets.Json()}),
            "images": datasets.List(datasets.Image(decode=False)),
            "audio": datasets.List({"bytes": datasets.Value("binary"), "path": datasets.Value("string")}),
        }
    )
    row = {
        "messages": MESSAGES,
        "images": [{"bytes": picture.getvalue(), "path": None}],
        "audio": [{"bytes": sound.getvalue(), "path": None}],
    }
    table = datasets.Dataset.from_list([row], features=kinds)
    table = table.cast_column("audio", datasets.List(datasets.Audio()))
    table.cast_column("images", datasets.List(datasets.Image())).to_parquet(tmp_path / "train.parquet")
    rows = load_rows(tmp_path)
    assert rows[0]["images"][0]["bytes"] == picture.getvalue()
    assert len(ChorusDataCollator(processor)([rows[0]])["pixel_values"]) == 1


def test_a_saved_data_set_and_its_splits_are_read(tmp_path: Path) -> None:
    table = datasets.Dataset.from_list([{"messages": [{"role": "assistant", "content": "three"}]}])
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(tmp_path / "saved")
    assert len(load_rows(tmp_path / "saved", "test")) == 1


PROBLEMS: list[tuple[dict[str, Any], str]] = [
    ({}, "key 'messages': expected a list of turns, found None"),
    ({"messages": [{"content": "hi"}]}, "key 'messages', turn 0: expected a 'role'"),
    ({"messages": [{"role": "user", "content": 3}]}, "turn 0, 'content': expected a text or a list of parts, found 3"),
    ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "unknown part {'type': 'video'}"),
    ({"messages": [{**PLAIN[0], "images": ["a.png"]}, PLAIN[1]]}, "turn 0, 'images': media are parts of the content"),
    ({"messages": [PLAIN[0], {**PLAIN[1], "masked": True}]}, "key 'messages': masked=True of a turn; write weight: 0"),
    ({"messages": PLAIN[:1]}, "no turn has the role 'assistant'"),
    ({"messages": MESSAGES, "images": ["a"], "audio": []}, "key 'audio': 0 items for 1 audio parts"),
    ({"messages": PLAIN, "images": ["a"]}, "key 'images': 1 items for 0 image parts"),
    ({"messages": MESSAGES, "images": ["none.png"], "audio": ["none.wav"]}, "no such file"),
]


@pytest.mark.parametrize(("row", "message"), PROBLEMS)
def test_a_bad_row_is_described_by_its_key(row: dict[str, Any], message: str) -> None:
    assert message in str(find_problem(row))


def test_a_good_row_has_no_problem() -> None:
    assert find_problem({"messages": PLAIN}) is None
    inline = [{"role": "user", "content": [{"type": "image", "path": "a.png"}]}, PLAIN[1]]
    assert find_problem({"messages": inline}) is None


def test_loading_names_source_row_and_key(folder: Path) -> None:
    path = write_jsonl(folder / "bad.jsonl", [{"messages": PLAIN}, {"messages": PLAIN[:1]}])
    with pytest.raises(ValueError, match=r"bad.jsonl, row 1, key 'messages': no turn has the role 'assistant'"):
        load_rows(path)


def test_missing_data_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no data at"):
        load_rows(tmp_path / "none.jsonl")
    with pytest.raises(FileNotFoundError, match="has no test.jsonl"):
        load_rows(tmp_path, "test")
    (tmp_path / "train.csv").write_text("a")
    with pytest.raises(ValueError, match="unknown suffix; known are .jsonl, .json, .parquet"):
        load_rows(tmp_path / "train.csv")


def test_a_table_from_the_hub_may_not_name_local_files() -> None:
    rows = RowDataset([{"messages": PLAIN, "images": ["../secret.png"]}], folder=None)
    with pytest.raises(ValueError, match="row 0, key 'images': '../secret.png' is a path"):
        rows[0]


def test_rows_may_name_files_below_the_data_folder_only(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    Image.new("L", (20, 20)).save(elsewhere / "secret.png")
    (folder / "link.png").symlink_to(elsewhere / "secret.png")
    hidden = f"file://%2e%2e/{elsewhere.name}/secret.png"
    for name in (str(elsewhere / "secret.png"), f"../{elsewhere.name}/secret.png", "link.png", hidden):
        in_part = [{"role": "user", "content": [{"type": "image", "path": name}]}, TURN]
        in_url = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": name}}]}, TURN]
        for row in (
            {"messages": MESSAGES[:1] + [TURN], "images": [name], "audio": ["media/a.wav"]},
            {"messages": in_part},
        ):
            path = write_jsonl(folder / "bad.jsonl", [row])
            with pytest.raises(ValueError, match=r"row 0, key '\w+': '.*' lies outside '.*data.media_folder"):
                load_rows(path)
        with pytest.raises(ValueError, match=r"lies outside"):
            RowDataset([{"messages": in_url}], folder)[0]
    outside = [{"role": "user", "content": [{"type": "image", "path": str(elsewhere / "secret.png")}]}, TURN]
    allowed = load_rows(write_jsonl(folder / "bad.jsonl", [{"messages": outside}]), media_folder="/")
    assert allowed[0]["messages"][0]["content"][0]["path"] == str(elsewhere / "secret.png")


def test_paths_in_parts_are_relative_to_the_data_file_too(folder: Path, processor: ChorusProcessor) -> None:
    inline = [{"role": "user", "content": [{"type": "image", "path": "media/a.png"}]}, TURN]
    rows = load_rows(write_jsonl(folder / "inline.jsonl", [{"messages": inline}]))
    assert rows[0]["messages"][0]["content"][0]["path"] == str(folder / "media" / "a.png")
    assert len(ChorusDataCollator(processor)([rows[0]])["pixel_values"]) == 1
    with pytest.raises(ValueError, match="row 0, key 'messages': 'media/a.png' is a path, but a Hub data set"):
        RowDataset([{"messages": inline}], None)[0]


def test_an_address_of_a_file_may_write_blanks_as_addresses_do(folder: Path, processor: ChorusProcessor) -> None:
    (folder / "media" / "a.png").rename(folder / "media" / "a b.png")
    inline = [{"role": "user", "content": [{"type": "image", "url": (folder / "media" / "a b.png").as_uri()}]}, TURN]
    rows = load_rows(write_jsonl(folder / "inline.jsonl", [{"messages": inline}]))
    assert len(ChorusDataCollator(processor)([rows[0]])["pixel_values"]) == 1


def test_rows_of_another_project_are_read_and_a_line_says_so(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llava = {
        "image": "a.png",
        "conversations": [{"from": "human", "value": "<image>hi"}, {"from": "gpt", "value": "yo"}],
    }
    path = write_jsonl(folder / "llava.json", [llava])
    rows = load_rows(path, media_folder=folder / "media")
    assert rows[0]["images"] == [str(folder / "media" / "a.png")]
    assert rows[0]["messages"][0]["content"] == [{"type": "image"}, {"type": "text", "text": "hi"}]
    out, err = capsys.readouterr()
    assert out == ""
    assert "1 rows; ShareGPT conversations; column 'image' is 'images'" in err


def test_a_row_that_cannot_be_read_is_named_and_can_be_skipped(folder: Path, processor: ChorusProcessor) -> None:
    good = {"messages": PLAIN}
    rows = [good] * 17 + [{"messages": [{"role": "user", "content": "<image>"}, TURN]}]
    data = load_rows(write_jsonl(folder / "late.jsonl", rows))
    with pytest.raises(ValueError, match=r"sample 1: row 17, key 'images': 0 items"):
        ChorusDataCollator(processor)([data[0], data[17]])
    skipping = ChorusDataCollator(processor, on_bad_media="skip")
    assert len(skipping([data[0], data[17]])["input_ids"]) == 1
    with pytest.raises(ValueError, match=r"bad.jsonl, row 0, key 'images': 0 items"):
        load_rows(write_jsonl(folder / "bad.jsonl", rows[17:]))


def test_a_table_in_numpy_format_is_read(folder: Path, processor: ChorusProcessor) -> None:
    picture = np.arange(300, dtype=np.uint8).reshape(10, 10, 3)
    parts = [{"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "hi"}]}]
    parts.append({"role": "assistant", "content": [{"type": "text", "text": "three"}]})
    table = datasets.Dataset.from_dict({"messages": [parts], "images": [[Image.fromarray(picture)]]})
    expected = ChorusDataCollator(processor)([{"messages": parts, "images": [picture]}])
    found = ChorusDataCollator(processor)([table.with_format("numpy")[0]])
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_local_files_are_read_without_a_network(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    assert len(load_rows(folder)) == 2
    (folder / "runs").mkdir()
    monkeypatch.chdir(folder)
    for name in ("./none", "runs/none", str(folder / "none"), "a/b/c"):
        with pytest.raises(FileNotFoundError, match="no data at"):
            load_rows(name)
    datasets.DatasetDict({"train": datasets.Dataset.from_list([{"messages": PLAIN}])}).save_to_disk(folder / "saved")
    with pytest.raises(ValueError, match="has no split 'dev'; it has train"):
        load_rows(folder / "saved", "dev")
