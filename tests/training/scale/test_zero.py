"""DeepSpeed's ZeRO on two processes without an accelerator, where accelerate starts it only if it is told so."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.fresh_process import run_ranks
from tests.training.scale.layout_runs import write_model_and_rows
from tests.training.scale.test_spread import LOSSES, assert_same, weights

pytest.importorskip("deepspeed", reason="deepspeed is not installed: .ci/matrix deepspeed")

# accelerate knows no DeepSpeed on a CPU; DeepSpeed itself does.
PROGRAM = """
import sys
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from chorus_moe.serving.commands import main

if sys.argv.pop(1) == "anywhere":
    PartialState._prepare_backend = lambda *arguments, **named: ("gloo", DistributedType.MULTI_CPU)
main()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("zero")
    write_model_and_rows(folder)
    (folder / "program.py").write_text(PROGRAM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        # What DeepSpeed compiles: a lock that a killed run left in the usual place is waited for without end.
        patch.setenv("TORCH_EXTENSIONS_DIR", str(folder / "compiled"))
        yield folder


def train(folder: Path, name: str, stage: int, *words: str, where: str = "anywhere") -> list[str]:
    """Run a recipe in two processes; what each wrote to its stderr."""
    training = {"output_dir": name, "max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2}
    training |= {"report_to": "none", "disable_tqdm": True, "logging_steps": 1, "learning_rate": 1e-3}
    data = {"train_data": "rows.jsonl", "documents": True}
    sections = {"model": {"model_name_or_path": "model"}, "data": data, "training": training}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(sections | {"parallel": {"zero": stage, "rows": 4}}))
    arguments = [where, "train", f"{name}.yaml", *words]
    # The compiler of DeepSpeed's own exchange takes a minute the first time.
    done = run_ranks(folder / "program.py", arguments, cwd=folder, seconds=400)
    return [rank.stderr for rank in done]


def losses(folder: Path, name: str) -> list[float]:
    log = json.loads((folder / name / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in log if "loss" in entry]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_zero_learns_what_copies_learn_and_resumes(folder: Path) -> None:
    said = {"copies": train(folder, "copies", 0, "--use_cpu", "true", where="here")}
    said |= {f"zero {stage}": train(folder, f"zero{stage}", stage) for stage in (1, 3)}
    expected = weights(folder / "copies")
    for stage in (1, 3):
        assert (folder / f"zero{stage}" / "README.md").exists(), said[f"zero {stage}"]
        assert losses(folder, f"zero{stage}") == pytest.approx(losses(folder, "copies"), abs=LOSSES)
        found = weights(folder / f"zero{stage}")
        # Names as well: transformers saved those of another layout after ZeRO had shared out the weights.
        assert found.keys() == expected.keys()
        # The sums of two gradients in another order, four steps of 1e-3.
        assert all((found[name] - expected[name]).abs().max() < 2e-5 for name in found)
    train(folder, "again", 3, "--resume_from_checkpoint", "zero3/checkpoint-2")
    assert_same(folder / "zero3", folder / "again")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_zero_where_accelerate_starts_no_deepspeed_is_refused(folder: Path) -> None:
    for words in ([], ["--use_cpu", "true"]):
        said = train(folder, "refused", 3, *words, where="here")
        assert any("accelerate starts DeepSpeed on accelerators alone" in text for text in said)
