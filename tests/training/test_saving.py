"""Saving over a folder: files take their places at the end, old shards go, and a failure leaves what was there."""

import os
import stat
from pathlib import Path

import pytest

from chorus_moe.training import saving as module
from chorus_moe.training.saving import begin_aside, drop_aside, files_below, held_model, put_on_disk, saved_whole


def write(folder: Path, *names: str, text: str = "old") -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def listing(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_files_take_their_places_and_the_others_stay(tmp_path: Path) -> None:
    write(tmp_path, "config.json", "tokenizer.json", "inner/kept.txt")
    with saved_whole(tmp_path) as aside:
        assert aside == tmp_path / "_incomplete" / "save" and not any(aside.iterdir())
        write(aside, "config.json", "inner/new.txt", text="new")
        assert listing(tmp_path)["config.json"] == "old"
    assert listing(tmp_path) == {
        "config.json": "new", "tokenizer.json": "old", "inner/kept.txt": "old", "inner/new.txt": "new"
    }  # fmt: skip
    assert not (tmp_path / "_incomplete").exists()


def test_a_folder_that_is_not_there_is_made(tmp_path: Path) -> None:
    with saved_whole(str(tmp_path / "a" / "b")) as aside:
        write(aside, "config.json")
    assert listing(tmp_path) == {"a/b/config.json": "old"}


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_what_was_there_outlives_an_error(tmp_path: Path, error: BaseException) -> None:
    write(tmp_path, "model.safetensors", "README.md")
    before = listing(tmp_path)

    def save() -> None:
        with saved_whole(tmp_path) as aside:
            write(aside, "model.safetensors", text="new")
            raise error

    with pytest.raises(type(error)):
        save()
    assert listing(tmp_path) == before and not (tmp_path / "_incomplete").exists()


def test_a_card_is_there_to_be_extended(tmp_path: Path) -> None:
    write(tmp_path, "README.md", text="card")
    with saved_whole(tmp_path) as aside:
        assert listing(aside) == {"README.md": "card"}
        (aside / "README.md").write_text("card and more")
    assert listing(tmp_path) == {"README.md": "card and more"}


def test_what_an_earlier_save_left_is_removed_and_others_stay(tmp_path: Path) -> None:
    write(tmp_path, "_incomplete/save/half", "_incomplete/other/half")
    aside = begin_aside(tmp_path, "save")
    assert listing(aside) == {}
    drop_aside(aside)
    assert listing(tmp_path) == {"_incomplete/other/half": "old"}
    drop_aside(tmp_path / "_incomplete" / "other")
    assert not (tmp_path / "_incomplete").exists()


SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json")


@pytest.mark.parametrize(
    ("old", "new", "left"),
    [
        (SHARDS, ["model.safetensors"], []),
        (["model.safetensors"], SHARDS, []),
        (SHARDS, ["model-00001-of-00001.safetensors", SHARDS[2]], []),
        # An adapter's weights are another kind than a model's.
        (SHARDS, ["adapter_model.safetensors"], list(SHARDS)),
        (["adapter_model.safetensors"], ["model.safetensors"], ["adapter_model.safetensors"]),
        (["model.safetensors", "other.safetensors"], ["config.json"], ["model.safetensors", "other.safetensors"]),
        (["mymodel.safetensors", "model.safetensors.bak"], ["model.safetensors"],
         ["mymodel.safetensors", "model.safetensors.bak"]),
        (["inner/model.safetensors"], SHARDS, ["inner/model.safetensors"]),
    ],
)  # fmt: skip
def test_shards_that_the_new_weights_lack_are_removed(
    tmp_path: Path, old: list[str], new: list[str], left: list[str]
) -> None:
    write(tmp_path, *old)
    with saved_whole(tmp_path) as aside:
        write(aside, *new, text="new")
    assert listing(tmp_path) == dict.fromkeys(left, "old") | dict.fromkeys(new, "new")


def test_old_shards_go_after_all_new_files_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, *SHARDS)
    said: list[str] = []
    replace, unlink = os.replace, Path.unlink
    monkeypatch.setattr(module.os, "replace", lambda a, b: said.append(f"put {Path(b).name}") or replace(a, b))
    monkeypatch.setattr(Path, "unlink", lambda path: said.append(f"drop {path.name}") or unlink(path))
    with saved_whole(tmp_path) as aside:
        write(aside, "config.json", "model.safetensors", text="new")
    said = [line for line in said if ".rights" not in line]
    assert said == ["put model.safetensors", "put config.json", *(f"drop {name}" for name in SHARDS)]


def test_files_are_stored_and_can_be_read_before_they_are_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(module, "put_on_disk", lambda path: said.append(path.name))
    umask = os.umask(0o022)
    try:
        with saved_whole(tmp_path) as aside:
            write(aside, "model.safetensors", "config.json")
            (aside / "model.safetensors").chmod(0o600)
    finally:
        os.umask(umask)
    assert said == ["model.safetensors", "config.json"]
    assert stat.S_IMODE((tmp_path / "model.safetensors").stat().st_mode) == 0o644


def test_a_file_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[int] = []
    monkeypatch.setattr(module.os, "fsync", lambda number: waited.append(os.fstat(number).st_ino))
    write(tmp_path, "a")
    put_on_disk(tmp_path / "a")
    assert waited == [(tmp_path / "a").stat().st_ino]


def test_weights_come_before_what_names_them(tmp_path: Path) -> None:
    names = ["b.json", "a/z.safetensors", "model.safetensors.index.json", "m.safetensors", "a/config.json"]
    write(tmp_path, *names)
    found = [str(path.relative_to(tmp_path)) for path in files_below(tmp_path)]
    assert found == ["a/z.safetensors", "m.safetensors", "a/config.json", "b.json", "model.safetensors.index.json"]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([], []),
        (["config.json"], ["config.json"]),
        (["adapter_config.json", "README.md"], ["adapter_config.json"]),
        (SHARDS, list(SHARDS)),
        (["adapter_model.safetensors"], ["adapter_model.safetensors"]),
        (["weights.safetensors", "inner/config.json", "processor_config.json"], []),
    ],
)
def test_a_model_is_known_by_its_files(tmp_path: Path, names: list[str], expected: list[str]) -> None:
    write(tmp_path, *names)
    assert held_model(tmp_path) == sorted(expected)


def test_a_folder_that_is_not_there_holds_no_model(tmp_path: Path) -> None:
    write(tmp_path, "file")
    assert held_model(tmp_path / "no") == held_model(tmp_path / "file") == []
