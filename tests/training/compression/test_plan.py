"""Recipes of a compression: what is read, and what is refused by name."""

from pathlib import Path
from typing import Any

import pytest

from chorus_moe.training.compression.plan import Distil, Merge, Prune, Quantize, read_compression, read_target

GIVEN = {"model": "m", "output_dir": "o"}


def read(tmp_path: Path, text: str, **given: Any) -> Any:
    path = tmp_path / "small.yaml"
    path.write_text(text, encoding="utf-8")
    return read_compression(path, GIVEN | given)


def test_steps_keep_their_order_and_the_command_line_wins(tmp_path: Path) -> None:
    text = """
    model: other
    data: {train_data: a, eval_data: b}
    steps:
    - prune: {experts: {text: 0.5}, dense: {heads: 1}, by: uses}
    - merge: {banks: {common: 2}}
    - distil: {training: {max_steps: 3}}
    - quantize: int8
    """
    found = read(tmp_path, text, data={"train_data": "c"})
    assert [type(step) for step in found.steps] == [Prune, Merge, Distil, Quantize]
    assert found.model == "m"
    assert (found.data_arguments().train_data, found.data_arguments().eval_data) == ("c", "b")
    assert found.steps[0].experts == {"text": 0.5} and found.steps[0].by == "uses"


def test_what_a_recipe_says_is_read_again_the_same(tmp_path: Path) -> None:
    import yaml

    text = "steps: [prune: {experts: {text: {1: 2}}}, distil: {parts: {train: [connectors]}}, quantize: {head: int8}]"
    found = read(tmp_path, text)
    assert read(tmp_path, yaml.safe_dump(found.to_dict())) == found


@pytest.mark.parametrize(
    ("given", "expected"),
    [("0.25", 0.25), (0.5, 0.5), ("1_900", 1900), ("1.9MB", 1_900_000), (7, 7), ("2 gb", 2 * 10**9)],
)
def test_a_target_is_bytes_or_a_share(given: object, expected: float) -> None:
    found = read_target(given)
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize("given", ["1.5", "0.0", "0", "-3", "quarter", "3 apples", True])
def test_a_target_that_is_neither_is_refused(given: object) -> None:
    with pytest.raises(ValueError, match="target_bytes="):
        read_target(given)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("step: []", "unknown name 'step'; did you mean 'steps'"),
        ("steps: [quantise: int8]", "unknown name 'quantise'; did you mean 'quantize'"),
        ("steps: [quantize: {}]", "expected groups"),
        ("steps: [prune: {expert: {text: 2}}]", "did you mean 'experts'"),
        ("steps: [prune: {}]", "name banks in experts"),
        ("steps: [prune: {experts: [text]}]", "experts must be a mapping"),
        ("steps: [prune: {experts: {text: 2}, by: use}]", "unknown name 'use'"),
        ("steps: [prune: {experts: {text: 2}, rows: 0}]", "rows=0"),
        ("steps: [merge: {similarity: weights}]", "banks names none"),
        ("steps: [distil: {lora: {banks: all}}]", "unknown name 'lora'"),
        ("steps: [distil: {training: {learning_rat: 1}}]", "did you mean 'learning_rate'"),
        ("steps: [distil: {training: {output_dir: x}}]", "training.output_dir is chosen by compress"),
        ("steps: {quantize: int8}", "steps must be a list"),
        ("data: {train_dat: x}\nsteps: [quantize: int8]", "train_dat"),
        ("batch_size: 0\nsteps: [quantize: int8]", "batch_size=0"),
        ("seed: 1", "give target_bytes"),
    ],
)
def test_what_nobody_knows_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(tmp_path, text)


def test_what_the_command_line_leaves_open_stays_as_the_recipe_says(tmp_path: Path) -> None:
    text = "{seed: 3, batch_size: 2, data: {train_data: a}, steps: [quantize: int8]}"
    found = read(tmp_path, text, seed=None, batch_size=None, data={"train_data": None, "eval_data": "b"})
    assert (found.seed, found.batch_size) == (3, 2)
    assert (found.data_arguments().train_data, found.data_arguments().eval_data) == ("a", "b")
