"""The spread trainer's own decisions; whole runs on several processes are in `test_spread.py` and `test_context.py`."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from chorus_moe.training.checkpoints import WholeCheckpoints
from chorus_moe.training.scale import trainer as module
from chorus_moe.training.scale.trainer import FinishCheckpoints, SpreadTrainer, unwrapped


class Writer:
    def __init__(self, is_done: bool = True):
        self.is_done, self.is_writing, self.settled = is_done, True, 0

    def all_done(self) -> bool:
        return self.is_done

    def settle(self) -> None:
        self.settled += 1


def trainer(**values: Any) -> Any:
    made = SpreadTrainer.__new__(SpreadTrainer)
    given = {"_writer": None, "_unfinished": None, "is_distributed_loading_by_transformers": True}
    vars(made).update(given | values)
    return made


@pytest.fixture
def finished(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    seen: list[Any] = []
    monkeypatch.setattr(WholeCheckpoints, "_finish_checkpoint", lambda self, *given: seen.append(given))
    return seen


RUN = Path("run"), "checkpoint-3"


def test_a_checkpoint_is_finished_at_once_or_once_it_is_written(finished: list[Any]) -> None:
    trainer()._finish_checkpoint(*RUN)
    idle = Writer()
    idle.is_writing = False
    trainer(_writer=idle)._finish_checkpoint(*RUN)
    assert finished == [RUN] * 2
    made = trainer(_writer=Writer())
    made._finish_checkpoint(*RUN)
    assert finished == [RUN] * 2 and made._unfinished == RUN


@pytest.mark.parametrize(
    ("is_done", "wait", "is_finished"), [(True, False, True), (False, False, False), (False, True, True)]
)
def test_one_that_is_written_meanwhile_is_finished_when_all_are_done_or_waited_for(
    is_done: bool, wait: bool, is_finished: bool, finished: list[Any]
) -> None:
    writer = Writer(is_done)
    made = trainer(_writer=writer, _unfinished=RUN)
    made.finish_checkpoint(wait)
    assert finished == [RUN] * is_finished and writer.settled == is_finished
    assert made._unfinished == (None if is_finished else RUN)


def test_nothing_unfinished_asks_no_rank(finished: list[Any]) -> None:
    writer = Writer()
    trainer(_writer=writer).finish_checkpoint()
    trainer(_unfinished=RUN).finish_checkpoint()
    assert not finished and not writer.settled


def test_a_callback_looks_after_each_step_and_waits_at_the_end() -> None:
    asked: list[bool] = []
    stand_in: Any = SimpleNamespace(finish_checkpoint=lambda wait=True: asked.append(wait))
    callback = FinishCheckpoints(stand_in)
    callback.on_step_end(*[None] * 3)  # type: ignore[arg-type]
    callback.on_train_end(*[None] * 3)  # type: ignore[arg-type]
    assert asked == [False, True]


def test_the_checkpoint_before_is_finished_before_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(SpreadTrainer, "finish_checkpoint", lambda self, wait=True: said.append(f"finish {wait}"))
    monkeypatch.setattr(WholeCheckpoints, "_save_checkpoint", lambda self, *given: said.append("save"))
    trainer()._save_checkpoint(None, None)
    assert said == ["finish True", "save"]


def test_an_optimizer_of_one_file_is_not_spread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="has the optimizer of a run without fsdp or tensor in one file"):
        trainer()._read_states(str(tmp_path))
    seen: list[Any] = []
    monkeypatch.setattr(WholeCheckpoints, "_read_states", lambda self, folder: seen.append(folder))
    trainer(is_distributed_loading_by_transformers=False)._read_states(str(tmp_path))
    assert seen == [str(tmp_path)]


def test_a_schedule_takes_numbers_and_keeps_its_own_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / module.OPTIMIZER).mkdir()
    saved = {"last_epoch": 5, "base_lrs": [0.1], "new": [1], "left": 7}
    torch.save(saved, tmp_path / module.SCHEDULER_NAME)
    read: list[Any] = []
    monkeypatch.setattr(module, "load_optimizer", lambda *given: read.append(given))
    own = {"last_epoch": 0, "base_lrs": [0.1, 0.1], "new": 3}
    schedule = SimpleNamespace(state_dict=lambda: own, load_state_dict=read.append)
    optimizer = SimpleNamespace(optimizer="inner")
    trainer(model="model", optimizer=optimizer, lr_scheduler=schedule)._read_states(str(tmp_path))
    expected = {"last_epoch": 5, "base_lrs": [0.1, 0.1], "new": [1], "left": 7}
    assert read == [("model", "inner", tmp_path), expected]


def test_processes_with_the_same_rows_are_those_of_tensor_and_context(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WholeCheckpoints, "get_tp_size", lambda self: 2)
    monkeypatch.setattr(module, "num_slices", lambda: 3)
    assert trainer().get_tp_size() == 6


def test_without_a_spread_model_all_is_the_parents(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    names = ("_save", "_save_optimizer_and_scheduler", "_load_from_checkpoint")
    for name in names:
        monkeypatch.setattr(WholeCheckpoints, name, lambda self, *given, name=name: seen.append((name, *given)))
    made = trainer(is_distributed_loading_by_transformers=False)
    assert not made.is_spread and trainer().is_spread
    made._save("f")
    trainer()._save("f", {"w": 1})
    made._save_optimizer_and_scheduler("g")
    made._load_from_checkpoint("h")
    assert seen == [
        ("_save", "f", None), ("_save", "f", {"w": 1}), ("_save_optimizer_and_scheduler", "g"),
        ("_load_from_checkpoint", "h", None),
    ]  # fmt: skip


def test_an_optimizer_is_found_below_accelerates() -> None:
    inner = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    outer: Any = SimpleNamespace(optimizer=inner)
    assert unwrapped(outer) is inner and unwrapped(inner) is inner


@pytest.mark.parametrize("in_background", [False, True])
@pytest.mark.parametrize("is_main", [False, True])
def test_states_are_written_now_or_meanwhile_and_the_scheduler_by_one_rank(
    in_background: bool, is_main: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    done: list[Any] = []
    monkeypatch.setattr(module, "optimizer_state", lambda model, optimizer: ("state", "keys"))
    monkeypatch.setattr(module, "weights_of", lambda model: "weights")
    monkeypatch.setattr(module, "save_optimizer", lambda *given: done.append(("now", *given)))
    writer = SimpleNamespace(begin=lambda *given: done.append(("begun", *given)), is_writing=False)
    scheduler = SimpleNamespace(state_dict=lambda: {"last_epoch": 3})
    made = trainer(_writer=writer if in_background else None, model=None, optimizer=None, lr_scheduler=scheduler)
    made.args = SimpleNamespace(should_save=is_main)
    made._save_optimizer_and_scheduler(str(tmp_path))
    now, begun = ("now", "state", "keys", tmp_path), ("begun", "weights", "state", "keys", tmp_path)
    assert done == [begun if in_background else now]
    saved = [torch.load(file) for file in tmp_path.iterdir()]
    assert saved == [{"last_epoch": 3}] * is_main
