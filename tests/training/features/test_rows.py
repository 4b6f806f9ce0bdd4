"""A folder of features is recognised, read as it was written, and refused where it is not whole."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from chorus_moe import ChorusForConditionalGeneration, ChorusProcessor
from chorus_moe.training.data import FeatureRows, load_rows
from chorus_moe.training.evaluate import evaluate_rows, medium_of
from chorus_moe.training.features.rows import pack, unpack
from chorus_moe.training.guards.skills import skills_of
from chorus_moe.training.routing.report import count_rows


def test_states_come_back_with_shape_and_type() -> None:
    states = [torch.randn(3, 4), torch.randn(2, 4).bfloat16(), torch.zeros(0, 4), *torch.randn(9, 1, 4)]
    for before, after in zip(states, unpack(pack(states)), strict=True):
        assert before.dtype == after.dtype
        assert torch.equal(before, after)
    assert unpack(pack([])) == []


@pytest.mark.parametrize(
    "packed",
    [b"", pack([torch.ones(3)])[:-1], safetensors.torch.save({"1": torch.ones(3)})],
    ids=["empty", "cut", "named"],
)
def test_damaged_states_are_named(packed: bytes) -> None:
    with pytest.raises(ValueError, match=f"cached features of {len(packed)} bytes are damaged: .*; write them again"):
        unpack(packed)


@pytest.mark.parametrize(
    "state", [torch.ones(3), torch.ones(1, 2, 3), torch.ones(2, 3).long(), torch.ones(2, 0)], ids=str
)
def test_states_that_no_tower_gives_are_damaged(state: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"are damaged: torch\..* of shape \(.*\) is no \(tokens, width\)"):
        unpack(pack([torch.ones(2, 3), state]))


@pytest.mark.parametrize(("packed", "kind"), [(None, "NoneType"), ("text", "str")])
def test_a_column_of_something_else_is_damaged(packed: Any, kind: str) -> None:
    with pytest.raises(ValueError, match=f"cached features of type {kind} are damaged"):
        unpack(packed)


def test_rows_keep_their_number_media_and_further_columns(cache: Path) -> None:
    rows = load_rows(cache, "train")
    assert isinstance(rows, FeatureRows)
    assert len(rows) == 6
    assert [len(rows[n]["images"]) for n in range(6)] == [1, 0, 1, 0, 2, 1]
    assert [medium_of(row) for row in rows] == ["image", "audio", "image+audio", "text", "image", "image+audio"]
    assert skills_of(load_rows(cache, "test")) == {"image.see": [0], "audio.hear": [1], "image+audio": [2]}


def test_what_cannot_be_trained_on_is_refused(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no split 'validation'; it has train, test"):
        load_rows(cache, "validation")
    with pytest.raises(ValueError, match="columns, media_markers, media_folder and documents were read"):
        load_rows(cache, media_folder=tmp_path)

    def change(**values: Any) -> Path:
        broken = tmp_path / "broken"
        shutil.rmtree(broken, ignore_errors=True)
        shutil.copytree(cache, broken)
        facts = json.loads((broken / "features.json").read_text())
        (broken / "features.json").write_text(json.dumps(facts | values))
        return broken

    with pytest.raises(ValueError, match=r"features.json: not what cache-features writes: version 9"):
        load_rows(change(version=9))
    with pytest.raises(ValueError, match=r"train.arrow: found 6 rows, features.json says 7"):
        load_rows(change(splits={"train": 7}))
    broken = change()
    whole = (broken / "train.arrow").read_bytes()
    (broken / "train.arrow").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"train.arrow"):
        load_rows(broken)
    (broken / "features.json").write_text("{")
    with pytest.raises(ValueError, match="not what cache-features writes"):
        load_rows(broken)


@pytest.mark.parametrize("use", [evaluate_rows, count_rows])
def test_what_asks_a_model_wants_the_rows_with_media(
    use: Any, model: ChorusForConditionalGeneration, processor: ChorusProcessor, cache: Path
) -> None:
    with pytest.raises(ValueError, match="key 'input_ids': token ids, as `cache-features` writes them"):
        use(model, processor, load_rows(cache), progress=False)
