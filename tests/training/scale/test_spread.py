"""Two processes learn what one learns, in every way to share a model; what they save, any number of processes reads.

All runs share one group of two processes (`layout_runs.py`); this one, alone, gives the right values. Twenty steps
on up to four processes are a journey (`tests/journeys/test_layouts.py`).
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForMultimodalLM

from chorus_moe.modeling.modeling_base import ChorusPreTrainedModel
from chorus_moe.training.scale.layout import ALONE
from chorus_moe.training.scale.shards import INDEX, files_of_bank
from tests.fresh_process import ROOT, run_ranks
from tests.training.scale.layout_runs import MODEL, make, run

PROGRAM = ROOT / "tests/training/scale/layout_runs.py"
SAVED = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
SHORT = {"max_steps": 2}
# Sums in another order: worst seen in 20 steps on 4 processes is 2e-6.
LOSSES = 1e-5

Found = dict[str, dict[str, Any]]


def spread_runs(folder: Path) -> list[list[Any]]:
    """Name, kind of model, layout, checkpoint, settings."""
    return [
        ["whole", "routing", {"fsdp": 2, "expert": 2}, None, SAVED],
        ["loaded", "loaded", {"fsdp": 2, "expert": 2}, None, SAVED],
        ["loaded tensor", "loaded", {"tensor": 2}, None, SHORT],
        ["adapter", "adapter", {"fsdp": 2}, None, SAVED],
        ["adapter again", "adapter", {"fsdp": 2}, str(folder / "adapter" / "checkpoint-2"), SAVED],
        ["adapter tensor", "attention adapter", {"tensor": 2}, None, SAVED],
        ["adapter expert", "attention adapter", {"fsdp": 2, "expert": 2}, None, SHORT],
        ["context", "context", {"context": 2}, None, {}],
        ["context adapter", "adapter", {"context": 2}, None, SAVED],
        ["disk", "plain", {"fsdp": 2}, None, SAVED | {"fault": "disk"}],
        ["slow", "plain", {"fsdp": 2}, None, SHORT | {"fault": "slow"}],
        ["raises", "plain", {"fsdp": 2}, None, SHORT | {"fault": "raises"}],
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("layouts")


@pytest.fixture(scope="module")
def said(folder: Path) -> list[str]:
    """What each rank wrote to its stderr; the runs lie in the folder."""
    make("routing", ALONE, folder).save_pretrained(folder / MODEL)
    done = run_ranks(PROGRAM, [str(folder), json.dumps(spread_runs(folder))], cwd=folder, seconds=300)
    return [rank.stderr for rank in done]


@pytest.fixture(scope="module")
def found(folder: Path, said: list[str]) -> list[Found]:
    """What each rank found."""
    return [json.loads((folder / f"2-{rank}.json").read_text()) for rank in range(2)]


def losses_alone(folder: Path, kind: str, settings: dict[str, Any]) -> list[float]:
    """Of one process, this one."""
    return run(folder / f"alone {kind}", kind, {}, None, settings | {"save_strategy": "no"})["losses"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*model*.safetensors") for name, tensor in load_file(path).items()}


def assert_same(folder: Path, other: Path) -> None:
    ours, theirs = weights(folder), weights(other)
    assert ours and ours.keys() == theirs.keys()
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("name", "kind", "settings"),
    [
        ("whole", "routing", SAVED),
        ("adapter", "adapter", SAVED),
        ("adapter again", "adapter", SAVED),
        ("adapter tensor", "attention adapter", SAVED),
        ("adapter expert", "attention adapter", SHORT),
        ("context", "context", {}),
        ("context adapter", "adapter", SAVED),
    ],
)
def test_two_processes_learn_what_one_learns(
    name: str, kind: str, settings: dict[str, Any], folder: Path, found: list[Found]
) -> None:
    expected = losses_alone(folder, kind, settings)
    for rank in found:
        assert "error" not in rank[name], rank[name]["error"]
        assert rank[name]["losses"] == pytest.approx(expected, abs=LOSSES)
    assert found[0][name]["strongest"] == found[1][name]["strongest"]


@pytest.mark.slow
def test_an_adapter_of_a_tensor_group_is_saved_whole(folder: Path, found: list[Found]) -> None:
    alone = folder / "adapter tensor alone"
    run(alone, "attention adapter", {}, None, SAVED | {"save_strategy": "no"})
    ours, theirs = weights(folder / "adapter tensor"), weights(alone)
    assert ours.keys() == theirs.keys() and any(".q_proj.lora_B" in name for name in ours)
    for name, tensor in ours.items():
        assert tensor.shape == theirs[name].shape, name
        # By norms: Adam makes whole steps of gradients that are nothing but rounding.
        assert (tensor - theirs[name]).norm() < 0.01 * theirs[name].norm(), name


@pytest.mark.slow
def test_each_process_holds_its_share(found: list[Found]) -> None:
    for name, units in {"whole": 13, "adapter": 9}.items():
        # FSDP2, and not what accelerate makes of it on a CPU: modules that it manages, and half of each tensor.
        assert [rank[name]["units"] for rank in found] == [units, units]
        own, whole = sum(rank[name]["own"] for rank in found), found[0][name]["whole"]
        assert own == whole
        assert all(abs(rank[name]["own"] - whole / 2) < 0.01 * whole for rank in found)


@pytest.mark.slow
def test_a_model_is_read_in_shares(folder: Path, found: list[Found]) -> None:
    for name in ("loaded", "loaded tensor"):
        for rank in found:
            assert "error" not in rank[name], rank[name]["error"]
            losses = rank[name]["losses"]
            assert losses == pytest.approx(rank["whole"]["losses"][: len(losses)], abs=LOSSES)
            # Of a tensor group each rank has all that is no linear layer or expert.
            assert rank[name]["held"] == rank[name]["own"] < 0.7 * rank[name]["whole"]
    # The same sums in the same order: only where the weights came from differs.
    assert_same(folder / "loaded", folder / "whole")


@pytest.mark.slow
def test_a_resumed_adapter_ends_at_the_same_bits(folder: Path, found: list[Found]) -> None:
    assert_same(folder / "adapter", folder / "adapter again")


@pytest.mark.slow
def test_one_process_goes_on_with_it(folder: Path, found: list[Found]) -> None:
    middle = str(folder / "whole" / "checkpoint-2")
    losses = run(folder / "whole alone", "routing", {}, middle, SAVED | {"save_strategy": "no"})["losses"]
    assert losses == pytest.approx(found[0]["whole"]["losses"], abs=LOSSES)


@pytest.mark.slow
def test_the_model_loads_as_any_other(folder: Path, found: list[Found]) -> None:
    model = AutoModelForMultimodalLM.from_pretrained(folder / "whole")
    assert isinstance(model, ChorusPreTrainedModel)
    assert not hasattr(model.config, "distributed_config")
    saved = weights(folder / "whole")
    assert all(torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items() if name in saved)


@pytest.mark.slow
def test_a_bank_lies_in_files_of_its_own(folder: Path, found: list[Found]) -> None:
    for bank in ("text", "image", "audio", "common"):
        [file] = files_of_bank(folder / "whole", bank)
        assert all(f".banks.{bank}." in name for name in load_file(folder / "whole" / file))
    with pytest.raises(ValueError, match="no bank 'speech', it has audio, common, image, text"):
        files_of_bank(folder / "whole", "speech")
    places = json.loads((folder / "whole" / INDEX).read_text())["weight_map"]
    assert places.keys() == weights(folder / "whole").keys()


@pytest.mark.slow
def test_a_full_disk_on_one_rank_ends_all_and_leaves_no_checkpoint(folder: Path, found: list[Found]) -> None:
    for rank in found:
        assert "could not be read or written by rank 1: OSError: [Errno 28] No space left" in rank["disk"]["error"]
        assert rank["disk"]["seconds"] < 60
    assert not list((folder / "disk").glob("checkpoint-*"))


@pytest.mark.slow
def test_a_slow_rank_is_named(found: list[Found]) -> None:
    error = found[0]["slow"]["error"]
    assert "before step 2 not all ranks arrived: they are gone, or over 1 seconds behind" in error
    assert "rank 1" in error.lower() or "ranks 1" in error.lower()
    assert all(rank["slow"]["seconds"] < 60 for rank in found)


@pytest.mark.slow
def test_a_rank_that_raises_says_so_and_ends(said: list[str]) -> None:
    assert "rank 1 of 2: ArithmeticError: the rows of rank 1 make no sense" in said[1]
