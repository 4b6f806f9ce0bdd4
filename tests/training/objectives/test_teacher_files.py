"""What a teacher said lies on disk under the row, the processor and the teacher that it belongs to."""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from chorus_moe import ChorusProcessor
from chorus_moe.training.collator import ChorusDataCollator
from chorus_moe.training.objectives import teacher_files
from chorus_moe.training.objectives.teacher_files import (
    TaughtRows,
    TeacherFiles,
    digest_of_row,
    digest_of_teacher,
    has_media,
    teacher_columns,
    write_teacher,
)
from chorus_moe.training.objectives.teachers import Teacher
from tests.training.conftest import make_rows
from tests.training.objectives.test_teachers import save_chorus, save_llama, text_row

ATOL = 1e-5
TOP_K = 5


@pytest.fixture
def teacher(source: str, processor: ChorusProcessor) -> Teacher:
    found = Teacher([source])
    found.check(found.models[0].config, processor)
    return found


def write(folder: Path, teacher: Teacher, rows: Any, processor: ChorusProcessor, **options: Any) -> TeacherFiles:
    write_teacher(folder, teacher, rows, ChorusDataCollator(processor), **{"top_k": TOP_K, "batch_size": 2} | options)
    return TeacherFiles(folder)


def test_a_row_comes_back_with_what_the_teacher_said_of_it(
    tmp_path: Path, teacher: Teacher, rows: list[dict[str, Any]], processor: ChorusProcessor, monkeypatch: Any
) -> None:
    # A shard for each row.
    monkeypatch.setattr(teacher_files, "SHARD_BYTES", 1)
    files = write(tmp_path / "out", teacher, [*rows, rows[0]], processor)
    assert len(files) == len(rows) == files.manifest["rows"] and len(files.manifest["shards"]) == len(rows)
    assert files.manifest["positions"] == sum(
        len(load_file(tmp_path / "out" / name)["labels"]) for name in files.manifest["shards"]
    )
    for row in reversed(rows):
        inputs = ChorusDataCollator(processor)([row])
        answer, found = teacher.read(inputs), files.find(row)
        assert answer is not None and found is not None
        wanted = answer.tokens.top(TOP_K)
        assert found.tokens.token_ids is not None and found.tokens.token_ids.equal(wanted.token_ids)
        torch.testing.assert_close(found.tokens.log_probs, wanted.log_probs, atol=ATOL, rtol=0)
        torch.testing.assert_close(found.tokens.log_rest, wanted.log_rest, atol=ATOL, rtol=0)
        total = found.tokens.log_probs.exp().sum(-1) + found.tokens.log_rest.exp()
        torch.testing.assert_close(total, torch.ones_like(total))
        assert found.labels.equal(inputs["labels"][inputs["labels"] != -100])


def test_all_tokens_leave_no_rest(
    tmp_path: Path, teacher: Teacher, rows: list[dict[str, Any]], processor: ChorusProcessor
) -> None:
    files = write(tmp_path / "out", teacher, rows, processor, top_k=10**6)
    found = files.find(rows[0])
    assert found is not None and found.tokens.log_rest is None
    assert found.tokens.log_probs.shape[1] == files.manifest["top_k"] == teacher.num_shared


def test_files_open_again_in_another_process(
    tmp_path: Path, teacher: Teacher, rows: list[dict[str, Any]], processor: ChorusProcessor
) -> None:
    files = write(tmp_path / "out", teacher, rows, processor)
    first = files.find(rows[0])
    again = pickle.loads(pickle.dumps(files)).find(rows[0])
    assert first is not None and first.tokens.log_probs.equal(again.tokens.log_probs)


def test_a_changed_or_new_row_is_refused_by_its_number(
    tmp_path: Path, teacher: Teacher, rows: list[dict[str, Any]], processor: ChorusProcessor
) -> None:
    files = write(tmp_path / "out", teacher, rows, processor)
    taught = TaughtRows(rows, files)
    changed = [*rows[:3], {**rows[3], "messages": rows[4]["messages"]}]
    with pytest.raises(ValueError, match="row 3 is none of the 6 that .* was written for, or was changed since"):
        TaughtRows(changed, files)
    # One pixel, behind the look at the start.
    pixels = np.asarray(rows[2]["images"][0]).copy()
    pixels[0, 0] ^= 1
    rows[2]["images"] = [Image.fromarray(pixels)]
    with pytest.raises(ValueError, match="row 2 is none"):
        taught[2]


def test_other_labels_of_the_same_row_are_refused(
    tmp_path: Path, teacher: Teacher, rows: list[dict[str, Any]], processor: ChorusProcessor
) -> None:
    taught = TaughtRows(rows, write(tmp_path / "out", teacher, rows, processor))
    batch = ChorusDataCollator(processor, more=[teacher_columns])([taught[0], taught[1]])
    labels = batch["labels"].clone()
    labels[1, labels[1] != -100] += 1
    with pytest.raises(ValueError, match=r"sample 1: (\d+) labelled tokens, the teacher was asked about \1 others"):
        teacher_columns([taught[0], taught[1]], {"labels": labels})
    with pytest.raises(ValueError, match=r"sample 0: 0 labelled tokens, the teacher was asked about \d+;"):
        teacher_columns([taught[0], taught[1]], {"labels": torch.full_like(labels, -100)})


def test_another_processor_temperature_or_teacher_is_refused(
    tmp_path: Path,
    teacher: Teacher,
    rows: list[dict[str, Any]],
    processor: ChorusProcessor,
    tokenizer: PreTrainedTokenizerFast,
    source: str,
) -> None:
    files = write(tmp_path / "out", teacher, rows, processor)
    # Padding is of the last call and changes nothing.
    processor.tokenizer(["three", "four five"], padding=True)
    files.check(processor, None, 1.0)
    with pytest.raises(ValueError, match=r"another processor or max_length than this run's \(40\)"):
        files.check(processor, 40, 1.0)
    with pytest.raises(ValueError, match="at temperature 1, the run asks for 2"):
        files.check(processor, None, 2.0)
    processor.image_processor.image_mean = 0.4
    with pytest.raises(ValueError, match="another processor"):
        files.check(processor, None, 1.0)
    files.check_teachers([source])
    save_chorus(tmp_path / "other", tokenizer, seed=9)
    with pytest.raises(ValueError, match=r"whose weights are not those of teacher '.*other'"):
        files.check_teachers([str(tmp_path / "other")])
    with pytest.raises(ValueError, match="written by 1 teachers, the run names 2"):
        files.check_teachers([source, source])


def test_a_text_teachers_files_leave_rows_with_media_out(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, processor: ChorusProcessor, config: Any
) -> None:
    save_llama(tmp_path / "llama", tokenizer, len(tokenizer))
    teacher = Teacher([str(tmp_path / "llama")])
    teacher.check(config, processor)
    rows = [*make_rows(2), text_row(0)]
    files = write(tmp_path / "out", teacher, rows, processor)
    assert len(files) == 1 and not files.manifest["reads_media"]
    taught = TaughtRows(rows, files)
    batch = ChorusDataCollator(processor, more=[teacher_columns])([taught[index] for index in range(3)])
    assert batch["teacher_read"].tolist() == [False, False, True]
    assert batch["teacher_log_probs"].shape[0] == 3 and not batch["teacher_log_probs"][:2].any()
    # As in evaluation, where rows bring nothing.
    assert "teacher_read" not in ChorusDataCollator(processor, more=[teacher_columns])(rows)


def test_rows_that_cannot_be_read_are_skipped_as_in_training(
    tmp_path: Path, teacher: Teacher, rows: list[dict[str, Any]], processor: ChorusProcessor
) -> None:
    broken = {**rows[0], "images": [{"bytes": b"no image", "path": None}]}
    given = [rows[1], broken, rows[2], broken, broken]
    collator = ChorusDataCollator(processor, on_bad_media="skip")
    write_teacher(tmp_path / "out", teacher, given, collator, top_k=TOP_K, batch_size=3)
    files = TeacherFiles(tmp_path / "out")
    assert len(files) == 2
    assert files.find(rows[2]) is not None and files.find(broken) is None
    batch = ChorusDataCollator(processor, on_bad_media="skip", more=[teacher_columns])(list(TaughtRows(given, files)))
    assert batch["teacher_read"].tolist() == [True, True]


def test_a_path_stands_for_what_its_file_holds(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    for name in ("a", "b"):
        rows[0]["images"][0].save(tmp_path / f"{name}.png")
    row = {**rows[0], "images": [str(tmp_path / "a.png")]}
    moved = {**rows[0], "images": [{"path": str(tmp_path / "b.png"), "bytes": None}]}
    packed = {**rows[0], "images": [{"path": "a.png", "bytes": (tmp_path / "a.png").read_bytes()}]}
    assert digest_of_row(row) == digest_of_row(moved) == digest_of_row(packed)
    blank = tmp_path / "a b.png"
    blank.write_bytes((tmp_path / "a.png").read_bytes())
    assert digest_of_row(row) == digest_of_row({**rows[0], "images": [blank.as_uri()]})
    inline = [{"type": "image", "image": str(tmp_path / "a.png")}, {"type": "text", "text": "what?"}]
    turns = {"messages": [{"role": "user", "content": inline}, rows[0]["messages"][1]]}
    before = digest_of_row(turns)
    rows[1]["audio"], rows[0]["images"][0] = [], Image.new("RGB", (3, 3))
    rows[0]["images"][0].save(tmp_path / "a.png")
    assert digest_of_row(turns) != before
    assert has_media(turns) and has_media(row) and not has_media(text_row(0))


def test_turns_that_join_to_the_same_text_are_other_rows() -> None:
    def row(*words: str) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": [{"type": "text", "text": word} for word in words]}]}

    assert digest_of_row(row("ab", "c")) != digest_of_row(row("a", "bc"))


def test_the_hash_of_a_teacher_is_that_of_its_weights(source: str, tmp_path: Path) -> None:
    source = shutil.copytree(source, str(tmp_path / "copy"))
    before = digest_of_teacher(source)
    (Path(source) / "README.md").write_text("a note", encoding="utf-8")
    assert digest_of_teacher(source) == before
    path = Path(source) / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert digest_of_teacher(source) != before


def test_folders_that_are_full_missing_or_cut_short_are_refused(
    tmp_path: Path, teacher: Teacher, rows: list[dict[str, Any]], processor: ChorusProcessor
) -> None:
    files = write(tmp_path / "out", teacher, rows, processor)
    with pytest.raises(ValueError, match="holds something already"):
        write(tmp_path / "out", teacher, rows, processor)
    with pytest.raises(ValueError, match="keep at least one token"):
        write(tmp_path / "new", teacher, rows, processor, top_k=0)
    with pytest.raises(FileNotFoundError, match="has no teacher.json"):
        TeacherFiles(tmp_path / "new")
    (tmp_path / "out" / "teacher.json").write_text(json.dumps(files.manifest | {"rows": 7}), encoding="utf-8")
    with pytest.raises(ValueError, match="holds 6 rows, its teacher.json says 7"):
        TeacherFiles(tmp_path / "out")
