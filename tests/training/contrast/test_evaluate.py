"""The options of `evaluate --task`, checked before a model is loaded."""

from pathlib import Path
from typing import Any

import pytest

from chorus_moe import ChorusForContrastive, ChorusProcessor
from chorus_moe.training.contrast.evaluate import PairTask, evaluate_pairs, read_task
from tests.training.contrast.conftest import make_pair


def test_options_make_a_task() -> None:
    assert read_task("answers") is None
    assert read_task("answers", out=Path("out")) is None
    assert read_task("retrieval") == PairTask("retrieval", (1, 5, 10))
    assert read_task("retrieval", ks=[3]) == PairTask("retrieval", (3,))
    task = read_task("zero_shot", labels="red, dark green", template="a {} hat")
    assert task == PairTask("zero_shot", labels=("red", "dark green"), template="a {} hat")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("retreival", {}, "unknown task 'retreival'; did you mean 'retrieval'"),
        ("zero_shot", {}, "--task zero_shot needs all labels"),
        ("retrieval", {"labels": "a,b"}, "--labels is for --task zero_shot, found --task retrieval"),
        ("answers", {"ks": [1]}, "--k is for --task retrieval, found --task answers"),
        ("retrieval", {"out": Path("out")}, "--out is for --task answers, found --task retrieval"),
    ],
)
def test_options_of_another_task_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_task(name, **options)


def test_every_pair_of_modalities_is_retrieved(contrastive: ChorusForContrastive, processor: ChorusProcessor) -> None:
    rows = [make_pair(index) for index in range(6)]
    found = evaluate_pairs(PairTask("retrieval", (1, 4)), contrastive, processor, rows, progress=False)
    names = ("text", "image", "audio")
    assert set(found) == {"num_rows"} | {f"{a}_to_{b}" for a in names for b in names if a != b}
    with pytest.raises(ValueError, match="recall@10 needs 10 candidates or more, found 6 rows"):
        evaluate_pairs(PairTask("retrieval"), contrastive, processor, rows, progress=False)
